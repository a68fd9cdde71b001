"""The function that stands for torch's multi-head attention: what a mode sees, and who traces it."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core.transforms import CallInput
from compress_core.transforms.attention import inside_of
from tests.activation_helpers import Scale, add, calls
from tests.transforms.attention_helpers import (
    BATCH,
    BIASES,
    FEATURES,
    FLAGS,
    QUERIES,
    SEPARATE,
    Inside,
    arguments,
    inside,
    layer_with,
    mask_of,
    normal,
    padding_of,
    tensors,
)

ALL_MASKS = {"attn_mask": mask_of("3-D float").detach(), "key_padding_mask": padding_of("float").detach()}


# What a mode sees.


def computing(seen):
    names = [name.rsplit(".", 1)[-1] for name in seen if not name.endswith("__get__")]
    return [name for name in names if name not in {"dim", "size", "is_floating_point"}]


IN, SPLIT = ["chunk", "chunk", "linear", "linear", "linear"], ["view", "transpose"]
OUT = ["reshape", "linear", "view"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"need_weights": False},
            [*IN, *SPLIT * 3, *["view"] * 3, "scaled_dot_product_attention", "permute", *OUT],
        ),
        (
            {"need_weights": True},
            [*IN, *SPLIT * 3, "mul", "transpose", "bmm", "softmax", "bmm", "transpose", *OUT, "view", "mean"],
        ),
        (
            {**BIASES, **ALL_MASKS, "add_zero_attn": True, "need_weights": True, "dropout_p": 0.1},
            [
                *(*IN, "repeat", "cat", "repeat", "cat", "pad", "pad", *SPLIT * 3, "zeros", "cat", "zeros", "cat"),
                *(
                    "pad",
                    "pad",
                    "view",
                    "expand",
                    "reshape",
                    "add",
                    "mul",
                    "transpose",
                    "baddbmm",
                    "softmax",
                    "dropout",
                ),
                *("bmm", "transpose", *OUT, "view", "mean"),
            ],
        ),
        (
            {"attn_mask": mask_of("2-D bool"), "need_weights": False, "in_proj_bias": None, **SEPARATE},
            [
                *("zeros_like", "masked_fill_", "linear", "linear", "linear", "unsqueeze", *SPLIT * 3, "unsqueeze"),
                *(*["view"] * 3, "scaled_dot_product_attention", "permute", *OUT),
            ],
        ),
    ],
    ids=["no weights", "weights", "all", "separate"],
)
def test_a_mode_sees_each_step(changes, expected):
    # Quantizers are named and placed by these: another order would move those of saved models.
    given = arguments(**changes)
    with Inside() as mode:
        F.multi_head_attention_forward(**given)
    assert computing(mode.seen) == expected


@pytest.mark.parametrize("need_weights", FLAGS)
def test_what_the_user_has_put_in_the_place_of_a_step_is_called(need_weights, monkeypatch):
    name = "softmax" if need_weights else "scaled_dot_product_attention"
    original, asked = getattr(F, name), []
    monkeypatch.setattr(F, name, lambda *args, **kwargs: asked.append(name) or original(*args, **kwargs))
    inside(**arguments(need_weights=need_weights))
    assert asked == [name]


# Who traces it.


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        known = {**arguments(), **SEPARATE, **options}
        self.names = [name for name in known if torch.is_tensor(known[name]) and name not in {"query", "key", "value"}]
        for name in self.names:
            self.register_buffer(name, known[name].detach())
        others = {"query", "key", "value", *self.names}
        self.constants = {name: value for name, value in known.items() if name not in others}

    def forward(self, query, key, value, attn_mask, key_padding_mask):
        weights = {name: getattr(self, name) for name in self.names}
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        return inside(query, key, value, **weights, **masks, **self.constants)


MASKED = (mask_of("2-D bool"), padding_of("bool"))


@pytest.mark.parametrize("need_weights", FLAGS)
@pytest.mark.parametrize("masks", [(None, None), MASKED], ids=["no masks", "masks"])
def test_compiled_and_exported_it_gives_the_same(need_weights, masks):
    model = Attention(**BIASES, add_zero_attn=True, need_weights=need_weights)
    inputs = (*(x.detach() for x in tensors()), *masks)
    expected = model(*inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    runs = [compiled, *(torch.export.export(model, inputs, strict=strict).module() for strict in FLAGS)]
    for found in (function(*inputs) for function in runs):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Wired(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = layer_with(add_bias_kv=True, add_zero_attn=True, **options)

    def forward(self, query, key, value, attn_mask, key_padding_mask, need_weights):
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        return self.attention(query, key, value, **masks, need_weights=need_weights)[0]


@pytest.mark.parametrize("need_weights", FLAGS)
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}], ids=["packed", "separate"])
@pytest.mark.parametrize("batched", FLAGS)
def test_with_a_transform_inside_it_is_compiled_as_a_whole(sizes, need_weights, batched):
    model, (attn_mask, padding) = Wired(**sizes), MASKED
    inputs = [x.detach() if batched else x[:, 1].detach() for x in tensors(**sizes)]
    place = CallInput("attention", "torch.nn.functional.linear", calls(3, (0, 1, 2, 3)), (0,))
    unscaled = model(*inputs, attn_mask, padding if batched else padding[1], need_weights)
    add(model, place, Scale(0.5))
    bias = model.attention.out_proj.bias
    torch.compiler.reset()
    for function in (model, torch.compile(model, fullgraph=True, backend="eager")):
        found = function(*inputs, attn_mask, padding if batched else padding[1], need_weights)
        torch.testing.assert_close(found, (unscaled + bias) / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("need_weights", FLAGS)
@pytest.mark.parametrize("masks", [(None, None), MASKED], ids=["no masks", "masks"])
def test_sizes_may_change_after_export(need_weights, masks):
    model = Attention(need_weights=need_weights)
    batch, keys = torch.export.Dim("batch", max=64), torch.export.Dim("keys", max=64)
    shapes = ({1: batch}, {0: keys, 1: batch}, {0: keys, 1: batch})
    shapes += (None, None) if masks[0] is None else ({1: keys}, {0: batch, 1: keys})
    inputs = (*(x.detach() for x in tensors()), *masks)
    exported = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False).module()
    others = (normal(QUERIES, 2, FEATURES), normal(9, 2, FEATURES, seed=1), normal(9, 2, FEATURES, seed=2))
    others += (None, None) if masks[0] is None else (torch.zeros(QUERIES, 9).bool(), torch.arange(9).expand(2, 9) > 6)
    torch.testing.assert_close(exported(*others), model(*others), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("need_weights", FLAGS)
def test_function_transforms_see_through_it(need_weights):
    given = arguments(**ALL_MASKS, need_weights=need_weights)
    queries = torch.stack([given["query"].detach(), normal(QUERIES, BATCH, FEATURES, seed=40)])

    def loss(query, weight):
        return inside(**{**given, "query": query, "in_proj_weight": weight})[0].square().sum()

    def reference(query, weight):
        return F.multi_head_attention_forward(**{**given, "query": query, "in_proj_weight": weight})[0].square().sum()

    weight = given["in_proj_weight"].detach()
    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(queries, weight)
    for index, query in enumerate(queries):
        leaves = [query.clone().requires_grad_(), weight.clone().requires_grad_()]
        expected = torch.autograd.grad(reference(*leaves), leaves)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[index], other, rtol=1e-12, atol=1e-12)


# Whose inside it is.


def test_other_functions_have_no_inside():
    assert inside_of(F.linear) is None
    assert inside_of(F.scaled_dot_product_attention) is None
    assert inside_of(None) is None


def test_attention_that_was_replaced_is_one_call(monkeypatch):
    monkeypatch.setattr(F, "multi_head_attention_forward", lambda query, *_, **__: (query * 2, None))
    query, key, value = tensors()
    with Inside() as mode:
        assert torch.equal(layer_with()(query, key, value)[0], query * 2)
    assert not mode.replaced


@pytest.mark.parametrize(
    "signature", ["query, *others", "*given, new=None", None], ids=["fewer arguments", "a new argument", "torch's own"]
)
def test_attention_of_a_torch_that_takes_other_arguments_is_one_call(signature):
    code = "import torch; from torch.nn import functional as F\n"
    if signature is not None:
        code += f"exec('def multi_head_attention_forward({signature}): pass', vars(F))\n"
    code += "from compress_core.transforms.attention import inside_of\n"
    code += f"assert (inside_of(F.multi_head_attention_forward) is None) is {signature is not None}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
