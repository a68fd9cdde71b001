"""Teacher, outputs, features, schedule, statistics and state as a user meets them."""

from __future__ import annotations

import collections
import copy
import io
import json
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import CompressionStage, ModelError, StateError, UsageError, load_checkpoint, save_checkpoint
from compress_knowledge_distillation.distance import Distance
from tests.plugins.knowledge_distillation.helpers import Returning, create, images, make

SPARSE = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5, "params": {"sparsity_target_epoch": 4}}


def distilled(controller):
    return controller.statistics().to_dict()["knowledge_distillation"]


# The teacher.


def test_the_teacher_is_the_model_before_compression_in_eval_mode():
    plain, x = make(), images()
    wanted = copy.deepcopy(plain).eval()(x)
    controller, model = create(plain, SPARSE, type="mse")
    outputs = model.train()(x)
    torch.testing.assert_close(controller.loss(), (outputs - wanted).square().mean())
    names = [*model.state_dict(), *(name for name, _ in model.named_parameters())]
    assert not any("teacher" in name for name in names)
    assert len(list(model.parameters())) == len(list(make().parameters()))
    teacher = controller.context.teacher
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x)
        controller.loss().backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_a_registered_teacher_is_learned_from_and_copied():
    teacher, x = make(5, width=12).train(), images()
    controller, model = create(make(), SPARSE, teacher=teacher, type="softmax", temperature=2.0)
    wanted = copy.deepcopy(teacher).eval()(x)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.zero_()
    outputs = model(x)
    expected = 4 * -(F.log_softmax(outputs / 2, 1) * (wanted / 2).softmax(1)).sum(1).mean()
    torch.testing.assert_close(controller.loss(), expected)
    assert teacher.training and all(parameter.requires_grad for parameter in teacher.parameters())
    assert distilled(controller)["teacher_parameters"] == sum(p.numel() for p in teacher.parameters())


def test_a_teacher_that_is_not_copied_has_to_be_frozen_and_stay_so():
    teacher, x = make(5), images()
    with pytest.raises(UsageError, match=r"it is in training mode: call teacher\.eval"):
        create(make(), teacher=teacher, copy=False, type="mse")
    teacher.eval()
    with pytest.raises(UsageError, match=r"its parameter 'block1.0.weight' requires a gradient"):
        create(make(), teacher=teacher, copy=False, type="mse")
    controller, model = create(make(), teacher=teacher.requires_grad_(False), copy=False, type="mse")
    assert controller.context.teacher is teacher
    model(x)
    controller.loss()
    teacher.train()
    with pytest.raises(UsageError, match="TeacherArgs"):
        controller.loss()
    with pytest.raises(ModelError, match=r"TeacherArgs takes a torch.nn.Module, got str"):
        create(make(), teacher="resnet", type="mse")


def test_an_error_of_the_teacher_says_whose_it_is():
    controller, model = create(make(), teacher=nn.Linear(7, 5), type="mse")
    model(images())
    with pytest.raises(RuntimeError) as raised:
        controller.loss()
    assert any("raised by the teacher" in note for note in raised.value.__notes__)


# Outputs.

