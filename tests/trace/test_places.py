"""From traces to places, proven by what a transform there does; and the traces that algorithms ask the context for."""

import copy
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import CompressionConfig, DataError, Stage
from compress_core.contract.context import Context
from compress_core.trace import TraceError, trace
from compress_core.trace.sites import CallRef, Sites
from compress_core.transforms import CallInput, CallOutput, ModuleInput, ModuleOutput, add_activation_transform
from compress_core.transforms.places import place_from_dict

X = torch.linspace(-1, 2, 8).reshape(2, 4)


class Tenfold(nn.Module):
    def forward(self, x):
        return 10 * x


class Function(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args):
        return self.function(self, *args)


def tenfold(model, place):
    add_activation_transform(model, place, Tenfold(), stage=Stage.PRECISION, key="q")
    return model


def output_place(model, call, path=(), examples=X, training=False):
    return Sites(trace(model, examples, training=training)).output_place(CallRef(0, call), path)


# Places.


def test_output_of_a_module_that_only_returns_the_result():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    place = output_place(model, 0)
    assert place == ModuleOutput("0", ())
    plain = model[0](X)
    assert torch.allclose(tenfold(model, place)(X), 10 * plain.relu())


def test_relu_that_ends_a_larger_module_is_found_at_the_call():
    # There, a transform can take the ReLU over.
    class Block(nn.Module):
        def forward(self, x):
            return F.relu(F.relu(x) - 1)

    model = nn.Sequential(Block(), nn.Linear(4, 4))
    place = output_place(model, 2)
    assert isinstance(place, CallOutput)
    assert (place.module, place.function) == ("0", "torch.nn.functional.relu")
    expected = model[1](10 * F.relu(F.relu(X) - 1))
    assert torch.allclose(tenfold(model, place)(X), expected)


def test_result_that_its_own_module_goes_on_with_is_found_at_the_call():
    model = Function(lambda model, x: F.relu(F.relu(x) - 1) + F.relu(x))
    place = output_place(model, 2)
    assert isinstance(place, CallOutput)
    # Calls: the inner relu, the difference, the outer relu, the last relu, the sum.
    assert torch.allclose(tenfold(model, place)(X), 10 * F.relu(F.relu(X) - 1) + F.relu(X))


def test_every_turn_of_a_loop_is_one_place_and_a_longer_loop_goes_on():
    def loop(model, x):
        for _ in range(model.turns):
            x = F.relu(x) - 1
        return F.relu(x) + 1

    model = Function(loop)
    model.turns = 2
    found = Sites(trace(model, X))
    assert found.site(CallRef(0, 0)) == found.site(CallRef(0, 2)) != found.site(CallRef(0, 4))
    tenfold(model, found.output_place(CallRef(0, 0), ()))
    first = 10 * F.relu(X) - 1
    assert torch.allclose(model(X), F.relu(10 * F.relu(first) - 1) + 1)


def test_layer_that_is_called_twice_has_one_output_and_two_readers():
    model = Function(lambda model, x: model.layer(torch.tanh(model.layer(x))), layer=nn.Linear(4, 4))
    layer = model.layer
    found = Sites(trace(model, X))
    expected = layer(10 * torch.tanh(layer(X)))
    assert torch.allclose(tenfold(model, found.input_place(CallRef(0, 2), (0,)))(X), expected)


def test_input_of_one_call_leaves_other_readers_alone():
    model = Function(lambda model, x: torch.tanh(x) + torch.sigmoid(x))
    place = Sites(trace(model, X)).input_place(CallRef(0, 1), (0,))
    assert isinstance(place, CallInput)
    assert torch.allclose(tenfold(model, place)(X), torch.tanh(X) + torch.sigmoid(10 * X))


def test_input_of_the_model():
    model = nn.Sequential(nn.Tanh())
    assert Sites.model_input((0,)) == ModuleInput("", (0,))
    assert torch.allclose(tenfold(model, Sites.model_input((0,)))(X), torch.tanh(10 * X))


def test_calls_of_training_mode_alone_do_not_shift_the_place():
    def forward(model, x):
        if model.training:
            x = torch.tanh(x)
        return torch.tanh(x) + 1

    model = Function(forward)
    place = output_place(model, 0, training=True)
    tenfold(model, place)
    assert torch.allclose(model.eval()(X), 10 * torch.tanh(X) + 1)
    assert torch.allclose(model.train()(X), 10 * torch.tanh(torch.tanh(X)) + 1)


