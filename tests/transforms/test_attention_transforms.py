"""Places inside of nn.MultiheadAttention."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from compress_core.transforms import (
    CallInput,
    CallOutput,
)
from tests.activation_helpers import Scale, add, calls


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x, y, attn_mask=None, key_padding_mask=None, need_weights=False):
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        return self.attention(x, y, y, need_weights=need_weights, **masks)[0]


CAUSAL, PADDING = torch.ones(5, 5, dtype=torch.bool).triu(1), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.parametrize("number", [1, 2], ids=["self", "cross"])
@pytest.mark.parametrize("masks", [(), (CAUSAL,), (CAUSAL, PADDING)], ids=["no mask", "causal", "causal and padding"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_inside_of_multi_head_attention(number, masks, need_weights):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 5, 8) for _ in range(number)]
    args = (tensors[0], tensors[-1], *masks)
    model = Attention()
    with torch.no_grad():
        model.attention.in_proj_bias.uniform_(-1, 1)
        model.attention.out_proj.bias.uniform_(-1, 1)
    plain = copy.deepcopy(model)
    # A factor behind the first projection is one on its weight and bias, those of queries.
    factors = torch.cat([torch.full((8,), 3.0), torch.ones(16)])
    with torch.no_grad():
        plain.attention.in_proj_weight *= factors[:, None]
        plain.attention.in_proj_bias *= factors
        plain.attention.out_proj.weight *= 0.5
    sites = (0, 1, 2, 3)
    add(model, CallOutput("attention", "torch.nn.functional.linear", calls(0, sites)), Scale(3.0))
    add(model, CallInput("attention", "torch.nn.functional.linear", calls(3, sites), (0,)), Scale(0.5))
    expected = plain(*args, need_weights=need_weights)
    torch.compiler.reset()
    for run in (model, torch.compile(model, fullgraph=True, backend="eager")):
        for training in (True, False):
            model.train(training)
            assert torch.allclose(run(*args, need_weights=need_weights), expected, atol=1e-6)
            with torch.no_grad():  # where the fused attention would be taken
                assert torch.allclose(run(*args, need_weights=need_weights), expected, atol=1e-6)
    exported = torch.export.export(model, args, {"need_weights": need_weights}, strict=False).module()
    assert torch.allclose(exported(*args, need_weights=need_weights), expected, atol=1e-6)


def test_attention_that_the_user_has_put_in_the_place_of_torchs_own_is_called(monkeypatch):
    model = Attention()
    add(model, CallInput("attention", "torch.nn.functional.linear", calls(3, (0, 1, 2, 3)), (0,)), Scale(2.0))
    x = torch.randn(2, 5, 8)
    model(x, x)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, *_: torch.zeros_like(query))
    assert torch.equal(model(x, x), model.attention.out_proj.bias.expand(2, 5, 8))


@pytest.mark.parametrize("change", ["one query", "copies", "no batch", "checkpoint"])
def test_places_inside_of_attention_do_not_depend_on_which_tensors_are_the_same(change, caplog):
    model, x = Attention(), torch.randn(2, 5, 8)
    for site, factor in ((0, 3.0), (1, 0.5), (3, 2.0)):
        place = CallOutput("attention", "torch.nn.functional.linear", calls(site, (0, 1, 2, 3)))
        add(model, place, Scale(factor))
    expected = model(x, x)
    if change == "one query":
        assert torch.allclose(model(x[:, -1:], x), expected[:, -1:], atol=1e-6)
    elif change == "copies":
        found = model.attention(x, x.clone(), x.clone(), need_weights=False)[0]
        assert torch.allclose(found, expected, atol=1e-6)
    elif change == "no batch":
        assert torch.allclose(model(x[0], x[0]), expected[0], atol=1e-6)
    else:
        weight = model.attention.in_proj_weight
        (gradient,) = torch.autograd.grad(expected.sum(), weight)
        checkpoint(model, x.requires_grad_(), x, use_reentrant=True).sum().backward()
        assert torch.allclose(weight.grad, gradient, atol=1e-5)
    assert not caplog.records


@pytest.mark.parametrize(
    "wrapper", ["torch.compiler.disable(original)", "lambda *args, **kwargs: original(*args, **kwargs)"]
)
def test_attention_that_was_replaced_before_the_import_is_one_call(wrapper):
    code = (
        "import torch; from torch.nn import functional as F; original = F.multi_head_attention_forward; "
        f"F.multi_head_attention_forward = {wrapper}; from compress_core.transforms.attention import inside_of; "
        "from compress_core.trace import trace; model = torch.nn.MultiheadAttention(8, 2); x = torch.ones(3, 2, 8); "
        "assert inside_of(F.multi_head_attention_forward) is None; assert trace(model, (x, x, x)).forwards[0].calls"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_wrong_masks_are_refused_as_before():
    model, x = Attention(), torch.randn(2, 5, 8)
    add(model, CallInput("attention", "torch.nn.functional.linear", calls(3, (0, 1, 2, 3)), (0,)), Scale(2.0))
    with pytest.raises(AssertionError, match="key_padd"):
        model(x, x, None, PADDING[:, :3])
