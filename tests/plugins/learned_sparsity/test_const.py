"""The pattern of zeros stays, wherever it comes from."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from compress_core import CompressionStage, ModelError
from compress_core.transforms import raw_parameter
from tests.plugins.learned_sparsity.scores_helpers import batches, create, network, same_tensors, steps, through_json


def sparse_network():
    model = network()
    with torch.no_grad():
        for index in (0, 2, 4):
            weight = model[index].weight
            weight[weight.abs() < weight.abs().median()] = 0
    return model


def zeros(model):
    return {index: model[index].weight == 0 for index in (0, 2, 4)}


def train(controller, model, epochs=2):
    steps(controller, model, torch.optim.Adam(model.parameters(), 0.05), batches(3), epochs)


def test_zeros_survive_training_and_the_rest_is_trained():
    model = sparse_network()
    before, dense = zeros(model), model[0].weight.detach().clone()
    controller, model = create(model, "const_sparsity")
    train(controller, model)
    after = zeros(model)
    assert all(torch.equal(before[i], after[i]) for i in before)
    assert not torch.equal(model[0].weight.detach(), dense)
    plain = controller.strip()
    assert all(torch.equal(before[i], plain[i].weight == 0) for i in before)


def test_figures_and_stage():
    model = sparse_network()
    total, gone = sum(m.numel() for m in zeros(model).values()), sum(int(m.sum()) for m in zeros(model).values())
    controller, model = create(model, "const_sparsity", ignored_scopes=["4"])
    part = controller.statistics().const_sparsity
    last = int(zeros(model)[4].sum())
    assert controller.compression_rate == part.sparsity_level == (gone - last) / (total - 64)
    assert part.weights_sparsity_level == (gone - last) / total
    assert list(part.skipped) == ["4.weight"]
    assert "Constant sparsity: layers" in part.to_str()
    assert controller.compression_stage() is CompressionStage.FULLY_COMPRESSED
    assert controller.loss().item() == 0


def test_frozen_layers_are_masked_as_well():
    model = sparse_network()
    model[2].weight.requires_grad_(False)
    controller, model = create(model, "const_sparsity")
    assert "2.weight" in controller.sparsified_module_info
    assert not model[2].weight.requires_grad


def test_a_dense_model_is_masked_nowhere_and_a_warning_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        controller, _ = create(network(), "const_sparsity")
    assert "no weight of this model is zero" in caplog.text
    assert controller.compression_rate == 0


def trained_with(algorithm, **section):
    controller, model = create(network(), algorithm, **section)
    steps(controller, model, torch.optim.Adam(model.parameters(), 0.05), batches(3), 3)
    return controller, model.eval()


@pytest.mark.parametrize(
    ("algorithm", "section"),
    [
        ("magnitude_sparsity", {"sparsity_init": 0.6, "params": {"sparsity_target": 0.6}}),
        ("rb_sparsity", {"sparsity_init": 0.4, "params": {"sparsity_target": 0.4}}),
        ("const_sparsity", {}),
    ],
)
def test_masks_of_a_checkpoint_of_another_algorithm(algorithm, section):
    _, donor = trained_with(algorithm, **section)
    expected = zeros(donor)
    controller, model = create(network(5), "const_sparsity")
    result = model.load_state_dict(donor.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(expected[i], zeros(model)[i]) for i in expected)
    torch.testing.assert_close(model.eval()(batches(1)[0]), donor(batches(1)[0]), rtol=0, atol=0)
    train(controller, model)
    assert all(torch.equal(expected[i], zeros(model)[i]) for i in expected)


def test_what_it_does_not_take_from_a_checkpoint_is_reported():
    _, donor = trained_with("magnitude_sparsity", sparsity_init=0.6, params={"sparsity_target": 0.6})
    state = donor.state_dict()
    state["0.weight_transforms.weight.other.scale"] = torch.ones(3)
    _, model = create(network(5), "const_sparsity")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.weight_transforms\.weight\.other"):
        model.load_state_dict(state)


def test_a_checkpoint_of_the_plain_model_keeps_the_masks():
    _, model = create(sparse_network(), "const_sparsity")
    before = zeros(model)
    model.load_state_dict(network(5).state_dict())
    assert all(torch.equal(before[i], zeros(model)[i]) for i in before)
    assert bool(raw_parameter(model, "0.weight").all())


def test_resumes_to_the_same_bits():
    controller, model = create(sparse_network(), "const_sparsity")
    train(controller, model)
    state, values = through_json(controller.get_compression_state()), model.state_dict()
    _, again = create(network(7), "const_sparsity", state=state)
    again.load_state_dict(values)
    same_tensors(again.state_dict(), values)
    torch.testing.assert_close(again(batches(1)[0]), model(batches(1)[0]), rtol=0, atol=0)


def test_with_quantization_the_quantized_weights_keep_their_zeros():
    model = sparse_network()
    before = zeros(model)
    controller, model = create(
        model, "const_sparsity", {"algorithm": "quantization"}, root={"input_info": {"sample_size": [8, 12]}}
    )
    train(controller, model, 1)
    assert all(bool((zeros(model)[i] | ~before[i]).all()) for i in before)


def test_weights_of_integers_are_refused_by_name():
    class Odd(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int32), requires_grad=False)

    with pytest.raises(ModelError, match=r"the weight '0\.weight' has the dtype torch\.int32"):
        create(nn.Sequential(Odd()), "const_sparsity")
