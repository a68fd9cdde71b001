"""What algorithms are given: data, weights, the uncompressed model, the batch, factors on gradients, news of channels."""

import json

import pytest
import torch
from torch import nn

from compress_core import (
    ConfigError,
    InitArgs,
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
from compress_core.transforms import add_weight_transform, raw_parameter
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


def test_factor_on_gradients_reaches_a_third_party_or_is_refused():
    class Applying(Learning):
        name = "applying"
        applies_lr_multiplier = True
        factor = None

        @hookimpl
        def compress_calibrate(self, context):
            self.factor = context.lr_multiplier(self)

    with use_registry(fresh(Learning, Applying)):
        create_compressed_model(net(), sections("learning"))
        config = {**sections("learning"), "compression_lr_multiplier": 0.5}
        with pytest.raises(ConfigError, match="compression_lr_multiplier: 'learning' learns something"):
            create_compressed_model(net(), config)
        controller, _ = create_compressed_model(net(), {**sections("applying"), "compression_lr_multiplier": 0.5})
        assert controller.algorithms["applying"].factor == 0.5
        # Masks learn nothing: the factor is for others in the document.
        create_compressed_model(net(), {**sections("magnitude_sparsity"), "compression_lr_multiplier": 0.5})


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
