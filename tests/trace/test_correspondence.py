"""Places of calls that training and eval mode, or two examples, reach from different lines."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import Stage
from compress_core.trace import trace
from compress_core.trace.sites import CallRef, Sites
from compress_core.transforms import ModuleOutput, add_activation_transform

X = torch.linspace(-1, 2, 8).reshape(2, 4)


class Count(nn.Module):
    """A transform that counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first, self.second, self.head, self.auxiliary = (nn.Linear(4, 4) for _ in range(4))
        self.act = nn.ReLU()

    def forward(self, x):
        return self.function(self, x)

    def features(self, x):
        return F.relu(self.first(x)) + 1


def two_branches(net, x):
    if net.training:
        y = F.relu(net.first(x))
        return net.head(F.relu(net.second(y))), net.auxiliary(y)
    y = F.relu(net.first(x))
    return net.head(F.relu(net.second(y)))


def auxiliary_head_first(net, x):
    if net.training:
        early = net.auxiliary(F.relu(x))
        return net.head(F.relu(net.second(F.relu(net.first(x))))), early
    return net.head(F.relu(net.second(F.relu(net.first(x)))))


def auxiliary_head_between(net, x):
    if net.training:
        y = net.act(net.first(x))
        early = net.act(net.auxiliary(y))
        return net.head(net.act(net.second(y))), early
    return net.head(net.act(net.second(net.act(net.first(x)))))


def noise_and_dropout(net, x):
    if net.training:
        y = F.relu(net.first(x) + torch.randn_like(x))
        return net.head(F.dropout(F.relu(net.second(F.dropout(y)))))
    return net.head(F.relu(net.second(F.relu(net.first(x)))))


def nested_functions(net, x):
    def block(layer, y):
        return F.relu(layer(y))

    def same_elsewhere(layer, y):
        return F.relu(layer(y))

    if net.training:
        return net.head(same_elsewhere(net.second, same_elsewhere(net.first, x)))
    return net.head(block(net.second, block(net.first, x)))


def method(net, x):
    if net.training:
        y = net.features(x)
        return {"logits": net.head(F.relu(y)), "features": y}
    return net.head(F.relu(net.features(x)))


def comprehension_and_loop(net, x):
    if net.training:
        parts = [F.relu(net.second(part)) for part in (x, x * 2)]
    else:
        parts = []
        for part in (x, x * 2):
            parts.append(F.relu(net.second(part)))
    return net.head(parts[0] + parts[1])


def loop_and_unrolled(net, x):
    if net.training:
        for layer in (net.first, net.second):
            x = F.relu(layer(x))
    else:
        x = F.relu(net.first(x))
        x = F.relu(net.second(x))
    return net.head(x)


def unrolled_and_loop(net, x):
    if net.training:
        x = F.relu(net.first(x))
        x = F.relu(net.second(x))
    else:
        for layer in (net.first, net.second):
            x = F.relu(layer(x))
    return net.head(x)


BRANCHES = [
    *(two_branches, auxiliary_head_first, auxiliary_head_between, noise_and_dropout, nested_functions, method),
    *(comprehension_and_loop, loop_and_unrolled, unrolled_and_loop),
]


def counted(net, examples=X):
    """Adds a transform after each call of the first example in eval mode, and returns those of each place."""
    found = trace(net, examples, training=True)
    sites, places = Sites(found), {}
    for call in found.forwards[0].calls:
        place = sites.output_place(CallRef(0, call.index), ())
        if place not in places:
            places[place] = Count()
            add_activation_transform(net, place, places[place], stage=Stage.PRECISION, key="q")
    return places


@pytest.mark.parametrize("branches", BRANCHES)
def test_each_place_acts_as_often_in_training_as_in_eval_mode(branches, caplog):
    net = Net(branches)
    places = counted(net)
    net.eval()(X)
    in_eval = {str(place): count.calls for place, count in places.items()}
    net.train()(X)
    in_training = {str(place): count.calls - in_eval[str(place)] for place, count in places.items()}
    assert in_training == in_eval
    assert not caplog.records


def test_the_right_one_of_two_equal_calls_has_the_place():
    net = Net(auxiliary_head_between)
    places = counted(net)
    # Three calls of one ReLU in training mode; the second one is that of the auxiliary head.
    seen = []
    net.auxiliary.register_forward_hook(lambda module, args, output: seen.append(output.detach().relu()))
    results = []
    relus = [count for place, count in places.items() if "relu" in str(place)]
    assert len(relus) == 2
    for count in relus:
        count.register_forward_hook(lambda module, args, output: results.append(output.detach()))
    net.train()(X)
    assert len(results) == 2
    assert not any(torch.equal(result, seen[0]) for result in results)


def test_layer_that_training_mode_alone_calls_twice_has_its_places_in_both_calls():
    def forward(net, x):
        if net.training:
            return net.head(net.act(net.first(x))), net.head(net.act(net.first(x * 2)))
        return net.head(net.act(net.first(x)))

    net = Net(forward)
    places = counted(net)
    assert set(places) == {ModuleOutput(name) for name in ("first", "act", "head")}
    net.train()(X)
    assert [count.calls for count in places.values()] == [2, 2, 2]


def test_result_that_training_mode_returns_in_another_structure_has_its_place_at_the_call():
    class Block(nn.Module):
        def forward(self, x):
            y = torch.tanh(x)
            return (y, y * 2) if self.training else y

    def forward(net, x):
        y = net.block(net.first(x))
        return net.head(y[0]) if net.training else net.head(y)

    net = Net(forward)
    net.block = Block()
    places = counted(net)
    net.train()(X)
    assert [count.calls for count in places.values()] == [1] * len(places)


def test_two_examples_that_reach_one_call_from_two_lines():
    def forward(net, x):
        if x.sum() > 0:
            return net.head(torch.tanh(net.first(x)))
        return net.head(torch.tanh(net.first(x)) * 2)

    net = Net(forward)
    places = counted(net, [X, -X])
    net.eval()(-X)
    assert [count.calls for count in places.values()] == [1] * 5


def test_what_a_forward_in_training_mode_never_reaches_is_known():
    def forward(net, x):
        y = net.first(x)
        return torch.relu(y) if net.training else F.relu(y)

    found = trace(Net(forward), X, training=True)
    sites = Sites(found)
    assert [sites.is_reached_in_training(CallRef(0, call.index)) for call in found.forwards[0].calls] == [True, False]
    without = Sites(trace(Net(forward), X))
    assert without.is_reached_in_training(CallRef(0, 1))  # nothing is known
