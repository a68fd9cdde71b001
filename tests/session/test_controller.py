import copy
import json
import logging

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from compress_core import (
    CompressionError,
    CompressionStage,
    ConfigError,
    ModelError,
    Plan,
    PluginError,
    Stage,
    StateError,
    create_compressed_model,
    hookimpl,
    mask_weight,
)
from compress_core.session.scheduler import CompressionScheduler
from compress_core.transforms import raw_parameter
from tests.plugin_helpers import algorithm, contributing
from tests.zoo import ResidualNet, images

SPARSE = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}


def create(model=None, sections=SPARSE, **keywords):
    return create_compressed_model(model or ResidualNet(), {"compression": sections}, **keywords)


def masking(**members):
    """An algorithm of a third party that masks every second weight."""

    def commit(self, model, plan):
        for name in plan.targets:
            weight = raw_parameter(model, name)
            mask_weight(model, name, (torch.arange(weight.numel()) % 2).view(weight.shape), key=self.name)

    defaults = {
        "compress_plan": hookimpl(lambda self, model, context: context.plan_weights(model, self)),
        "compress_commit": hookimpl(commit),
    }
    return algorithm(**{**defaults, **members})


def test_loss_is_the_sum_of_what_algorithms_add_and_can_be_differentiated(registry):
    def loss(self, model):
        return model.fc.weight.square().sum()

    registry.register(contributing(masking(stage=Stage.SPARSITY, compress_loss=hookimpl(loss))), "demo")
    controller, model = create(sections=[SPARSE, {"algorithm": "mine"}])
    total = controller.loss()
    assert total.shape == ()
    assert total.item() == pytest.approx(model.fc.weight.square().sum().item())
    total.backward()
    assert raw_parameter(model, "fc.weight").grad.any()
    assert create()[0].loss().item() == 0


def test_two_algorithms_share_a_weight(registry):
    registry.register(contributing(masking()), "demo")
    results = []
    for sections in ([SPARSE, {"algorithm": "mine"}], [{"algorithm": "mine"}, SPARSE]):
        torch.manual_seed(0)
        controller, model = create(sections=sections)
        results.append(model.conv1.weight.detach())
        assert set(dict(model.conv1.weight_transforms["weight"].named_children())) == {"mine", "magnitude_sparsity"}
        plain = controller.strip()
        model.eval(), plain.eval()
        assert torch.equal(plain(images()), model(images()))
    assert torch.equal(results[0], results[1])


def test_stage_is_combined(registry):
    stages = [CompressionStage.UNCOMPRESSED]
    registry.register(contributing(masking(compress_stage=hookimpl(lambda self: stages[0]))), "demo")
    controller, _ = create(sections=[SPARSE, {"algorithm": "mine"}])
    assert controller.compression_stage() is CompressionStage.PARTIALLY_COMPRESSED
    stages[0] = CompressionStage.FULLY_COMPRESSED
    assert controller.compression_stage() is CompressionStage.FULLY_COMPRESSED


def test_compression_rate_of_several_algorithms(registry):
    registry.register(contributing(masking(compression_rate=property(lambda self: 0.5))), "demo")
    controller, _ = create(sections=[SPARSE, {"algorithm": "mine"}])
    assert controller.compression_rate == pytest.approx(
        1 - 0.5 * (1 - controller.algorithms["magnitude_sparsity"].sparsity_level)
    )
    controller.compression_rate = 0.2  # only one of them can be set
    assert controller.sparsity_level == pytest.approx(0.2, abs=1e-3)
    with pytest.raises(CompressionError, match="no algorithm would take it"):
        create_compressed_model(ResidualNet(), {})[0].compression_rate = 0.5


def test_members_of_algorithms_are_offered_and_ambiguity_is_said(registry):
    members = {"controller_api": ("freeze",), "freeze": lambda self: "mine"}
    registry.register(contributing(masking(**members)), "demo")
    controller, _ = create(sections=[SPARSE, {"algorithm": "mine"}])
    assert controller.target_level == 0.5
    with pytest.raises(AttributeError, match="'freeze' is offered by algorithms"):
        controller.freeze()
    with pytest.raises(AttributeError, match=r"the controller has no 'frezze'; its algorithms offer \["):
        controller.frezze()


def test_scheduler_counts_like_nncfs():
    seen = []
    scheduler = CompressionScheduler(
        lambda c: seen.append(("step", c.step, c.step_in_epoch)),
        lambda c: seen.append(("epoch", c.epoch, c.steps_per_epoch)),
    )
    assert (scheduler.current_epoch, scheduler.current_step) == (-1, -1)
    for _ in range(2):
        scheduler.epoch_step()
        for _ in range(2):
            scheduler.step()
    scheduler.epoch_step(7)
    assert seen == [
        ("epoch", 0, None), ("step", 0, 0), ("step", 1, 1),
        ("epoch", 1, 2), ("step", 2, 0), ("step", 3, 1), ("epoch", 7, 2),
    ]  # fmt: skip
    other = CompressionScheduler(lambda c: None, lambda c: None)
    other.load_state(json.loads(json.dumps(scheduler.get_state())))
    assert other.clock == scheduler.clock
    with pytest.raises(StateError, match=r"^scheduler\.epoc"):
        other.load_state({"epoc": 3})


def test_statistics_have_a_part_for_each_algorithm():
    statistics = create()[0].statistics()
    assert statistics.magnitude_sparsity.sparsity_level == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(AttributeError, match="no statistics of 'quantization'; there are"):
        _ = statistics.quantization
    assert copy.copy(statistics).parts.keys() == statistics.parts.keys()


