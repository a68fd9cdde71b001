"""What importances that need data do after the creation: levels, resuming, copies."""

import copy
import io
import json
import pickle

import pytest
import torch

from compress_core import (
    create_compressed_model,
)
from compress_core.transforms import raw_parameter
from tests.plugins.magnitude_sparsity.importance_helpers import (
    DATA_KINDS,
    batches,
    create,
    document,
    inputs,
    masks,
    net,
    run_epochs,
    size,
    zeros,
)
from tests.zoo import ResidualNet, images, trained


@pytest.mark.parametrize("kind", [*DATA_KINDS, "normed_abs", "abs"])
def test_an_unchanged_level_leaves_the_masks_after_reconstruction(kind):
    model = net(12, 9, 7)
    controller = create(
        model, kind=kind, level=0.6, sparsity_target=0.6, initializer={"weight_reconstruction": {"num_samples": 256}}
    )
    chosen = masks(model, controller)
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    assert all(torch.equal(mask, chosen[name]) for name, mask in masks(model, controller).items())


def test_without_data_an_unchanged_level_follows_trained_weights():
    model = net(12, 9)
    controller = create(model, kind="abs", level=0.5, sparsity_target=0.5)
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    with torch.no_grad():
        raw_parameter(model, "0.weight").copy_(raw_parameter(model, "0.weight").flip(0, 1))
    before = masks(model, controller)["0.weight"]
    controller.scheduler.epoch_step()
    assert torch.equal(masks(model, controller)["0.weight"], before.flip(0, 1))


@pytest.mark.parametrize("kind", ["activation", "abs"])
def test_weights_loaded_without_masks_are_ranked_anew(kind):
    model = net(12, 9)
    other = {name: value.flip(-1) for name, value in model.state_dict().items()}
    reference = net(12, 9)
    reference.load_state_dict(other)
    expected = masks(reference, create(reference, kind=kind, level=0.5, sparsity_target=0.5))
    controller = create(model, kind=kind, level=0.5, sparsity_target=0.5)
    model.load_state_dict(other)
    controller.scheduler.epoch_step()
    assert all(torch.equal(mask, expected[name]) for name, mask in masks(model, controller).items())


def test_a_falling_level_brings_back_what_matters_most():
    model, data = net(12, 9), batches()
    controller = create(model, data=data, level=0.8, mode="local")
    spread = (inputs(data) - inputs(data).mean(0)).square().mean(0).sqrt()
    importance = (raw_parameter(model, "0.weight").detach() * spread).abs()
    gone = ~masks(model, controller)["0.weight"]
    controller.set_sparsity_level(0.5)
    back = gone & masks(model, controller)["0.weight"]
    still = gone & ~masks(model, controller)["0.weight"]
    assert importance[back].min() > importance[still].max()


@pytest.mark.parametrize("kind", DATA_KINDS)
@pytest.mark.parametrize("mode", ["global", "local"])
def test_resuming_continues_with_the_same_bits(kind, mode):
    data, options = batches(), {"kind": kind, "mode": mode, "level": 0.3, "sparsity_target_epoch": 4}
    whole = net(12, 9, 7)
    controller, expected = create(whole, data=data, **options), []
    run_epochs(controller, whole, data, 4, expected)

    first, found = net(12, 9, 7), []
    controller = create(first, data=data, **options)
    run_epochs(controller, first, data, 2, found)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    saved = json.loads(json.dumps(controller.get_compression_state()))
    resumed = net(12, 9, 7)
    controller, _ = create_compressed_model(resumed, document(**options), compression_state=saved)
    resumed.load_state_dict(torch.load(file))
    run_epochs(controller, resumed, data, 2, found)
    for step, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert all(torch.equal(a[name], b[name]) for name in a), step
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_without_data(copied):
    model = net(12, 9, 7)
    controller = create(model, level=0.3)
    other, twin = copied((controller, model))
    controller.set_sparsity_level(0.7)
    other.set_sparsity_level(0.7)
    found = masks(twin, other)
    assert all(torch.equal(mask, found[name]) for name, mask in masks(model, controller).items())


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_single_layers_and_freezing(kind):
    model = net(12, 9, 7)
    controller = create(model, level=0.4, kind=kind)
    before = masks(model, controller)
    controller.set_sparsity_level(0.8, module_info="1")
    after = masks(model, controller)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert int((~after["1.weight"]).sum()) == round(0.8 * 63)
    controller.freeze(True)
    controller.scheduler.epoch_step(next_epoch=200)
    assert all(torch.equal(mask, after[name]) for name, mask in masks(model, controller).items())


def test_factors_are_small_and_saved():
    model = net(12, 9)
    create(model)
    factors = {name: value for name, value in model.state_dict().items() if name.endswith("factor")}
    assert [tuple(value.shape) for value in factors.values()] == [(1, 12)]


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_convolutions_with_groups_and_tied_weights(kind):
    model = trained(ResidualNet(), (images(),))
    controller = create(model, data=[images() for _ in range(4)], kind=kind, level=0.5)
    found = masks(model, controller)
    assert zeros(found) == round(0.5 * size(found))


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_settings_that_only_choosing_reads_are_accepted_again_when_resuming(kind):
    initializer = {"weight_reconstruction": {"num_samples": 0, "positions": 8, "damping": 0.2}}
    controller = create(net(12, 9, 7), kind=kind, initializer=initializer)
    config = document(kind=kind, initializer=initializer)
    again, _ = create_compressed_model(net(12, 9, 7), config, compression_state=controller.get_compression_state())
    effects = {entry.path.rpartition(".")[2]: entry.effect for entry in again.ledger}
    assert effects["positions"].startswith("resumed")
