"""Transformed weights are computed again for the backward pass: same gradients, less memory, and never a stale weight."""

import copy
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from compress_core import Stage, create_compressed_model, mask_weight
from compress_core.transforms import (
    ModuleOutput,
    WeightTransform,
    add_activation_transform,
    add_weight_transform,
    recompute_weights,
)


class Scale(WeightTransform):
    recomputable = True

    def __init__(self, factor=3.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.register_buffer("shift", torch.tensor(0.5))
        self.enabled = True
        self.results = []

    def forward(self, weight):
        result = weight * self.factor + self.shift if self.enabled else weight * 1
        self.results.append((weakref.ref(result), result.requires_grad))
        return result

    @property
    def recomputed(self):
        """How often it has run without a graph."""
        return sum(not requires_grad for _, requires_grad in self.results)


class Kept(Scale):
    recomputable = False


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear, 3 dimensions": (lambda: nn.Linear(5, 3, bias=False), (2, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 8, 8)),
    "conv2d, channels last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
}


def layer_with(transform, make=lambda: nn.Linear(5, 3)):
    torch.manual_seed(0)
    layer = make()
    add_weight_transform(layer, "weight", transform, stage=Stage.PRECISION, key="q")
    recompute_weights(layer)
    return layer


def derivatives(layer, x):
    """Gradients for input and parameters, and the gradients of their squares."""
    inputs = [x, *layer.parameters()]
    first = torch.autograd.grad(layer(x).square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)
    return [*first, *second]


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_first_and_second_order_are_the_same(name):
    make, shape = LAYERS[name]
    x = torch.randn(shape, requires_grad=True)
    transform = Scale()
    found = derivatives(layer_with(transform, make), x)
    expected = derivatives(layer_with(Kept(), make), x)
    assert transform.recomputed > 0
    assert len(found) == len(expected)
    assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-5) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("cls", [Scale, Kept])
def test_a_weight_that_can_be_recomputed_does_not_stay_alive(cls):
    transform = cls()
    layer = layer_with(transform)
    out = layer(torch.randn(4, 5, requires_grad=True))
    ((result, _),) = transform.results
    assert (result() is None) == (cls is Scale)
    out.sum().backward()
    assert transform.recomputed == (1 if cls is Scale else 0)


def test_graphs_that_are_kept_and_inputs_without_gradients():
    transform = Scale()
    layer = layer_with(transform)
    x = torch.randn(4, 5, requires_grad=True)
    loss = layer(x).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)
    assert transform.recomputed == 2
    layer(x.detach()).sum().backward()  # nobody asks for the gradient of the input
    assert transform.recomputed == 2


def test_several_transforms_and_a_weight_that_two_layers_share():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    def make(transform):
        torch.manual_seed(0)
        model = Tied()
        mask_weight(model, "first.weight", torch.eye(5))
        add_weight_transform(model, "first.weight", transform, stage=Stage.PRECISION, key="q")
        recompute_weights(model)
        return model

    x = torch.randn(4, 5, requires_grad=True)
    transform = Scale()
    found, expected = derivatives(make(transform), x), derivatives(make(Kept()), x)
    assert transform.recomputed >= 2
    assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-5) for pair in zip(found, expected, strict=True))


def test_together_with_activation_transforms():
    transform = Scale()
    layer = layer_with(transform)
    add_activation_transform(layer, ModuleOutput(""), Scale(2.0), stage=Stage.PRECISION, key="a")
    plain = layer_with(Kept())
    x = torch.randn(4, 5, requires_grad=True)
    grad = torch.autograd.grad(layer(x).sum(), x)[0]
    assert torch.allclose(grad, 2 * torch.autograd.grad(plain(x).sum(), x)[0])
    assert transform.recomputed == 1


# Where weights are kept.


