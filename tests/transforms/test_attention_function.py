"""The function that stands for torch's multi-head attention while a function mode is active."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from compress_core.transforms import CallInput
from compress_core.transforms.attention import inside_of
from tests.activation_helpers import Scale, add, calls

FEATURES, HEADS, BATCH, QUERIES, KEYS = 8, 2, 3, 4, 5
inside = inside_of(F.multi_head_attention_forward)


class Inside(TorchFunctionMode):
    """Runs the inside of attention, and notes what it calls."""

    def __init__(self):
        super().__init__()
        self.seen, self.replaced = [], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (function := inside_of(func)) is not None:
            self.replaced += 1
            with self:
                return function(*args, **(kwargs or {}))
        self.seen.append(resolve_name(func) or str(func))
        return func(*args, **(kwargs or {}))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_with(**options):
    """Returns a layer none of whose parameters is zero."""
    layer = nn.MultiheadAttention(FEATURES, HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=index))
    return layer


def tensors(kdim=None, vdim=None, keys=KEYS):
    sizes = ((QUERIES, FEATURES), (keys, kdim or FEATURES), (keys, vdim or FEATURES))
    return [normal(length, BATCH, size, seed=10 + i).requires_grad_() for i, (length, size) in enumerate(sizes)]


def mask_of(kind, keys=KEYS, rows=BATCH * HEADS):
    """Returns a mask that leaves each query some key."""
    shape = (QUERIES, keys) if "2-D" in kind or kind == "causal" else (rows, QUERIES, keys)
    if kind == "causal":
        return torch.ones(shape, dtype=torch.bool).triu(1)
    mask = normal(*shape, seed=20)
    if "float" in kind:
        return mask.requires_grad_()
    mask = mask > 0
    mask[..., 0] = False
    return mask


def padding_of(kind, keys=KEYS):
    if kind == "float":
        return normal(BATCH, keys, seed=21).requires_grad_()
    return torch.arange(keys) >= torch.tensor([[keys], [2], [1]])


def run(layer, inputs, kwargs):
    """Returns the results of the layer, and their gradients with respect to all that needs some."""
    torch.manual_seed(0)
    results = [result for result in layer(*inputs, **kwargs) if result is not None]
    leaves = [x for x in (*inputs, *kwargs.values(), *layer.parameters()) if torch.is_tensor(x) and x.requires_grad]
    loss = sum((result * normal(*result.shape, seed=30 + i)).sum() for i, result in enumerate(results))
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return results, [gradient for gradient in gradients if gradient is not None]


def run_both(layer, inputs, kwargs):
    expected, mode = run(layer, inputs, kwargs), Inside()
    with mode:
        found = run(layer, inputs, kwargs)
    assert mode.replaced == 1
    assert [len(part) for part in found] == [len(part) for part in expected]
    return list(zip(itertools.chain(*found), itertools.chain(*expected), strict=True))


FLAGS = (False, True)
WEIGHTS = {
    "no weights": {"need_weights": False},
    "averaged": {"need_weights": True},
    "by head": {"need_weights": True, "average_attn_weights": False},
}


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}], ids=["packed", "separate"])
@pytest.mark.parametrize("mask", ["no mask", "2-D bool", "2-D float", "3-D bool", "3-D float", "causal"])
@pytest.mark.parametrize("padding", ["no padding", "bool", "float"])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_all_options_give_bit_by_bit_what_torch_gives(sizes, mask, padding):
    # The tensors are three objects, of which torch, too, makes three products.
    keys = QUERIES if mask == "causal" else KEYS
    for bias, add_bias_kv, add_zero_attn, batched, dropout in itertools.product(FLAGS, FLAGS, FLAGS, FLAGS, (0.0, 0.3)):
        options = {"bias": bias, "add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn, "dropout": dropout}
        layer, inputs, masks = layer_with(**options, **sizes), tensors(**sizes, keys=keys), {}
        if mask != "no mask":
            masks = {"attn_mask": mask_of(mask, keys, HEADS * (BATCH if batched else 1)), "is_causal": mask == "causal"}
        if padding != "no padding":
            masks["key_padding_mask"] = padding_of(padding, keys)
        if not batched:
            inputs = [x[:, 1] for x in inputs]
            masks |= {"key_padding_mask": masks["key_padding_mask"][1]} if "key_padding_mask" in masks else {}
        for kind, weights in WEIGHTS.items():
            for found, expected in run_both(layer, inputs, {**masks, **weights}):
                assert torch.equal(found, expected), (options, batched, kind)


@pytest.mark.parametrize("objects", ["self", "cross"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("batch_first", FLAGS)
@pytest.mark.parametrize("batched", FLAGS)
def test_tensors_that_are_one_object_give_what_torch_gives(objects, weights, batch_first, batched):
    query, key, _ = tensors()
    if not batched:
        query, key = query[:, 0], key[:, 0]
    inputs = (query, query, query) if objects == "self" else (query, key, key)
    layer = layer_with(batch_first=batch_first, dropout=0.3)
    if batch_first and batched:
        inputs = (query, query, query) if objects == "self" else (query[:2], key[:2], key[:2])
    for found, expected in run_both(layer, inputs, WEIGHTS[weights]):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_nothing_is_dropped_in_evaluation(weights):
    for found, expected in run_both(layer_with(dropout=0.3).eval(), tensors(), WEIGHTS[weights]):
        assert torch.equal(found, expected)


# The function by itself.


def arguments(**changes):
    """Returns the arguments of the function for a packed layer without masks, by name."""
    layer, (query, key, value) = layer_with(), tensors()
    known = {"query": query, "key": key, "value": value, "embed_dim_to_check": FEATURES, "num_heads": HEADS}
    known |= {"in_proj_weight": layer.in_proj_weight, "in_proj_bias": layer.in_proj_bias, "bias_k": None}
    known |= {"bias_v": None, "add_zero_attn": False, "dropout_p": 0.0, "out_proj_weight": layer.out_proj.weight}
    return {**known, "out_proj_bias": layer.out_proj.bias, **changes}


SEPARATE = {
    "use_separate_proj_weight": True,
    "in_proj_weight": None,
    "q_proj_weight": normal(FEATURES, FEATURES),
    "k_proj_weight": normal(FEATURES, FEATURES, seed=1),
    "v_proj_weight": normal(FEATURES, FEATURES, seed=2),
}
BIASES = {"bias_k": normal(1, 1, FEATURES), "bias_v": normal(1, 1, FEATURES, seed=1)}
STATIC = normal(BATCH * HEADS, 7, FEATURES // HEADS, seed=5)
ALL_MASKS = {"attn_mask": mask_of("3-D float").detach(), "key_padding_mask": padding_of("float").detach()}


@pytest.mark.parametrize("need_weights", FLAGS)
@pytest.mark.parametrize("add_zero_attn", FLAGS)
@pytest.mark.parametrize(
    "static",
    [{"static_k": STATIC[:, :5]}, {"static_v": STATIC[:, :5]}, {"static_k": STATIC, "static_v": STATIC.flip(0)}],
    ids=["key", "value", "both"],
)
def test_static_keys_and_values_stand_for_the_projected_ones(static, add_zero_attn, need_weights):
    given = arguments(**static, add_zero_attn=add_zero_attn, need_weights=need_weights)
    for found, expected in zip(inside(**given), F.multi_head_attention_forward(**given), strict=True):
        assert found is expected is None or torch.equal(found, expected)


def test_a_mask_for_one_sequence_and_one_head_is_one_for_all():
    query = normal(QUERIES, 1, FEATURES)
    given = arguments(query=query, key=query, value=query, num_heads=1, attn_mask=normal(1, QUERIES, QUERIES, seed=1))
    expected = F.multi_head_attention_forward(**given, need_weights=False)[0]
    torch.testing.assert_close(inside(**given, need_weights=False)[0], expected, rtol=1e-12, atol=1e-12)


MISTAKES = {
    "query of one dimension": {"query": torch.ones(8)},
    "query of four dimensions": {"query": torch.ones(4, 3, 8, 1)},
    "key without batch": {"key": torch.ones(5, 8)},
    "value without batch": {"value": torch.ones(5, 8)},
    "key with batch": {"query": torch.ones(4, 8), "value": torch.ones(5, 8)},
    "padding of one dimension": {"key_padding_mask": torch.zeros(5)},
    "padding of three dimensions": {"key_padding_mask": torch.zeros(3, 5, 1)},
    "mask of one dimension": {"attn_mask": torch.zeros(5)},
    "mask of four dimensions": {"attn_mask": torch.zeros(3, 2, 4, 5)},
    "mask of other keys": {"attn_mask": torch.zeros(4, 6)},
    "mask of other heads": {"attn_mask": torch.zeros(3, 4, 5)},
    "mask of integers": {"attn_mask": torch.zeros(4, 5, dtype=torch.int64)},
    "padding of integers": {"key_padding_mask": torch.zeros(3, 5, dtype=torch.int64)},
    "padding of other keys": {"key_padding_mask": torch.zeros(3, 6)},
    "padding of another batch": {"key_padding_mask": torch.zeros(2, 5)},
    "causal without mask": {"is_causal": True},
    "features": {"embed_dim_to_check": 6},
    "heads": {"num_heads": 3},
    "length of key": {"key": normal(6, 3, 8)},
    "features of key": {"key": normal(5, 3, 6)},
    "features of key and value": {"key": normal(5, 3, 6), "value": normal(5, 3, 6)},
    "batch of key and value": {"key": normal(5, 2, 8), "value": normal(5, 2, 8)},
    "no packed weight": {"in_proj_weight": None},
    "packed weight of four": {"in_proj_weight": normal(32, 8)},
    "packed weight of one row": {"in_proj_weight": normal(1, 8)},
    "packed bias of two": {"in_proj_bias": normal(16)},
    "no query weight": {**SEPARATE, "q_proj_weight": None},
    "no key weight": {**SEPARATE, "k_proj_weight": None},
    "no value weight": {**SEPARATE, "v_proj_weight": None},
    "rows of query weight": {**SEPARATE, "q_proj_weight": normal(6, 8)},
    "columns of key weight": {**SEPARATE, "k_proj_weight": normal(8, 6)},
    "columns of value weight": {**SEPARATE, "v_proj_weight": normal(8, 6)},
    "separate weights and bias of two": {**SEPARATE, "in_proj_bias": normal(16)},
    "separate weights and length of key": {**SEPARATE, "key": normal(6, 3, 8)},
    "bias_k alone": {**BIASES, "bias_v": None},
    "bias_v alone": {**BIASES, "bias_k": None},
    "static key and bias": {**BIASES, "static_k": STATIC},
    "static value and bias": {**BIASES, "static_v": STATIC},
    "static key of another batch": {"static_k": STATIC[:4]},
    "static key of other features": {"static_k": STATIC[..., :3]},
    "static value of another batch": {"static_v": STATIC[:4]},
    "static value of other features": {"static_v": STATIC[..., :3]},
    "weight of output": {"out_proj_weight": normal(8, 6)},
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("need_weights", FLAGS)
def test_mistakes_raise_what_they_raise_in_torch(mistake, need_weights):
    given = arguments(**MISTAKES[mistake], need_weights=need_weights)
    with pytest.raises(Exception) as expected:
        F.multi_head_attention_forward(**given)
    with pytest.raises(expected.type) as found:
        inside(**given)
    assert found.type is expected.type


def test_a_mask_for_other_heads_of_a_single_sequence_raises_what_it_raises_in_torch():
    query, key, value = (x[:, 0] for x in tensors())
    given = arguments(query=query, key=key, value=value, attn_mask=torch.zeros(3, QUERIES, KEYS))
    for function in (inside, F.multi_head_attention_forward):
        with pytest.raises(AssertionError, match="shape"):
            function(**given)


def test_masks_of_two_types_are_warned_of():
    masks = {"attn_mask": mask_of("2-D float"), "key_padding_mask": padding_of("bool")}
    for function in (inside, F.multi_head_attention_forward):
        with pytest.warns(UserWarning, match="deprecated"):
            function(**arguments(**masks))


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