def test_strip_in_place_and_again():
    controller, model = create()
    x = images()
    model.eval()
    expected = model(x)
    assert controller.strip(do_copy=False) is model
    assert type(model.conv1) is nn.Conv2d
    assert torch.equal(model(x), expected)
    create_compressed_model(model, {"compression": SPARSE})


def test_same_model_twice_is_an_error():
    _, model = create()
    with pytest.raises(ModelError, match=r"compressed already.*strip\(\)"):
        create(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DataParallel(ResidualNet()),
            r"wrapped in DataParallel, .*create_compressed_model\(model.module, \.\.\.\) and train with one process for each GPU",
        ),
        (lambda: "resnet18", r"model must be a torch\.nn\.Module, got str"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "lazy and not initialized.*one forward pass"),
        (lambda: ResidualNet().to("meta"), "on the meta device"),
    ],
)
def test_models_that_cannot_be_compressed(make, message):
    with pytest.raises(ModelError, match=message):
        create_compressed_model(make(), {"compression": SPARSE})


def test_state_that_does_not_fit_is_refused_and_nothing_changes(registry):
    controller, _ = create()
    state = controller.get_compression_state()
    cases = [
        ("anything", "is not what controller.get_compression_state"),
        ({**state, "format": 99}, "compression_state.format is 99, this version reads 1"),
        (_with(state, "wavelets"), r"needs the algorithm 'wavelets' of plugin 'w' \(pkg 2.0\), which is not installed"),
    ]
    for bad, message in cases:
        model = ResidualNet()
        with pytest.raises(StateError, match=message):
            create(model, compression_state=bad)
        assert type(model.conv1) is nn.Conv2d
    with pytest.raises(
        StateError, match="does not fit this model: 'magnitude_sparsity' was made for 3 targets and finds 2"
    ):
        create(sections={**SPARSE, "ignored_scopes": ["fc"]}, compression_state=state)
    registry.register(contributing(masking()), "demo")
    with pytest.raises(
        StateError,
        match=r"of the algorithms \['magnitude_sparsity'\], the config names \['magnitude_sparsity', 'mine'\]",
    ):
        create(sections=[SPARSE, {"algorithm": "mine"}], compression_state=state)


def _with(state, name):
    entry = {"plugin": "w", "distribution": "pkg", "version": "2.0"}
    return {**state, "algorithms": {**state["algorithms"], name: entry}}


def replacing():
    """An algorithm of a third party that puts a new layer in the place of the last."""

    def commit(self, model):
        model.fc = nn.Linear(model.fc.in_features, model.fc.out_features)

    return algorithm(
        stage=Stage.STRUCTURE,
        replaces_modules=True,
        compress_plan=hookimpl(lambda self: Plan(("fc.weight",))),
        compress_commit=hookimpl(commit),
    )


def test_replaced_modules_are_resumed_with_what_later_algorithms_put_on_them(registry):
    registry.register(contributing(replacing()), "demo")
    sections = [{"algorithm": "mine"}, SPARSE]
    controller, model = create(sections=sections)
    state = json.loads(json.dumps(controller.get_compression_state()))
    _, resumed = create(sections=sections, compression_state=state)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed.eval()(images()), model.eval()(images()))
    assert float((resumed.fc.weight == 0).float().mean()) > 0.1


@pytest.mark.parametrize(
    ("path", "full"),
    [
        ("", "compression.1.mine"),
        ("params.level", "compression.1.mine.params.level"),
        ("compression.1.mine.params.level", "compression.1.mine.params.level"),
        ("input_info.type", "input_info.type"),
        ("ignored_scopes.0", "ignored_scopes.0"),
        ("target_scopes", "target_scopes"),
    ],
)
def test_a_problem_that_planning_finds_has_its_full_config_path(registry, path, full):
    def plan(self):
        raise ConfigError("cannot be met", path=path)

    registry.register(contributing(masking(stage=Stage.SPARSITY, compress_plan=hookimpl(plan))), "demo")
    with pytest.raises(ConfigError, match="cannot be met") as caught:
        create(sections=[SPARSE, {"algorithm": "mine"}])
    assert [problem.path for problem in caught.value.problems] == [full]


def test_resuming_with_another_config_says_what_changed(caplog):
    state = create()[0].get_compression_state()
    with caplog.at_level(logging.WARNING):
        create(sections={**SPARSE, "params": {"sparsity_target": 0.9}}, compression_state=state)
    assert "resumed with another config than the state's; changed: ['params']" in caplog.text


def test_state_that_is_not_json_names_the_algorithm(registry):
    registry.register(contributing(masking(compress_state=hookimpl(lambda self: {"x": torch.ones(1)}))), "demo")
    controller, _ = create(sections={"algorithm": "mine"})
    with pytest.raises(PluginError, match=r"state of the algorithm 'mine' is not JSON-able.*keep tensors"):
        controller.get_compression_state()


def test_random_numbers_are_where_they_were():
    def states():
        import random

        import numpy as np

        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    class Loader:
        def __iter__(self):
            import random

            import numpy as np

            for _ in range(3):
                yield torch.randn(4, 3, 8, 8) + random.random() + np.random.rand()

    model, before = ResidualNet(), states()
    section = {**SPARSE, "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 12}}}
    create(model, section, init_loader=Loader())
    assert states() == before
