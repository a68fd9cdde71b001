"""Multi-head attention whose inner function calls are visible to function modes.

`nn.MultiheadAttention` calls a single function of torch. A function mode sees only that call, and not the projections
and products inside. This module has a function with the same arguments and results that makes a visible call for each
step.

Activation quantizers are placed at and named after these calls, counted per function. Saved models and users' scopes
refer to the calls, their order and their positional arguments, so these must depend only on the options of the layer,
never on the tensors. Functions are looked up at each call, because users replace some of them, such as
scaled_dot_product_attention, by faster ones.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def inside_of(function: Any) -> Callable[..., Any] | None:
    """Returns a function that computes the same as a function of torch, by calls that a function mode can see.

    Args:
        function: A function as the mode receives it.

    Returns:
        The function to call while the mode is active; None for functions that need no replacement.
    """
    return _multi_head_attention if function is _WHOLE and _IS_KNOWN else None


class _Sizes(NamedTuple):
    queries: int  # in each sequence
    batch: int
    heads: int
    width: int  # features of each head


class _Projections(NamedTuple):
    """Weights, or biases, of the three projections."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None


class _Keys(NamedTuple):
    """Keys and values, and the masks that are added to their scores."""

    key: Tensor
    value: Tensor
    mask: Tensor | None  # (1 or batch * heads, queries, keys)
    padding: Tensor | None  # (batch, keys)


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    is_batched = _check_dimensions(query, key, value, attn_mask, key_padding_mask, num_heads)
    if not is_batched:
        query, key, value, key_padding_mask = _as_batch_of_one(query, key, value, key_padding_mask)
    padding = _summand(key_padding_mask, "key_padding_mask", query.dtype, attn_mask)
    is_causal = is_causal and _kernel_can_mask(attn_mask, padding, need_weights)
    mask = None if is_causal else _summand(attn_mask, "attn_mask", query.dtype)
    sizes = _sizes_of(query, key, value, embed_dim_to_check, num_heads, use_separate_proj_weight)
    _check_static(static_k, static_v, bias_k, bias_v, sizes)
    separate = _Projections(q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    projected = _project(query, key, value, in_proj_weight, separate, in_proj_bias)
    mask = _in_three_dimensions(mask, sizes, key.shape[0])
    keys = _add_learned_key(_Keys(projected[1], projected[2], mask, padding), bias_k, bias_v, sizes)
    query, keys = _split_heads(projected[0], keys, static_k, static_v, sizes)
    keys = _add_zero_key(keys, sizes) if add_zero_attn else keys
    dropout, probabilities = dropout_p if training else 0.0, None
    if need_weights:
        output, probabilities = _attend_in_steps(query, keys, sizes, dropout)
    else:
        output = _attend(query, keys, sizes, dropout, is_causal)
    del projected, query, keys  # frees memory for the last projection
    output = _project_out(output, out_proj_weight, out_proj_bias, sizes)
    return _results(output, probabilities, average_attn_weights, is_batched, sizes)


def _is_known(function: Any) -> bool:
    # A replacement by the user, or the function of a torch with other arguments, is called as a whole.
    if not isinstance(function, FunctionType):
        return False
    if function.__globals__ is not vars(functional) or function.__closure__ is not None:
        return False
    theirs, ours = inspect.signature(function).parameters, inspect.signature(_multi_head_attention).parameters
    facts = [[(p.name, p.kind, p.default) for p in parameters.values()] for parameters in (theirs, ours)]
    return facts[0] == facts[1]


_WHOLE: Any = functional.multi_head_attention_forward
_IS_KNOWN = _is_known(_WHOLE)


def _as_batch_of_one(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    padding = None if padding is None else padding.unsqueeze(0)
    return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), padding


# Checks. They raise the same types of exceptions as torch, because callers may catch these.


def _check_dimensions(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, heads: int
) -> bool:
    """Returns whether there is a dimension for the batch."""
    dimensions = query.dim()
    if dimensions not in (2, 3):
        raise AssertionError(f"query has {dimensions} dimensions; expected are 3, or 2 for a single sequence")
    if key.dim() != dimensions or value.dim() != dimensions:
        found = f"key has {key.dim()} dimensions and value {value.dim()}"
        raise AssertionError(f"{found}; expected are {dimensions}, as many as query has")
    if padding is not None and padding.dim() != dimensions - 1:
        expected = f"expected is {dimensions - 1}, one less than query has"
        raise AssertionError(f"key_padding_mask has {padding.dim()} dimensions; {expected}")
    if mask is None:
        return dimensions == 3
    if mask.dim() not in (2, 3):
        raise AssertionError(f"attn_mask has {mask.dim()} dimensions; expected are 2 or 3")
    if dimensions == 2 and mask.dim() == 3:
        shape = (heads, query.shape[0], key.shape[0])
        if mask.shape != shape:
            raise AssertionError(f"the shape of attn_mask is {tuple(mask.shape)}, expected is {shape}")
    return dimensions == 3


def _sizes_of(
    query: Tensor, key: Tensor, value: Tensor, features: int, heads: int, features_may_differ: bool
) -> _Sizes:
    length, batch, found = query.shape
    if found != features:
        raise AssertionError(f"query has {found} features, expected are {features}")
    if features % heads:
        raise AssertionError(f"{features} features cannot be split over {heads} heads")
    compared = 2 if features_may_differ else 3
    if key.shape[:compared] != value.shape[:compared]:
        raise AssertionError(
            f"key has the shape {tuple(key.shape)}, which does not match {tuple(value.shape)} of value"
        )
    return _Sizes(length, batch, heads, features // heads)


def _check_static(
    key: Tensor | None, value: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, sizes: _Sizes
) -> None:
    if (bias_k is None) != (bias_v is None):
        raise AssertionError("only one of bias_k and bias_v is given; expected are both or none")
    for name, static in (("static_k", key), ("static_v", value)):
        if static is None:
            continue
        if bias_k is not None:
            raise AssertionError(f"bias_k and bias_v cannot be added to {name}")
        found, expected = (static.size(0), static.size(2)), (sizes.batch * sizes.heads, sizes.width)
        if found != expected:
            raise AssertionError(f"{name} has the sizes {found} in dimensions 0 and 2, expected are {expected}")


def _check_projections(inputs: tuple[Tensor, Tensor, Tensor], weights: _Projections, biases: _Projections) -> None:
    features = inputs[0].shape[2]
    for name, x, weight, bias in zip(_Projections._fields, inputs, weights, biases, strict=True):
        shape = (features, x.shape[2])
        if weight is not None and weight.shape != shape:
            raise AssertionError(f"the weight for {name} has the shape {tuple(weight.shape)}, expected is {shape}")
        if bias is not None and bias.shape != (features,):
            raise AssertionError(f"the bias for {name} has the shape {tuple(bias.shape)}, expected is {(features,)}")


# Masks. They are added to the scores, with -inf at positions that are masked out.


def _summand(mask: Tensor | None, name: str, dtype: torch.dtype, other: Tensor | None = None) -> Tensor | None:
    if mask is None:
        return None
    is_float = mask.is_floating_point()
    if mask.dtype != torch.bool and not is_float:
        raise AssertionError(f"{name} holds {mask.dtype}; expected are torch.bool or a floating type")
    if other is not None and other.dtype != mask.dtype:
        warnings.warn(f"Masks of two types ({mask.dtype}, {other.dtype}) are deprecated: use one.", stacklevel=2)
    return mask if is_float else torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _kernel_can_mask(mask: Tensor | None, padding: Tensor | None, need_weights: bool) -> bool:
    """Returns whether the kernel applies the causal mask itself, so that `mask` need not be read."""
    if mask is None:
        raise RuntimeError("is_causal is set and attn_mask is None; give the causal mask as well")
    return padding is None and not need_weights


def _in_three_dimensions(mask: Tensor | None, sizes: _Sizes, keys: int) -> Tensor | None:
    if mask is None:
        return None
    one_for_all = mask.dim() == 2
    shape = (sizes.queries, keys) if one_for_all else (sizes.batch * sizes.heads, sizes.queries, keys)
    if mask.shape != shape:
        raise RuntimeError(f"the shape of attn_mask is {tuple(mask.shape)}, expected is {shape}")
    return mask.unsqueeze(0) if one_for_all else mask


def _for_one_more(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else functional.pad(mask, (0, 1))


def _merged_mask(keys: _Keys, sizes: _Sizes) -> Tensor | None:
    padding = keys.padding
    if padding is None:
        return keys.mask
    batch, heads, count = sizes.batch, sizes.heads, keys.key.size(1)
    # Under torch.jit.trace, sizes are tensors.
    if not torch.jit.is_tracing() and padding.shape != (batch, count):  # type: ignore[attr-defined, no-untyped-call]
        raise AssertionError(f"the shape of key_padding_mask is {tuple(padding.shape)}, expected is {(batch, count)}")
    padding = padding.view(batch, 1, 1, count).expand(-1, heads, -1, -1).reshape(batch * heads, 1, count)
    return padding if keys.mask is None else keys.mask + padding


# Projections, keys and heads.


def _in_three(packed: Tensor | None) -> _Projections:
    if packed is None:
        return _Projections(None, None, None)
    query, key, value = packed.chunk(3)
    return _Projections(query, key, value)


def _project(
    query: Tensor, key: Tensor, value: Tensor, packed: Tensor | None, separate: _Projections | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    # torch computes one, two or three products, depending on which of the tensors are the same object. Here it is
    # always three: places count calls, and quantizers must not move to other tensors in a later forward.
    weights, biases = _in_three(packed) if separate is None else separate, _in_three(bias)
    if weights.query is None or weights.key is None or weights.value is None:
        raise AssertionError("a weight of the projections is None; expected are in_proj_weight or three separate ones")
    if separate is not None:
        _check_projections((query, key, value), weights, biases)
    linear = functional.linear
    # Not in a loop, because all iterations of a loop are one place.
    projected_query = linear(query, weights.query, biases.query)
    projected_key = linear(key, weights.key, biases.key)
    projected_value = linear(value, weights.value, biases.value)
    return projected_query, projected_key, projected_value


def _add_learned_key(keys: _Keys, bias_k: Tensor | None, bias_v: Tensor | None, sizes: _Sizes) -> _Keys:
    if bias_k is None or bias_v is None:
        return keys
    key = torch.cat([keys.key, bias_k.repeat(1, sizes.batch, 1)])
    value = torch.cat([keys.value, bias_v.repeat(1, sizes.batch, 1)])
    return _Keys(key, value, _for_one_more(keys.mask), _for_one_more(keys.padding))


def _split_heads(
    query: Tensor, keys: _Keys, static_k: Tensor | None, static_v: Tensor | None, sizes: _Sizes
) -> tuple[Tensor, _Keys]:
    """Splits tensors into heads; returns them in shape (batch * heads, queries or keys, width)."""
    rows, width = sizes.batch * sizes.heads, sizes.width
    key, value, mask, padding = keys
    query = query.view(sizes.queries, rows, width).transpose(0, 1)
    key = key.view(key.shape[0], rows, width).transpose(0, 1) if static_k is None else static_k
    value = value.view(value.shape[0], rows, width).transpose(0, 1) if static_v is None else static_v
    return query, _Keys(key, value, mask, padding)


def _add_zero_key(keys: _Keys, sizes: _Sizes) -> _Keys:
    shape = (sizes.batch * sizes.heads, 1, sizes.width)
    key, value, mask, padding = keys
    key = torch.cat([key, torch.zeros(shape, dtype=key.dtype, device=key.device)], dim=1)
    value = torch.cat([value, torch.zeros(shape, dtype=value.dtype, device=value.device)], dim=1)
    return _Keys(key, value, _for_one_more(mask), _for_one_more(padding))


# Attention itself.


def _attend(query: Tensor, keys: _Keys, sizes: _Sizes, dropout: float, is_causal: bool) -> Tensor:
    """Returns the attention output in shape (queries, batch, heads, width)."""
    mask = _merged_mask(keys, sizes)
    batch, heads, count, width = sizes.batch, sizes.heads, keys.key.size(1), sizes.width
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.size(0) == 1 else mask.view(batch, heads, -1, count)
    query = query.view(batch, heads, sizes.queries, width)
    key = keys.key.view(batch, heads, count, width)
    value = keys.value.view(batch, heads, count, width)
    output = functional.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal)
    return output.permute(2, 0, 1, 3)


def _attend_in_steps(query: Tensor, keys: _Keys, sizes: _Sizes, dropout: float) -> tuple[Tensor, Tensor]:
    """Returns the attention output in shape (queries, batch * heads, width), and the attention probabilities."""
    mask = _merged_mask(keys, sizes)
    scaled, transposed = query * math.sqrt(1.0 / sizes.width), keys.key.transpose(-2, -1)
    scores = torch.bmm(scaled, transposed) if mask is None else torch.baddbmm(mask, scaled, transposed)
    probabilities = functional.softmax(scores, dim=-1)
    if dropout > 0.0:
        probabilities = functional.dropout(probabilities, p=dropout)
    return torch.bmm(probabilities, keys.value).transpose(0, 1), probabilities


def _project_out(output: Tensor, weight: Tensor, bias: Tensor | None, sizes: _Sizes) -> Tensor:
    output = output.reshape(sizes.queries * sizes.batch, sizes.heads * sizes.width)
    output = functional.linear(output, weight, bias)
    return output.view(sizes.queries, sizes.batch, output.size(1))


def _results(
    output: Tensor, probabilities: Tensor | None, average: bool, is_batched: bool, sizes: _Sizes
) -> tuple[Tensor, Tensor | None]:
    if probabilities is not None:
        probabilities = probabilities.view(sizes.batch, sizes.heads, sizes.queries, probabilities.size(2))
        probabilities = probabilities.mean(dim=1) if average else probabilities
    if is_batched:
        return output, probabilities
    return output.squeeze(1), None if probabilities is None else probabilities.squeeze(0)