@pytest.mark.parametrize("asked", [True, False])
def test_it_is_done_on_request_of_the_config(asked):
    document = {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}, "recompute_weights": asked}
    model = create_compressed_model(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), document)[1]
    runs = []
    for layer in model:
        mask = layer.weight_transforms.weight.magnitude_sparsity
        forward = mask.forward
        mask.forward = lambda weight, forward=forward: runs.append(torch.is_grad_enabled()) or forward(weight)
    model(torch.randn(4, 5, requires_grad=True)).sum().backward()
    assert runs == [True, True] + ([False, False] if asked else [])


def test_transforms_that_do_not_say_so_or_have_hooks():
    for transform in (Kept(), Scale()):
        layer = layer_with(transform)
        transform.register_forward_hook(lambda *_: None)
        layer(torch.randn(4, 5, requires_grad=True)).sum().backward()
        assert transform.recomputed == 0


def test_whoever_decides_what_is_kept_goes_on_to_do_so():
    transform = Scale()
    layer, x = layer_with(transform), torch.randn(4, 5, requires_grad=True)
    seen = []
    with saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):
        layer(x).sum().backward()
    assert (4, 5) in seen
    assert (3, 5) in seen or (5, 3) in seen
    with save_on_cpu():
        layer(x).sum().backward()
    with disable_saved_tensors_hooks("not here"):
        layer(x).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert transform.recomputed == 0
    before = len(transform.results)
    torch.func.grad(lambda t: layer(t).sum())(x.detach())
    assert len(transform.results) == before + 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    x = torch.randn(4, 5, requires_grad=True)
    expected = derivative_of(lambda layer: layer(x), x)
    found = derivative_of(lambda layer: checkpoint(layer, x, use_reentrant=use_reentrant), x)
    assert torch.equal(found, expected)


def derivative_of(run, x):
    x.grad = None
    run(layer_with(Scale())).square().sum().backward()
    return x.grad


# What must not go unnoticed.


def replaced_buffer(layer):
    layer.weight_transforms.weight.q.shift = torch.tensor(0.7)


def switched(layer):
    layer.weight_transforms.weight.q.enabled = False


def written(name):
    def change(layer):
        with torch.no_grad():
            dict([*layer.named_parameters(), *layer.named_buffers()])[name].add_(1)

    return change


CHANGES = {
    "weight": written("weight"),
    "parameter of the transform": written("weight_transforms.weight.q.factor"),
    "buffer": written("weight_transforms.weight.q.shift"),
    "another buffer": replaced_buffer,
    "switch": switched,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_forward_and_backward_are_refused(change):
    layer = layer_with(Scale())
    x = torch.randn(4, 5, requires_grad=True)
    loss = layer(x).sum()
    CHANGES[change](layer)
    with pytest.raises(RuntimeError, match="needed for gradient computation has been modified"):
        loss.backward()


def test_writes_to_the_input_are_refused_as_torch_does():
    layer = layer_with(Scale())
    x = torch.randn(4, 5, requires_grad=True) * 1
    loss = layer(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*is at version 1; expected version 0"):
        loss.backward()


def test_another_mode_or_memory_format_is_no_change():
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    layer = layer_with(Scale(), lambda: nn.Conv2d(4, 6, 3))
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    loss = layer(x).sum()
    layer.eval()
    layer.to(memory_format=torch.channels_last)
    assert torch.allclose(torch.autograd.grad(loss, x)[0], expected, atol=1e-6)


def test_threads_and_errors_leave_nothing_behind():
    layer = layer_with(Scale())
    with pytest.raises(RuntimeError):
        layer(torch.randn(4, 6, requires_grad=True))
    results = {}

    def run(number):
        own, x = copy.deepcopy(layer), torch.full((4, 5), float(number), requires_grad=True)
        for _ in range(20):
            results[number] = torch.autograd.grad(own(x).square().sum(), x)[0]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, found in results.items():
        x = torch.full((4, 5), float(number), requires_grad=True)
        assert torch.allclose(found, torch.autograd.grad(layer_with(Kept())(x).square().sum(), x)[0])
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
