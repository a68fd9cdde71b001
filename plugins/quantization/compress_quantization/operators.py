"""Classifies functions of torch for quantization: the kind of operator of each, and the roles of its arguments.

A function is known by the last part of its name, without the underscore of in-place variants: `torch.add`,
`torch.Tensor.add`, `torch.Tensor.add_` and `+` are all `add`.
"""

from __future__ import annotations

from compress_core.trace import Call
from compress_core.transforms.places import Path

# Function -> kind, as the profiles list kinds.
_KINDS: dict[str, str] = {
    **{f"{name}{n}d": f"{name}{n}d" for name in ("conv", "conv_transpose") for n in (1, 2, 3)},
    "linear": "linear",
    "bilinear": "linear",
    "embedding": "embedding",
    "embedding_bag": "embedding",
    **dict.fromkeys(("matmul", "mm", "bmm", "baddbmm", "addmm", "addbmm", "einsum", "mv", "__rmatmul__"), "matmul"),
    **dict.fromkeys(("add", "__radd__"), "add"),
    **dict.fromkeys(("sub", "subtract", "rsub", "__rsub__"), "sub"),
    **dict.fromkeys(("mul", "multiply", "__rmul__"), "mul"),
    **dict.fromkeys(("div", "divide", "true_divide", "__rdiv__", "__rtruediv__"), "div"),
    **dict.fromkeys(("min", "minimum", "fmin"), "min"),
    **dict.fromkeys(("max", "maximum", "fmax"), "max"),
    **dict.fromkeys(("pow", "square", "__rpow__"), "pow"),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), "compare"),
    "mean": "mean",
    "sum": "sum",
    **dict.fromkeys(("norm", "vector_norm", "normalize"), "norm"),
    **{f"{prefix}avg_pool{n}d": "avg_pool" for prefix in ("", "adaptive_") for n in (1, 2, 3)},
    **dict.fromkeys(("interpolate", "upsample", "grid_sample"), "interpolate"),
    "layer_norm": "layer_norm",
    "rms_norm": "layer_norm",
    **dict.fromkeys(("group_norm", "instance_norm"), "group_norm"),
    "batch_norm": "batch_norm",
    "scaled_dot_product_attention": "scaled_dot_product_attention",
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"), "rnn"),
    **dict.fromkeys(("rnn_tanh_cell", "rnn_relu_cell"), "rnn"),
    "round": "round",
    **dict.fromkeys(("cat", "concat", "concatenate", "hstack", "vstack", "stack"), "concat"),
}

KINDS = tuple(sorted({*_KINDS.values(), "interpolate_nearest", "pixel_shuffle"}))
"""The kinds of operators that profiles of devices can list."""