def test_examples_that_contradict_each_other_have_no_place():
    def forward(model, x):
        if x.sum().item() > 0:
            return torch.tanh(x) + 1
        return torch.tanh(model.layer(x)) * 2

    model = Function(forward, layer=nn.Linear(4, 4))
    assert output_place(model, 1) is not None
    # The first tanh of a forward is one or the other: which, nobody can count.
    assert output_place(model, 1, examples=[X, -X]) is None


# What algorithms ask for.


def context(document=None, **options):
    config = CompressionConfig.from_dict(document or {})
    return Context(config, **options)


def shapes(found):
    return [value.shape for value in found.forwards[0].inputs]


def test_trace_from_input_info_in_both_modes():
    found = context({"input_info": {"sample_size": [3, 4]}}).trace(nn.Linear(4, 2), "section")
    assert shapes(found) == [(3, 4)]
    assert found.training[0].training


def test_trace_from_a_batch_when_there_is_no_input_info():
    loader = [(torch.ones(5, 4), torch.zeros(5)), None]  # only the first batch is looked at
    assert shapes(context(init_loader=loader).trace(nn.Linear(4, 2), "section")) == [(5, 4)]


def test_batch_takes_the_place_of_input_info_that_does_not_fit(caplog):
    with_both = context({"input_info": {"sample_size": [1, 3, 224, 224]}}, init_loader=[torch.ones(5, 4)])
    with caplog.at_level(logging.WARNING):
        assert shapes(with_both.trace(nn.Linear(4, 2), "section")) == [(5, 4)]
    (record,) = caplog.records
    assert record.message.startswith("input_info does not fit the model, a batch of the data loader is used instead: ")


def test_input_info_that_does_not_fit_without_data_is_an_error():
    with pytest.raises(TraceError, match="its forward fails on input_info: "):
        context({"input_info": {"sample_size": [1, 3]}}).trace(nn.Linear(4, 2), "section")


def test_no_example_at_all_says_what_to_add():
    with pytest.raises(DataError, match=r"^section: needs to trace the model.* Add input_info to the config"):
        context().trace(nn.Linear(4, 2), "section")


def test_iterator_is_left_for_those_who_need_its_values():
    batches = iter([torch.ones(5, 4)])
    with pytest.raises(DataError):
        context(init_loader=batches).trace(nn.Linear(4, 2), "section")
    assert len(list(batches)) == 1


def test_a_shuffling_loader_goes_on_as_if_nobody_had_looked():
    generator = torch.Generator().manual_seed(3)
    data = torch.utils.data.TensorDataset(torch.arange(12.0).reshape(3, 4), torch.zeros(3))
    loader = torch.utils.data.DataLoader(data, 2, shuffle=True, generator=generator)
    before = generator.get_state()
    context(init_loader=loader).trace(nn.Linear(4, 2), "section")
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("training", [False, True])
def test_runs_of_one_module_may_make_different_calls(training, caplog):
    def forward(model, x):
        y = model.attention(x, x, x, need_weights=True)[0]
        return model.attention(y, y, y, need_weights=False)[0]

    model = Function(forward, attention=nn.MultiheadAttention(8, 2, batch_first=True)).train(training)
    reference, x = copy.deepcopy(model), torch.randn(2, 5, 8)
    found = trace(model, x, training=True)
    probabilities = ("torch.nn.functional.softmax", "torch.nn.functional.scaled_dot_product_attention")
    calls = [call for call in found.forwards[0].calls if call.function in probabilities]
    assert len(calls) == 2
    places = [Sites(found).output_place(CallRef(0, call.index), ()) for call in calls]
    for place in places:
        tenfold(model, place_from_dict(json.loads(json.dumps(place.to_dict()))))
    with torch.no_grad():
        reference.attention.out_proj.weight *= 10  # what reads the heads, which are linear in the probabilities
    expected = reference(x)
    assert torch.allclose(model(x), expected, atol=1e-5)
    torch.compiler.reset()
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(x), expected, atol=1e-5)
    assert not caplog.records