Pair = collections.namedtuple("Pair", "logits hidden")
CONTAINERS = {
    "tuple": lambda y: (y, 2 * y),
    "list": lambda y: [y, [2 * y]],
    "dict": lambda y: {"a": y, "b": {"c": 2 * y}},
    "named tuple": lambda y: Pair(y, 2 * y),
    "beside other things": lambda y: {"a": y, "b": (2 * y, None, "text", 3, y.argmax(1))},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_output_in_nested_containers_is_compared(name):
    function = CONTAINERS[name]
    student, teacher = Returning((4,), function), Returning((4,), function, seed=1)
    controller, model = create(student, teacher=teacher, type="mse")
    x = torch.randn(5, 3, dtype=torch.float64)
    model(x)
    difference = student.fc(x) - teacher.fc(x)
    torch.testing.assert_close(controller.loss(), difference.square().mean() * (1 + 4))
    assert len(distilled(controller)["losses"]) == 2


def test_outputs_are_matched_by_path_and_what_has_no_partner_is_named(caplog):
    student = Returning((4,), lambda y: {"b": 2 * y, "a": y, "mine": y, "idle": y.detach(), "loss": y.sum()})
    teacher = Returning((4,), lambda y: {"a": y, "b": 2 * y, "theirs": y, "idle": y, "loss": y.sum()}, seed=1)
    controller, model = create(student, teacher=teacher, type="mse")
    x = torch.randn(5, 3, dtype=torch.float64)
    for _ in range(2):
        model(x)
        loss = controller.loss()
    torch.testing.assert_close(loss, 5 * (student.fc(x) - teacher.fc(x)).square().mean())
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [message.rpartition(": ")[2] for message in messages] == ["'mine'", "'theirs'", "'idle'", "'loss'"]


def test_two_outputs_with_one_path_are_refused():
    controller, model = create(Returning((4,), lambda y: {"a.b": y, "a": {"b": 2 * y}}), type="mse")
    model(torch.randn(5, 3, dtype=torch.float64))
    with pytest.raises(ModelError, match=r"have the path 'a\.b'"):
        controller.loss()


def test_outputs_with_other_names_are_paired_by_the_config():
    student = Returning((4,), lambda y: {"logits": y, "auxiliary": -y})
    teacher = Returning((4,), seed=1)
    with pytest.raises(
        ModelError, match=r"returns 'logits' \(5, 4\), 'auxiliary' \(5, 4\).*teacher returns '' \(5, 4\)"
    ):
        controller, model = create(copy.deepcopy(student), teacher=teacher, type="mse")
        model(torch.randn(5, 3, dtype=torch.float64))
        controller.loss()
    controller, model = create(student, teacher=teacher, type="mse", outputs={"logits": "", "auxiliary": ""})
    x = torch.randn(5, 3, dtype=torch.float64)
    model(x)
    own, other = student.fc(x), teacher.fc(x)
    torch.testing.assert_close(controller.loss(), (own - other).square().mean() + (own + other).square().mean())


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"a": ""}, r"the compressed model returns no 'a', but 'logits'"),
        ({"logits": "b"}, r"the teacher returns no 'b', but ''"),
        ({"frozen": ""}, r"'frozen' of the compressed model requires no gradient"),
    ],
)
def test_pairs_that_are_not_there_are_refused(outputs, message):
    student = Returning((4,), lambda y: {"logits": y, "frozen": y.detach()})
    controller, model = create(student, teacher=Returning((4,), seed=1), type="mse", outputs=outputs)
    model(torch.randn(5, 3, dtype=torch.float64))
    with pytest.raises(ModelError, match=message):
        controller.loss()


def test_outputs_that_cannot_learn_are_an_error_and_no_loss_of_zero():
    model = make()
    controller, model = create(model, type="mse")
    model.requires_grad_(False)
    model(images())
    with pytest.raises(ModelError, match=r"finds no output .* requires a gradient"):
        controller.loss()


# Features.


def features_of(model, x, *names):
    found = {}

    def keep(name):
        def hook(module, args, outputs):
            found[name] = outputs.clone()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ["mse", "cosine", "attention"])
def test_features_before_an_activation_in_place_are_those_that_the_layer_returned(kind):
    teacher, x = make(3).eval(), images()
    pair = {"student": ["block1.1", "block2"], "teacher": ["block2.1", "block1"], "type": kind, "scale": 0.5}
    controller, model = create(make(), teacher=teacher, features=[pair])
    torch.manual_seed(0)
    own = features_of(model, x, "block1.1", "block2")
    with torch.no_grad():
        other = features_of(teacher, x, "block2.1", "block1")
    distance = Distance(kind, 0.5, "key")
    expected = [distance(own[a], other[b], "it") for a, b in zip(pair["student"], pair["teacher"], strict=True)]
    torch.testing.assert_close(controller.loss(), sum(expected))
    assert list(distilled(controller)["losses"]) == [f"block1.1 <- block2.1 ({kind})", f"block2 <- block1 ({kind})"]


def test_features_and_outputs_add_up_and_reach_the_layers():
    controller, model = create(make(), SPARSE, type="mse", features=[{"student": "block1", "type": "attention"}])
    model(images())
    loss = controller.loss()
    assert loss.item() == pytest.approx(sum(distilled(controller)["losses"].values()), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, [model.block1[0]._parameters["weight"]])
    assert gradient.abs().sum() > 0


