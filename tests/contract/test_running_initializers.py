"""Shared initializers run in order, again, and all or nothing."""

import json

import pytest
import torch

from compress_core import (
    ConfigError,
    InitArgs,
    Initializer,
    InitializerConfig,
    Phase,
    Plan,
    TableStatistics,
    UsageError,
    create_compressed_model,
    hookimpl,
)
from compress_core.registry import use_registry
from compress_core.transforms import raw_parameter
from tests.contract.algorithms import Base, fresh, images, net, sections


class Counting(Initializer):
    name = "counting"
    Config = InitializerConfig
    struct = InitArgs

    def __init__(self, config, paths):
        super().__init__(config, paths)
        self.sizes = []

    @hookimpl
    def compress_initialize(self, model, context):
        data = context.calibration_data(self.paths[0], InitArgs)
        self.sizes.append(sum(size for _, size in data.batches(100)))
        if len(self.sizes) == 3:
            model[0].weight.data.zero_()
            raise RuntimeError("third time")

    def statistics(self):
        return TableStatistics({"sizes": list(self.sizes)})


def test_shared_initializer_runs_again_with_other_data_all_or_nothing():
    config = {"compression": {"algorithm": "magnitude_sparsity", "initializer": {"counting": {}}}}
    with use_registry(fresh(compress_initializers=lambda self: [Counting])):
        controller, model = create_compressed_model(net(), config, init_loader=[images()])
    assert controller.statistics().counting.to_dict() == {"sizes": [8]}
    assert controller.initialize("counting", loader=[images(), images(3)]).to_dict() == {"sizes": [8, 11]}
    before = raw_parameter(model, "0.weight").clone()
    with pytest.raises(RuntimeError, match="third time") as raised:
        controller.initialize("counting")
    assert torch.equal(raw_parameter(model, "0.weight"), before)
    assert any("run_again() of 'counting'" in note for note in raised.value.__notes__)
    with pytest.raises(UsageError, match="takes no options, got speed"):
        controller.initialize("counting", speed=2)
    with pytest.raises(UsageError, match="there is no initializer 'other' in this config"):
        controller.initialize("other")


@pytest.mark.parametrize("method", ["check", "statistics", "load_state"])
def test_errors_of_every_method_of_an_initializer_are_attributed(method):
    class Failing(Counting):
        name = "failing"

    def fail(self, *args):
        raise ValueError("no")

    setattr(Failing, method, fail)
    config = {"compression": {"algorithm": "magnitude_sparsity", "initializer": {"failing": {}}}}
    with use_registry(fresh(compress_initializers=lambda self: [Failing])), pytest.raises(ValueError) as raised:
        controller, _ = create_compressed_model(net(), config, init_loader=[images()])
        controller.statistics()
        state = {**json.loads(json.dumps(_state_without(controller))), "initializers": {}}
        create_compressed_model(net(), config, state)
    assert any(f"{method}() of 'failing', test hooks" in note for note in raised.value.__notes__)


def _state_without(controller):
    controller._lifecycle.initializers.pop("failing")
    return controller.get_compression_state()


def test_what_changes_weights_comes_before_what_measures_statistics():
    order = []

    def initializer(name, phase):
        def compress_initialize(self):
            order.append(name)

        members = {"name": name, "Config": InitializerConfig, "compress_initialize": hookimpl(compress_initialize)}
        return type(name.title(), (Initializer,), members | ({} if phase is None else {"phase": phase}))

    classes = [initializer("a", Phase.STATISTICS), initializer("z", None), initializer("b", Phase.WEIGHTS)]
    section = {"algorithm": "magnitude_sparsity", "initializer": {"a": {}, "b": {}, "z": {}}}
    with use_registry(fresh(compress_initializers=lambda self: classes)):
        create_compressed_model(net(), {"compression": section})
    assert order == ["b", "z", "a"]


def test_plan_without_a_target_tells_why():
    class Picky(Base):
        name = "picky"

        @hookimpl
        def compress_plan(self):
            return Plan((), {"0.weight": "is no matrix"})

    with (
        use_registry(fresh(Picky)),
        pytest.raises(ConfigError, match=r"picky: finds nothing to compress.*1 left alone: '0\.weight' is no matrix"),
    ):
        create_compressed_model(net(), sections("picky"))


class Doubling(Counting):
    """A third party's initializer that writes to the model's own weights, and says so."""

    name = "doubling"
    phase = Phase.WEIGHTS
    changes_in_place = True

    @hookimpl
    def compress_initialize(self, model):
        with torch.no_grad():
            raw_parameter(model, "0.weight").mul_(2)


class Comparing(Counting):
    name = "comparing"
    phase = Phase.STATISTICS
    needs_uncompressed = "creation"
    seen: tuple = ()

    @hookimpl
    def compress_initialize(self, model, context):
        with context.uncompressed() as uncompressed:
            Comparing.seen = (uncompressed is model, uncompressed[0].weight.detach().clone())


@pytest.mark.parametrize("in_place", [True, False])
def test_initializers_that_change_weights_in_place_leave_the_uncompressed_model_as_it_was(in_place):
    doubling = Doubling if in_place else type("Idle", (Counting,), {"name": "doubling"})
    model = net()
    before = model[0].weight.detach().clone()
    config = {"compression": {"algorithm": "magnitude_sparsity", "initializer": {"doubling": {}, "comparing": {}}}}
    with use_registry(fresh(compress_initializers=lambda self: [doubling, Comparing])):
        create_compressed_model(model, config, init_loader=[images()])
    is_the_model, weight = Comparing.seen
    assert is_the_model == (not in_place)
    assert torch.equal(weight, before)
    assert torch.equal(raw_parameter(model, "0.weight"), 2 * before if in_place else before)


def test_batch_norm_is_paired_with_the_uncompressed_model_although_weights_were_changed_in_place():
    """What the pairing finds is the change of the weight: doubled weights, doubled means and fourfold variances."""
    model = net()
    with torch.no_grad():
        model[0].bias.zero_()
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    mean, variance = model[1].running_mean.clone(), model[1].running_var.clone()
    initializer = {"doubling": {}, "batchnorm_adaptation": {"num_bn_adaptation_samples": 64}}
    params = {"sparsity_target": 0.5}
    section = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.0, "params": params, "initializer": initializer}
    with use_registry(fresh(compress_initializers=lambda self: [Doubling])):
        create_compressed_model(model.eval(), {"compression": section}, init_loader=[images(64)])
    torch.testing.assert_close(model[1].running_mean, 2 * mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model[1].running_var, 4 * variance, rtol=1e-2, atol=1e-3)
