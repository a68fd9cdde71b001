"""Algorithms plan and commit stage by stage."""

import json

import pytest
import torch
from torch import nn

from compress_core import (
    CompressionStage,
    Plan,
    PluginError,
    Stage,
    create_compressed_model,
    hookimpl,
)
from compress_core.registry import use_registry
from tests.contract.algorithms import Base, Replacing, fresh, images, net, pruned, sections


def test_later_algorithms_plan_on_replaced_modules():
    with use_registry(fresh(Replacing, Base)):
        controller, model = create_compressed_model(net(), pruned(sections("filter_pruning", "base", "replacing")))
        assert list(controller.algorithms) == ["replacing", "filter_pruning", "base"]
        assert controller._lifecycle.plans["base"].targets == ("0.weight", "4.0.weight", "4.1.weight")
        config = pruned(sections("quantization", "magnitude_sparsity", "filter_pruning", "replacing"))
        controller, model = create_compressed_model(net(), config)
        state, weights = json.loads(json.dumps(controller.get_compression_state())), model.state_dict()
        _, twin = create_compressed_model(net(), config, state)
        twin.load_state_dict(weights)
        assert torch.equal(model.eval()(images()), twin.eval()(images()))
        assert torch.allclose(controller.strip()(images()), model(images()), atol=1e-5)


@pytest.mark.parametrize("declared", [True, False])
def test_whoever_throws_away_what_others_have_added_is_refused(declared):
    class Late(Replacing):
        name = "late"
        stage = Stage.PRECISION
        replaces_modules = declared
        changes_in_place = True

    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (
        use_registry(fresh(Late)),
        pytest.raises(PluginError, match=r"compress_commit\(\) of the algorithm 'late'.*thrown away 1 transforms"),
    ):
        create_compressed_model(model, sections("magnitude_sparsity", "late"))
    assert type(model[4]) is nn.Linear
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_writing_without_saying_so_names_the_algorithm():
    class Writer(Base):
        name = "writer"

        @hookimpl
        def compress_commit(self, model, plan):
            model[0].weight.data.mul_(2)

    with (
        use_registry(fresh(Writer)),
        pytest.raises(PluginError, match=r"of the algorithm 'writer' .*has written to.*0\.weight"),
    ):
        create_compressed_model(net(), sections("writer"))


def test_plan_that_is_no_json_is_refused_by_name():
    class Odd(Base):
        name = "odd"

        @hookimpl
        def compress_plan(self, model):
            return Plan(("0.weight",), details={"scores": torch.ones(2)})

    with use_registry(fresh(Odd)), pytest.raises(PluginError, match=r"compress_plan\(\) of the algorithm 'odd'.*JSON"):
        create_compressed_model(net(), sections("odd"))


def test_stages_are_added_by_meaning():
    none, part, full = CompressionStage
    assert none + full is part and full + full is full and none + none is none and full + part is part


def test_stages_by_algorithm():
    config = {"compression": [{"algorithm": "magnitude_sparsity"}, {"algorithm": "quantization"}]}
    controller, _ = create_compressed_model(net(), config, init_loader=[images()])
    assert controller.compression_stages() == {
        "magnitude_sparsity": CompressionStage.UNCOMPRESSED,
        "quantization": CompressionStage.FULLY_COMPRESSED,
    }
