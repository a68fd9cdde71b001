"""Arguments for torch's multi-head attention and for the function that stands for it."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from compress_core.transforms.attention import inside_of

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


FLAGS = (False, True)


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
