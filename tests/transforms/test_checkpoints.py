"""Transforms in a `state_dict`: each once when saved, all or none when loaded."""

import copy
import logging

import pytest
import torch
from torch import nn

from compress_core import Stage, create_compressed_model, register_default_init_args
from compress_core.transforms import ModuleOutput, add_activation_transform, add_weight_transform

QUANTIZED = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 4}}}
SPARSE = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}
PRUNED = {"algorithm": "filter_pruning", "pruning_init": 0.3, "params": {"prune_first_conv": True, "multiple_of": 2}}


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.factor * x


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        y = torch.relu(self.first(x))
        return self.last((self.left(y) + self.right(y)).mean((2, 3)))


DATA = [(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(n)), 0) for n in range(2)]


def create(*sections, state=None):
    config = register_default_init_args({"compression": list(sections)}, DATA)
    return create_compressed_model(Branches(), config, compression_state=state)


def shared():
    model, transform = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)), Scale()
    handles = [add_activation_transform(model, ModuleOutput(name), transform, stage=Stage.PRECISION) for name in "012"]
    return model, transform, handles


def test_a_transform_at_several_places_is_saved_once():
    model, _, handles = shared()
    names = [name for name in model.state_dict() if name.endswith("factor")]
    assert names == ["0.activation_transforms.output.scale.factor"]
    assert len(model[1].state_dict()) == 3  # by itself it is saved with what it needs
    handles[0].remove()
    assert [name for name in model.state_dict() if name.endswith("factor")] == [names[0].replace("0.", "1.", 1)]
    handles[1].substitute(Scale())
    assert sum(name.endswith("factor") for name in model.state_dict()) == 2


def test_no_two_entries_share_memory():
    _, model = create(QUANTIZED)
    saved = model.state_dict()
    assert len({tensor.data_ptr() for tensor in saved.values()}) == len(saved)


def test_tied_weights_have_one_transform_in_the_checkpoint():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    add_weight_transform(model, "0.weight", Scale(), stage=Stage.PRECISION)
    assert sum(name.endswith("factor") for name in model.state_dict()) == 1


@pytest.mark.parametrize("kept", ["first", "last", "all"])
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_with_a_transform_at_any_of_its_places_load(kept, assign):
    model, transform, _ = shared()
    names = [f"{n}.activation_transforms.output.scale.factor" for n in "012"]
    chosen = {"first": names[:1], "last": names[2:], "all": names}[kept]
    saved = {name: value for name, value in model.state_dict().items() if name not in names}
    model.load_state_dict(saved | {name: torch.tensor(3.0) for name in chosen}, assign=assign)
    places = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    assert all(place is transform for place in places)
    assert transform.factor.item() == 3


def test_a_copy_saves_the_same_names():
    model, _, _ = shared()
    assert list(copy.deepcopy(model).state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("sections", [[QUANTIZED], [SPARSE], [PRUNED], [PRUNED, SPARSE, QUANTIZED]])
def test_all_or_none_of_the_transforms(sections):
    _, model = create(*sections)
    saved = model.state_dict()
    transforms = sorted({name.rpartition(".")[0] for name in saved if "transforms" in name})
    plain = {name: value for name, value in saved.items() if "transforms" not in name}
    model.load_state_dict(plain)
    for missing in transforms:
        part = {name: value for name, value in saved.items() if not name.startswith(f"{missing}.")}
        with pytest.raises(RuntimeError, match=rf"(?s)Missing key.*{missing}\."):
            model.load_state_dict(part)
        assert set(model.load_state_dict(part, strict=False).missing_keys) == saved.keys() - part.keys()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        model.load_state_dict(saved | {"extra": torch.ones(1)})
    model.load_state_dict(saved)


@pytest.mark.parametrize("sections", [[QUANTIZED], [SPARSE]])
def test_resumed_and_never_filled_is_said_at_the_first_forward(sections, caplog):
    controller, model = create(*sections)
    state, saved = controller.get_compression_state(), model.state_dict()
    _, resumed = create(*sections, state=state)
    resumed.load_state_dict(Branches().state_dict())
    copied = copy.deepcopy(resumed)
    for built in (resumed, copied):
        caplog.clear()
        built(DATA[0][0])
        built(DATA[0][0])
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert "no checkpoint has filled" in caplog.text
        assert "first.weight_transforms.weight" in caplog.text
        assert "load_state_dict() with the state_dict of the compressed model" in caplog.text
    caplog.clear()
    _, resumed = create(*sections, state=state)
    resumed.load_state_dict(saved)
    resumed(DATA[0][0])
    assert not caplog.records


def test_masks_and_ranges_that_are_set_again_need_no_checkpoint(caplog):
    for sections, fill in (
        ([SPARSE], lambda controller: controller.set_sparsity_level(0.5)),
        ([QUANTIZED], lambda controller: controller.init_range()),
        ([PRUNED], lambda controller: None),  # its masks are in the compression state
    ):
        controller, _ = create(*sections)
        resumed, model = create(*sections, state=controller.get_compression_state())
        fill(resumed)
        caplog.clear()
        model(DATA[0][0])
        assert not caplog.records


def test_all_places_of_a_transform_have_names():
    model, transform, _ = shared()
    add_activation_transform(model, ModuleOutput(""), transform, stage=Stage.PRECISION)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith("factor")]
    assert len(names) == 4
    assert sum(name.endswith("factor") for name, _ in model.named_parameters()) == 1
    assert sum(name in names for name in model.state_dict()) == 1
