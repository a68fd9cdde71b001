"""What algorithms are given: data, weights, the uncompressed model, the batch, factors on gradients, news of channels."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from compress_core import (
    CompressionStage,
    ConfigError,
    InitArgs,
    Plan,
    PluginError,
    Stage,
    UsageError,
    create_compressed_model,
    hookimpl,
    mask_weight,
    register_default_init_args,
)
from compress_core.config import CompressionConfig
from compress_core.contract.context import Context
from compress_core.registry import use_registry
from compress_core.transforms import add_weight_transform, raw_parameter, scaled_gradient
from tests.contract.algorithms import Base, Replacing, fresh, images, net, pruned, sections


@pytest.mark.parametrize("register", [register_default_init_args, None], ids=["default args", "InitArgs"])
def test_calibration_as_the_hook_shows_it_gets_any_registered_data(register):
    seen = []

    class Calibrated(Base):
        @hookimpl
        def compress_calibrate(self, model, context):
            path, _ = context.section(self)
            data = context.calibration_data(path)
            for batch, size in data.batches(16):
                seen.append(size)
                data.call(model, batch)

    loader = [(images(), torch.zeros(8))] * 3
    with use_registry(fresh(Calibrated)):
        from compress_core import CompressionConfig

        config = CompressionConfig.from_dict(sections("base"))
        config = register(config, loader) if register else config.register_extra_structs([InitArgs(loader)])
        create_compressed_model(net(), config)
    assert seen == [8, 8]


def test_weights_as_earlier_stages_have_left_them():
    seen = {}

    class Looking(Base):
        name = "looking"
        stage = Stage.PRECISION

        @hookimpl
        def compress_commit(self, model, plan, context):
            for name in plan.targets:
                seen[name] = context.weight(model, name).clone()
                seen[f"{name} before sparsity"] = context.weight(model, name, before=Stage.SPARSITY).clone()
                mask_weight(model, name, torch.zeros(()), key=self.name, stage=self.stage)

    with use_registry(fresh(Looking, Base)):
        _, model = create_compressed_model(net(), sections("looking", "base"))
    raw = raw_parameter(model, "4.weight")
    assert torch.equal(seen["4.weight"], raw * (torch.arange(raw.numel()) % 2).reshape(raw.shape))
    assert torch.equal(seen["4.weight before sparsity"], raw)
    assert not model[4].weight.any()


class Teaching(Base):
    name = "teaching"
    needs_uncompressed = "training"
    needs_batch = True

    @hookimpl
    def compress_loss(self, batch, context):
        with torch.no_grad():
            wanted = context.teacher(*batch.args, **batch.kwargs)
        return (batch.outputs - wanted).square().mean()


def test_teacher_is_the_uncompressed_model_and_belongs_to_nobody_else():
    x, plain = images(), net()
    wanted = plain.eval()(x)
    with use_registry(fresh(Teaching)):
        controller, model = create_compressed_model(plain.train(), sections("teaching"))
    teacher = controller.context.teacher
    assert torch.equal(teacher(x), wanted) and not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(teacher is not module for module in model.modules())
    assert not any("teacher" in name for name in model.state_dict())
    with pytest.raises(UsageError, match="the loss of 'teaching' needs a forward of the model in training mode"):
        controller.loss()
    outputs = model(x)
    expected = (outputs - wanted).square().mean()
    assert torch.equal(controller.loss(), expected) and controller.loss().requires_grad
    assert torch.equal(controller.loss(outputs * 2, x), (2 * outputs - wanted).square().mean())
    model.eval()(x * 3)
    assert torch.equal(controller.loss(), expected)  # a forward in eval mode does not count


def test_teacher_has_to_be_given_when_a_state_is_resumed():
    with use_registry(fresh(Teaching)):
        controller, _ = create_compressed_model(net(), sections("teaching"))
        state = controller.get_compression_state()
        with pytest.raises(UsageError, match=r"teaching: needs the uncompressed model.*uncompressed_model="):
            create_compressed_model(net(), sections("teaching"), state)
        teacher = net()
        again, _ = create_compressed_model(
            nn.Sequential(*net()), sections("teaching"), state, uncompressed_model=teacher
        )
        assert torch.equal(again.context.teacher(images()), teacher.eval()(images()))
        assert all(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_batch_of_a_compiled_model_is_recorded(way):
    with use_registry(fresh(Teaching)):
        controller, model = create_compressed_model(net(), sections("teaching"))
    called = torch.compile(model, fullgraph=True, backend="eager") if way == "compiled" else model
    for count in (2, 3):
        outputs = called(images(count))
        with torch.no_grad():
            wanted = controller.context.teacher(images(count))
        assert torch.allclose(controller.loss(), (outputs - wanted).square().mean())


def test_recorder_is_in_no_copy_and_gone_after_strip():
    import copy
    import pickle

    with use_registry(fresh(Teaching)):
        controller, model = create_compressed_model(net(), sections("teaching"))
    model(images())
    twin = copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))
    twin(images() * 5)
    assert torch.equal(controller._recorder.batch.args[0], images())
    assert not controller.strip()._forward_hooks


def test_view_of_the_uncompressed_model_during_creation():
    x, seen = images(), {}

    class Viewing(Base):
        name = "viewing"
        needs_uncompressed = "creation"

        @hookimpl
        def compress_calibrate(self, model, context):
            with context.uncompressed() as plain, torch.no_grad():
                seen[self.name] = plain.eval()(x)
                seen["same object"] = plain is model

    class Undeclared(Viewing):
        name = "undeclared"
        needs_uncompressed = "no"

    with use_registry(fresh(Viewing, Replacing, Undeclared)):
        wanted = net().eval()(x)
        create_compressed_model(net(), sections("viewing"))
        assert torch.equal(seen["viewing"], wanted) and seen["same object"]
        controller, _ = create_compressed_model(net(), sections("viewing", "replacing"))
        assert torch.equal(seen["viewing"], wanted) and not seen["same object"]
        with pytest.raises(PluginError, match="while the model is being created"), controller.context.uncompressed():
            pass
        with pytest.raises(PluginError, match=r"no algorithm declares.*needs_uncompressed = 'creation'"):
            create_compressed_model(net(), sections("undeclared"))


@pytest.mark.parametrize("loss", [torch.ones(3), torch.tensor(1)], ids=["vector", "whole number"])
def test_loss_that_is_no_scalar_is_refused_by_name(loss):
    class Odd(Base):
        name = "odd"

        @hookimpl
        def compress_loss(self):
            return loss

    with use_registry(fresh(Odd)):
        controller, _ = create_compressed_model(net(), sections("odd"))
    with pytest.raises(PluginError, match=r"compress_loss\(\) of the algorithm 'odd'.*not a floating-point scalar"):
        controller.loss()


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return weight * self.factor


class Learning(Base):
    name = "learning"

    @hookimpl
    def compress_commit(self, model, plan):
        for name in plan.targets:
            add_weight_transform(model, name, Learned(), stage=self.stage, key=self.name)


class LearnedSlowly(Learned):
    def forward(self, weight):
        return weight * scaled_gradient(self.factor, self.lr_multiplier)

    lr_multiplier = 1.0


class Applying(Learning):
    name = "applying"
    applies_lr_multiplier = True

    @hookimpl
    def compress_commit(self, model, plan):
        for name in plan.targets:
            add_weight_transform(model, name, LearnedSlowly(), stage=self.stage, key=self.name)


def test_factor_on_gradients_reaches_a_third_party_or_is_refused():

    with use_registry(fresh(Learning, Applying)):
        create_compressed_model(net(), sections("learning"))
        config = {**sections("learning"), "compression_lr_multiplier": 0.5}
        with pytest.raises(ConfigError, match="compression_lr_multiplier: 'learning' learns something"):
            create_compressed_model(net(), config)
        models = [
            create_compressed_model(net(), {**sections("applying"), **root})[1]
            for root in ({}, {"compression_lr_multiplier": 0.5})
        ]
    for model in models:
        model(images()).square().sum().backward()
    gradients = [{n: p.grad for n, p in model.named_parameters()} for model in models]
    for name, gradient in gradients[0].items():
        factor = 0.5 if "transforms" in name else 1.0
        torch.testing.assert_close(gradients[1][name], factor * gradient)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(models[1])))
    twin.zero_grad()
    twin(images()).square().sum().backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[1][name])


def test_a_factor_that_nothing_learns_with_is_warned_about(caplog):
    # Masks learn nothing: the factor is for others in the document, if there are any.
    create_compressed_model(net(), {**sections("magnitude_sparsity"), "compression_lr_multiplier": 0.5})
    assert "config: compression_lr_multiplier can have no effect" in caplog.text
    caplog.clear()
    data = {"init_loader": [images()]}
    both = {**sections("magnitude_sparsity", "quantization"), "compression_lr_multiplier": 0.5}
    create_compressed_model(net(), both, **data)
    create_compressed_model(net(), {**sections("magnitude_sparsity"), "compression_lr_multiplier": 1.0})
    assert "can have no effect" not in caplog.text
    both["compression"][1]["compression_lr_multiplier"] = 2.0
    create_compressed_model(net(), both, **data)
    assert "config: compression_lr_multiplier can have no effect" in caplog.text  # the section has its own


class Penalty(Base):
    name = "penalty"
    changes_model = False

    @hookimpl
    def compress_plan(self):
        return Plan(())

    @hookimpl
    def compress_commit(self):
        pass

    @hookimpl
    def compress_loss(self, model):
        return raw_parameter(model, "4.weight").abs().sum()


def test_an_algorithm_that_adds_a_loss_alone_has_no_part_in_the_stage():
    with use_registry(fresh(Penalty, Base)):
        controller, _ = create_compressed_model(net(), sections("penalty"))
        assert controller.compression_stage() == CompressionStage.UNCOMPRESSED
        controller, _ = create_compressed_model(net(), sections("penalty", "base"))
        assert controller.compression_stage() == CompressionStage.FULLY_COMPRESSED
        config = {**sections("penalty"), "compression": [{"algorithm": "penalty"}, {"algorithm": "magnitude_sparsity"}]}
        controller, _ = create_compressed_model(net(), config)
        assert controller.compression_stage() == CompressionStage.UNCOMPRESSED
        state = json.loads(json.dumps(controller.get_compression_state()))
        create_compressed_model(net(), config, state)


def test_an_algorithm_that_changes_nothing_may_not_change_anything():
    class Planning(Penalty):
        name = "planning"

        @hookimpl
        def compress_plan(self):
            return Plan(("4.weight",))

    class Masking(Penalty):
        name = "masking"

        @hookimpl
        def compress_commit(self, model):
            mask_weight(model, "4.weight", torch.zeros(()), key=self.name)

    with use_registry(fresh(Planning, Masking)):
        with pytest.raises(PluginError, match=r"'planning'.*returned targets, such as '4.weight'"):
            create_compressed_model(net(), sections("planning"))
        model = net()
        with pytest.raises(PluginError, match=r"'masking'.*has added a transform at '4.*changes_model = False"):
            create_compressed_model(model, sections("masking"))
        assert type(model[4]) is nn.Linear


class Recording(Penalty):
    name = "recording"
    needs_batch = True
    seen = None

    @hookimpl
    def compress_commit(self, model, context):
        context.record_outputs(model, ["0", "2"])

    @hookimpl
    def compress_loss(self, batch):
        Recording.seen = batch.module_outputs
        return batch.module_outputs["2"][0].sum()


def test_outputs_of_modules_are_recorded_as_they_were_returned():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = net()
            self.layers[2].inplace = True

        def forward(self, x):
            return self.layers(x)

    class Below(Recording):
        @hookimpl
        def compress_commit(self, model, context):
            context.record_outputs(model, ["layers.1", "layers.1", "layers.2"])

        @hookimpl
        def compress_loss(self, batch):
            Recording.seen = batch.module_outputs
            return batch.module_outputs["layers.1"][0].sum()

    with use_registry(fresh(Below)):
        controller, model = create_compressed_model(InPlace(), sections("recording"))
    outputs = model(images())
    assert controller.loss().requires_grad
    normalized, activated = Recording.seen["layers.1"][0], Recording.seen["layers.2"][0]
    assert len(Recording.seen["layers.1"]) == 1
    assert normalized.min() < 0 and torch.equal(normalized.relu(), activated)
    model.eval()(images() * 2)
    controller.loss(outputs, images())
    assert torch.equal(Recording.seen["layers.1"][0], normalized)  # of the last forward in training mode


def test_outputs_of_modules_that_are_replaced_are_those_of_the_new_ones():
    class OfFour(Recording):
        stage = Stage.PRECISION

        @hookimpl
        def compress_commit(self, model, context):
            context.record_outputs(model, ["4", "4.0"])

        @hookimpl
        def compress_loss(self, batch):
            return batch.module_outputs["4"][0].sum() + batch.module_outputs["4.0"][0].sum()

    with use_registry(fresh(OfFour, Replacing)):
        controller, model = create_compressed_model(net(), sections("recording", "replacing"))
        outputs = model(images())
        assert torch.allclose(controller.loss(), outputs.sum() + model[4][0](model[:4](images())).sum(), rtol=1e-4)

    class Careless(Recording):
        name = "careless"
        needs_batch = False

    with use_registry(fresh(Recording, Careless)):
        with pytest.raises(PluginError, match=r"record_outputs\(\) for '0', and none declares needs_batch"):
            create_compressed_model(net(), sections("careless"))
        model = nn.Sequential(nn.Linear(3, 3))
        with pytest.raises(PluginError, match=r"the model has no module '2'"):
            create_compressed_model(model, sections("recording"))
        assert not model._forward_hooks and not model._forward_pre_hooks


def test_algorithms_are_told_that_channels_are_gone():
    told = []

    class Told(Base):
        name = "told"

        @hookimpl
        def compress_shrunk(self, model, shrinkage):
            told.append((model is self.model, tuple(model[0].weight.shape), dict(shrinkage.kept["0.weight"])))

    config = sections("told", "filter_pruning")
    pruned(config)["compression"][1]["pruning_init"] = 0.5
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with use_registry(fresh(Told)):
        controller, _ = create_compressed_model(model, config)
        controller.strip()
        controller.shrink()
        assert [entry[:2] for entry in told] == [(False, (4, 3, 3, 3)), (True, (4, 3, 3, 3))]
        assert told[0][2] == told[1][2] and len(told[0][2][0]) == 4
        twin = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        create_compressed_model(twin, config, json.loads(json.dumps(controller.get_compression_state())))
        assert told[2] == told[1]


def test_exports_keep_what_a_rewrite_notes_and_name_whose_rewrite_fails(tmp_path):
    onnx = pytest.importorskip("onnx")

    class Noting(Base):
        name = "noting"
        fails = False

        @hookimpl
        def compress_export(self, model):
            def rewrite(graph):
                if type(self).fails:
                    raise ValueError("no")
                graph.metadata_props["mine"] = "kept"
                graph.graph.node(0).metadata_props["mine"] = "kept"

            return rewrite

    with use_registry(fresh(Noting)):
        controller, _ = create_compressed_model(net(), sections("noting"))
        controller.export_onnx(tmp_path / "a.onnx")
        found = onnx.load(tmp_path / "a.onnx")
        assert {prop.key: prop.value for prop in found.metadata_props}["mine"] == "kept"
        assert [prop.value for prop in found.graph.node[0].metadata_props] == ["kept"]
        Noting.fails = True
        with pytest.raises(ValueError) as raised:
            controller.export_onnx(tmp_path / "b.onnx")
    assert any("'noting'" in note for note in raised.value.__notes__)


def test_a_loader_is_read_once_in_a_creation_and_nothing_of_it_is_kept_afterwards():
    class Counting:
        reads = 0

        def __iter__(self):
            Counting.reads += 1
            return iter([(torch.zeros(2, 3), 0)])

    context = Context(CompressionConfig.from_dict({}), init_loader=Counting())
    assert context.example("a") is context.example("b")
    assert Counting.reads == 1
    assert context.take_example() is not None
    assert context.example("export") is not context.example("export")
    assert Counting.reads == 3
    assert context.take_example() is None