# Functions that do not change values, only shape or order, so a quantizer before them is as good as one after.
_TRANSPARENT = frozenset(
    [f"{prefix}max_pool{n}d" for prefix in ("", "adaptive_") for n in (1, 2, 3)]
    + [f"{prefix}dropout{n}" for prefix in ("", "alpha_", "feature_", "feature_alpha_") for n in ("", "1d", "2d", "3d")]
    + ["max_unpool1d", "max_unpool2d", "max_unpool3d"]
    # shapes
    + ["reshape", "reshape_as", "view", "view_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze"]
    # orders
    + ["transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "T", "mT", "H", "mH", "roll"]
    + ["flip", "adjoint", "rot90", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"]
    # parts
    + ["split", "split_with_sizes", "tensor_split", "chunk", "unbind", "select", "narrow", "index_select", "gather"]
    + ["take", "take_along_dim", "diagonal", "__getitem__", "unfold"]
    # copies
    + ["expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave", "contiguous", "clone", "detach"]
    + ["alias", "zero_pad2d", "data"]
)

# Those that may put other values to an index of the first two dimensions, even where these keep their sizes.
_MIXING = frozenset(
    [
        "transpose",
        "swapaxes",
        "swapdims",
        "permute",
        "movedim",
        "moveaxis",
        "t",
        "T",
        "mT",
        "H",
        "roll",
        "flip",
        "rot90",
    ]
    + ["channel_shuffle", "index_select", "gather", "take", "take_along_dim", "__getitem__", "repeat_interleave"]
)

# Elementwise activation functions, which a runtime fuses with a preceding weighted or arithmetic operator.
_ACTIVATIONS = frozenset(
    ["relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid"]
    + ["logsigmoid", "tanh", "hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softplus", "softsign", "threshold"]
    + ["clamp", "clip", "clamp_min", "clamp_max"]
)

ACTIVATION_NAMES = tuple(sorted(_ACTIVATIONS))

LINEAR_KINDS = frozenset(
    [f"{name}{n}d" for name in ("conv", "conv_transpose") for n in (1, 2, 3)] + ["linear", "matmul", "rnn", "embedding"]
)
ARITHMETIC_KINDS = frozenset(["add", "sub", "mul", "div"])

# The arguments of an operator that are activations, if not all its tensor arguments are.
_DATA_ARGUMENTS: dict[str, tuple[int | str, ...]] = {
    **dict.fromkeys(LINEAR_KINDS - {"matmul"}, (0, "input")),
    **dict.fromkeys(("layer_norm", "group_norm", "batch_norm", "interpolate"), (0, "input")),
    "scaled_dot_product_attention": (0, 1, 2, "query", "key", "value"),
}

# Arguments that are positions in another tensor, such as the places at which an image is sampled.
_POSITION_ARGUMENTS: dict[str, tuple[int | str, ...]] = {
    **dict.fromkeys(("grid_sample", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), (1, "grid")),
    **dict.fromkeys(("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"), (1, "boxes", "rois")),
    "deform_conv2d": (1, 2, "offset"),  # the function of Python has it second, the operator third
}

# Functions whose result depends on small absolute differences of large arguments, or grows without bounds with them.
_SENSITIVE = frozenset(
    ["sin", "cos", "tan", "sinc", "exp", "exp2", "expm1", "__rpow__", "log", "log2", "log10", "log1p", "logit"]
    + ["floor", "ceil", "trunc", "frac", "fmod", "remainder", "__rmod__", "floor_divide", "__rfloordiv__"]
)
_PERIODIC = frozenset(["sin", "cos"])

# Functions that read only the shape or the dtype of their first tensor, and those that do so with all others.
_READS_SHAPE = frozenset([f"{n}_like" for n in ("full", "zeros", "ones", "empty")]) | {
    f"new_{n}" for n in ("full", "zeros", "ones", "empty", "tensor", "empty_strided")
}
_READS_FIRST = frozenset(["expand_as", "view_as", "reshape_as", "type_as", "to"])

_RANDOM = frozenset(
    ["rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "random", "normal", "uniform"]
    + ["bernoulli", "multinomial", "poisson", "exponential", "cauchy", "log_normal", "geometric"]
)

# Products whose first argument is added like a bias.
_WITH_ADDEND = frozenset({"addmm", "addbmm", "baddbmm"})

# The argument of an operator that is its weight.
_WEIGHT_ARGUMENTS = (1, "weight")


def base_name(function: str) -> str:
    """Returns the last part of a function's name, without the underscore of in-place variants."""
    parts = function.split(".")
    name = parts[-2] if parts[-1] == "__get__" else parts[-1]
    return name if name.startswith("__") else name.rstrip("_")


def kind_of(function: str) -> str:
    """Returns the kind of an operator, or the empty string if profiles do not list it."""
    return _KINDS.get(base_name(function), "")


def kinds_of(call: Call) -> tuple[str, ...]:
    """Returns the kinds of operators as which a profile may list a call; the first one that it lists is meant."""
    kind = kind_of(call.function)
    if kind != "interpolate" or base_name(call.function) == "grid_sample":
        return (kind,)
    mode = call.keywords.get("mode", call.arguments[3] if len(call.arguments) > 3 else "nearest")
    return (kind, "interpolate_nearest") if mode in ("nearest", "nearest-exact") else (kind,)


def is_transparent(call: Call) -> bool:
    """Returns whether a call only moves values without changing them."""
    name = base_name(call.function)
    if name == "pad":
        return _pads_with_zeros(call)
    # A change of device or memory format, but not of dtype.
    if name in ("to", "type_as", "cpu", "cuda", "float", "type"):
        return bool(call.outputs) and not call.results
    return name in _TRANSPARENT


def keeps_leading_dimensions(call: Call) -> bool:
    """Returns whether a transparent call leaves dimensions 0 and 1 as they are where it keeps their sizes."""
    return base_name(call.function) not in _MIXING


def _pads_with_zeros(call: Call) -> bool:
    mode = call.keywords.get("mode", call.arguments[2] if len(call.arguments) > 2 else "constant")
    value = call.keywords.get("value", call.arguments[3] if len(call.arguments) > 3 else 0)
    # Zero is on every grid, and the other modes repeat existing values.
    return mode != "constant" or not value


def is_activation(function: str) -> bool:
    """Returns whether a function is an element-wise activation function."""
    return base_name(function) in _ACTIVATIONS


def is_data_argument(call: Call, path: Path) -> bool:
    """Returns whether a tensor argument of a call is an activation (and not a weight, a bias or a statistic)."""
    wanted = _DATA_ARGUMENTS.get(kind_of(call.function))
    if base_name(call.function) == "bilinear":
        return path[0] in (0, 1, "input1", "input2")
    if base_name(call.function) in _WITH_ADDEND:
        return path[0] not in (0, "input")
    return wanted is None or path[0] in wanted


def is_mask_argument(call: Call, path: Path) -> bool:
    """Returns whether a tensor argument of a call is a mask that is added to the scores of attention."""
    name = base_name(call.function)
    if name == "scaled_dot_product_attention":
        return path[0] in (3, "attn_mask")
    return name == "baddbmm" and path[0] in (0, "input")


def is_position_argument(call: Call, path: Path) -> bool:
    """Returns whether a tensor argument of a call holds positions in another tensor, as an index does."""
    return path[0] in _POSITION_ARGUMENTS.get(base_name(call.function), ())


def is_sensitive(function: str) -> bool:
    """Returns whether a function needs its argument exactly, like sin, exp and floor."""
    return base_name(function) in _SENSITIVE


def is_periodic(function: str) -> bool:
    """Returns whether a function is a sine or a cosine."""
    return base_name(function) in _PERIODIC


def reads_values(call: Call, path: Path) -> bool:
    """Returns whether a call reads the values of a tensor argument, and not its shape or dtype alone."""
    name, is_first = base_name(call.function), path[0] in (0, "input", "self")
    return not (name in _READS_SHAPE and is_first) and (is_first or name not in _READS_FIRST)


def is_random(function: str) -> bool:
    """Returns whether a function draws random numbers."""
    return base_name(function) in _RANDOM


def is_weight_argument(call: Call, path: Path) -> bool:
    """Returns whether a tensor argument of a call is the weight of a convolution, a linear layer or an embedding."""
    kind = kind_of(call.function)
    if base_name(call.function) == "bilinear":
        return path[0] in (2, "weight")
    if kind == "embedding":
        # F.embedding(input, weight), but torch.embedding(weight, input).
        return path[0] in ((1, "weight") if call.function.startswith("torch.nn.functional") else (0, "weight"))
    return kind in LINEAR_KINDS - {"matmul", "rnn"} and path[0] in _WEIGHT_ARGUMENTS
