"""What is remembered of operators on fake tensors makes the same traces as running each of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core.trace import fake_results, trace
from tests.trace.traced_models import Function
from tests.zoo import ZOO


def check(model, inputs, monkeypatch):
    """Compares a trace with one for which every operator runs; returns its first forward."""
    made = trace(model, inputs, training=True)
    with monkeypatch.context() as patched:
        patched.setattr(fake_results, "_known", lambda *_: fake_results._Known(None))  # nothing is remembered
        computed = trace(model, inputs, training=True)
    assert made.forwards == computed.forwards
    assert made.training == computed.training
    return made.forwards[0]


@pytest.mark.parametrize("name", ZOO)
def test_models_have_the_same_traces(name, monkeypatch):
    make, inputs = ZOO[name]
    torch.manual_seed(0)
    check(make(), inputs(), monkeypatch)


def of_numbers(model, x):
    whole = x.long()
    return [(whole * number).sum() / (whole + number).float() for number in (True, 1, 1.0, True, 1, 1.0)]


def of_strides(model, x):
    x = x.view(2, 2, 2, 1).expand(2, 2, 2, 3)
    for form in (torch.contiguous_format, torch.channels_last, torch.contiguous_format, torch.channels_last):
        y = model.conv(x.contiguous(memory_format=form))
        # Another function for each order of the dimensions in memory.
        x = F.relu(y) if y.is_contiguous() else F.gelu(y) if y.is_contiguous(memory_format=form) else F.silu(y)
    return x + x.transpose(1, 2) * x.expand(3, 2, 2, 2, 3).mean(0)


def of_values(model, x):
    """Known values stay known: those of constants, and those that parameters alone give."""
    two, three = (torch.tensor(2) + torch.tensor(0)).item(), (torch.tensor(2) + torch.tensor(1)).item()
    halves = [torch.mul(model.scale, factor).item() for factor in (0.5, 0.5)]
    return x.repeat(two, three) * halves[0] + (x + torch.tensor(two)).repeat(two, three) * halves[1]


def of_views(model, x):
    """An operator that returns a view without saying so: a write to the view is a write to what it is of."""
    results = []
    for _ in range(2):
        y = x + 1
        torch.ops.aten._unsafe_view(y, [8]).zero_()
        results.append(y * 2)
    return results


def of_settings(model, x):
    whole, results = x.long(), []
    for dtype in (torch.float32, torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            results.append(torch.true_divide(whole, 2))
        finally:
            torch.set_default_dtype(torch.float32)
    return results


def of_gradients(model, x):
    with torch.enable_grad():
        heights = [(x * model.scale).square() for _ in range(2)]
        slopes = [torch.autograd.grad(height.sum(), model.scale)[0] for height in heights]
    return [x * slope + height.detach() for slope, height in zip(slopes, heights, strict=True)]


def of_kinds(model, x):
    """Complex, sparse and low-precision tensors, and operators with several results."""
    results = []
    for _ in range(2):
        turned = torch.complex(x, x).conj() @ torch.complex(x, -x).transpose(0, 1)
        low = F.batch_norm(x.bfloat16(), torch.zeros(4), torch.ones(4))
        results += [torch.view_as_real(turned), low, *x.topk(2), *x.max(0), *x.sort(stable=True), *x.split(2, 1)]
        results.append(torch.sparse.mm(x.to_sparse(), x.transpose(0, 1)))
    return results


@pytest.mark.parametrize("function", [of_numbers, of_strides, of_values, of_views, of_settings, of_gradients, of_kinds])
def test_whatever_a_result_depends_on(function, monkeypatch):
    model = Function(function, conv=nn.Conv2d(2, 2, 1))
    model.scale = nn.Parameter(torch.tensor(3.0))
    forward = check(model, torch.ones(2, 4), monkeypatch)
    assert not forward.real


def test_devices_and_dtypes(monkeypatch):
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    x = torch.ones(2, 2, 3, 3)
    for changed in (model, model.double(), model.half(), model.float().to("meta")):
        parameter = next(changed.parameters())
        forward = check(changed, x.to(parameter), monkeypatch)
        assert not forward.real
        assert {value.dtype for value in forward.outputs} == {parameter.dtype}


def test_alike_operators_run_once(monkeypatch):
    ran = []
    computed = fake_results._computed
    monkeypatch.setattr(
        fake_results, "_computed", lambda function, *args: ran.append(function) or computed(function, *args)
    )
    layers = [layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU())]
    trace(nn.Sequential(*layers), torch.ones(2, 4), training=True)
    assert len(ran) == 3