class Twice(nn.Module):
    """Calls one layer twice, another never, and one that returns several tensors."""

    def __init__(self, calls=2):
        super().__init__()
        self.layer, self.idle, self.lstm, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4), calls

    def forward(self, x):
        for _ in range(self.calls):
            x = self.layer(x).tanh()
        return self.lstm(x)[0]


def test_layers_that_are_called_twice_are_compared_call_by_call():
    controller, model = create(Twice(), SPARSE, features=[{"student": "layer"}])
    model(torch.randn(3, 4))
    controller.loss()
    assert list(distilled(controller)["losses"]) == ["layer <- layer (mse), call 1", "layer <- layer (mse), call 2"]
    model(torch.randn(3, 4))
    assert len(controller._recorder.module_outputs["layer"]) == 2


@pytest.mark.parametrize(
    ("feature", "teacher", "message"),
    [
        ({"student": "idle"}, None, "the layer 'idle' of the compressed model was not called"),
        ({"student": "layer", "teacher": "idle"}, None, "the layer 'idle' of the teacher was not called"),
        ({"student": "layer"}, Twice(1), "called 2 times and the teacher's 'layer' 1 times"),
        (
            {"student": "lstm"},
            None,
            r"returns not one tensor, but '0' \(3, 4\), '1.0' \(1, 4\), '1.1' .*; set features.0.output",
        ),
        ({"student": "lstm", "output": "2"}, None, "returns no '2'"),
    ],
)
def test_layers_that_cannot_be_compared_are_refused_by_name(feature, teacher, message):
    controller, model = create(Twice(), teacher=teacher, features=[feature])
    model(torch.randn(3, 4))
    with pytest.raises(ModelError, match=message):
        controller.loss()


def test_one_of_several_tensors_of_a_layer_is_compared():
    controller, model = create(Twice(), SPARSE, features=[{"student": "lstm", "output": "1.0"}])
    model(torch.randn(3, 4))
    assert controller.loss() > 0


def test_a_recomputed_layer_counts_once():
    class Checkpointed(Twice):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False).tanh()

    controller, model = create(Checkpointed(), SPARSE, features=[{"student": "layer"}])
    x = torch.randn(3, 4, requires_grad=True)
    model(x).sum().backward()
    assert len(controller._recorder.module_outputs["layer"]) == 1
    model(x)
    controller.loss().backward()


def test_a_frozen_layer_cannot_learn():
    controller, model = create(make(), features=[{"student": "block1"}])
    model.block1.requires_grad_(False)
    model(images())
    with pytest.raises(ModelError, match="'block1' returned has no graph"):
        controller.loss()


# The schedule.


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("linear", [2, 2, 1.5, 1, 0.5, 0, 0]), ("cosine", [2, 2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0, 0])],
)
def test_the_weight_follows_its_schedule_and_can_end(kind, weights):
    schedule = {"type": kind, "initial": 2.0, "start_epoch": 1, "end_epoch": 5}
    controller, model = create(make(), SPARSE, type="mse", weight_schedule=schedule)
    model.dropout.p = 0.0
    model(images())
    plain = None
    for expected in weights:
        controller.scheduler.epoch_step()
        model(images())
        loss = controller.loss()
        figures = distilled(controller)
        assert figures["weight"] == pytest.approx(expected, abs=1e-12)
        if expected:
            plain = figures["losses"]["output"]
        assert loss.item() == pytest.approx(expected * plain if expected else 0.0, rel=1e-6)
        assert figures["loss"] == pytest.approx(loss.item(), rel=1e-6)


# The batch.


def test_before_a_forward_in_training_mode_there_is_an_error():
    controller, model = create(make(), type="mse")
    model.eval()(images())
    model.train()
    with torch.no_grad():
        model(images())
    with pytest.raises(UsageError, match="needs a forward of the model in training mode"):
        controller.loss()
    assert distilled(controller)["loss"] is None
    assert "none yet" in controller.statistics().to_str()


def test_arguments_and_outputs_that_were_written_to_are_refused():
    controller, model = create(make(), type="mse")
    x = images()
    outputs = model(x)
    x.mul_(2)
    with pytest.raises(UsageError, match=r"an argument of the model, of shape \(4, 3, 8, 8\), has been written to"):
        controller.loss()
    controller.loss(outputs, images())
    model(x).detach().zero_()
    with pytest.raises(UsageError, match=r"an output of the model, of shape \(4, 5\)"):
        controller.loss()
    model(x)
    controller.loss()


# State.


def test_stage_is_that_of_the_others():
    controller, _ = create(make(), type="mse")
    assert controller.compression_stage() == CompressionStage.UNCOMPRESSED
    sparse = {**SPARSE, "sparsity_init": 0.0, "params": {"sparsity_target": 0.5, "sparsity_target_epoch": 1}}
    controller, _ = create(make(), sparse, type="mse")
    assert controller.compression_stage() == CompressionStage.UNCOMPRESSED
    controller.scheduler.epoch_step()
    controller.scheduler.epoch_step()
    assert controller.compression_stage() == CompressionStage.FULLY_COMPRESSED
    assert controller.compression_rate == pytest.approx(0.5, abs=0.01)


def run(model, controller, optimizer, epochs):
    for _ in epochs:
        controller.scheduler.epoch_step()
        for seed in range(2):
            controller.scheduler.step()
            optimizer.zero_grad()
            (F.cross_entropy(model(images(seed=seed)), torch.arange(4)) + controller.loss()).backward()
            optimizer.step()


VALUES = {
    "type": "softmax",
    "temperature": 3.0,
    "features": [{"student": "block*", "type": "attention", "scale": 100.0}],
    "weight_schedule": {"type": "cosine", "end_epoch": 5},
}


@pytest.mark.parametrize("own_teacher", [False, True], ids=["uncompressed model", "registered teacher"])
def test_resuming_ends_in_the_same_bits(own_teacher, tmp_path):
    teacher = make(9) if own_teacher else None

    def start(model, state=None):
        given = {} if state is None or own_teacher else {"uncompressed_model": make()}
        controller, model = create(model, SPARSE, teacher=teacher, state=state, **given, **VALUES)
        return controller, model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    controller, model, optimizer = start(make())
    torch.manual_seed(1)
    run(model, controller, optimizer, range(2))
    state = json.loads(json.dumps(controller.get_compression_state()))
    path = tmp_path / "run.pt"
    save_checkpoint(path, controller, optimizer=optimizer)
    generator = torch.get_rng_state()
    size = path.stat().st_size
    run(model, controller, optimizer, range(2, 4))
    again, resumed, its_optimizer = start(make(4), state)
    load_checkpoint(path, again, optimizer=its_optimizer)
    torch.set_rng_state(generator)
    run(resumed, again, its_optimizer, range(2, 4))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert distilled(again) == distilled(controller)
    assert size < 3 * sum(p.numel() * 4 for p in model.parameters()) + 30_000  # weights, momentum, masks; no teacher


def test_resuming_asks_for_the_teacher_and_says_if_it_is_another(caplog):
    controller, _ = create(make(), SPARSE, type="mse")
    state = controller.get_compression_state()
    with pytest.raises(UsageError, match=r"uncompressed_model=\.\.\.\), or register the teacher.*TeacherArgs"):
        create(make(), SPARSE, state=state, type="mse")
    caplog.clear()
    create(make(3), SPARSE, state=state, uncompressed_model=make(), type="mse")
    assert "teacher" not in caplog.text
    again, _ = create(make(3), SPARSE, state=state, uncompressed_model=make(3), type="mse")
    assert "the teacher has other weights than the one that this training began with" in caplog.text
    assert again.get_compression_state()["algorithms"] == state["algorithms"]


def test_a_damaged_state_is_refused_by_path():
    controller, _ = create(make(), type="mse")
    state = json.loads(json.dumps(controller.get_compression_state()))
    state["algorithms"]["knowledge_distillation"]["state"]["weight"] = -1
    with pytest.raises(StateError, match=r"knowledge_distillation.state.weight"):
        create(make(), state=state, uncompressed_model=make(), type="mse")


def test_copies_of_model_and_controller_learn_for_themselves():
    controller, model = create(make(), SPARSE, **VALUES)
    model(images())
    twin, its_model = copy.deepcopy((controller, model))
    assert twin.context.teacher is controller.context.teacher
    with pytest.raises(UsageError, match="needs a forward"):
        twin.loss()
    its_model(images() * 2)
    assert not torch.equal(twin.loss(), controller.loss())
    unpickled = pickle.loads(pickle.dumps(model))
    unpickled(images())
    file = io.BytesIO()
    torch.save(model, file)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in controller.strip().modules())
    controller.strip(do_copy=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
