"""All private names of torch that we use: what each is for, and what happens if torch removes it.

No other file of the core or of the built-in plugins uses private names of torch;
tests/torch_internals/test_one_place.py checks this in the sources. There is also a canary for each name, a test that
fails when torch changes its behaviour. Each name is documented with

    Why: what it is used for.
    Public way: what torch offers publicly, and why that is not enough.
    Without it: what happens if torch no longer has it.

Some private names are not listed here, because every library uses them to read and extend an `nn.Module`: the storage
`_parameters`, `_buffers` and `_modules`, which only the core reads; and the methods that subclasses override,
`_save_to_state_dict` and `_load_from_state_dict` (documented by torch for this) and `_apply`.

Importing this module is cheap, because torch's compiler is imported only when it is first needed.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame as _eval_frame
from torch._higher_order_ops import wrap
from torch._subclasses import fake_tensor
from torch.autograd import forward_ad
from torch.nn.modules import batchnorm, conv
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _python_dispatch, _pytree, checkpoint

__all__ = [
    "ASSIGN_ENTRY",
    "CHECKPOINT_OPERATOR",
    "FAKE_TENSOR_LOGGER",
    "HOOK_ATTRIBUTES",
    "LOW_LEVEL_FUNCTIONS",
    "MODULE_CALL",
    "PARAMETER_MARK",
    "TENSOR_HOOK_ATTRIBUTES",
    "AnyBatchNorm",
    "AnyConv",
    "AnyConvTranspose",
    "AnyNorm",
    "DispatchDisabled",
    "FakeTensor",
    "FakeTensorMode",
    "SubclassesDisabled",
    "TorchDispatchMode",
    "TorchFunctionDisabled",
    "add_own_forward_pre_hook",
    "checkpoint_of",
    "compile_graph",
    "computing_hooks",
    "default_store",
    "dynamo_callback",
    "frames_dynamo_traces",
    "function_mode_at",
    "function_mode_count",
    "global_hooks",
    "has_gradient_hooks",
    "has_hooks",
    "import_compiler",
    "is_any_autocast_enabled",
    "is_forward_mode",
    "is_plain_execution",
    "is_view",
    "may_set_saved_tensors_hooks",
    "onnx_translations_kept",
    "pop_function_mode",
    "push_function_mode",
    "recurrent_overrides",
    "remove_forward_hooks",
    "replica_override",
    "saved_tensors_hook",
    "schema_of",
    "skip_frame",
    "storage_identity",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "version_of",
]


# What surrounds the code that is running.


def is_plain_execution() -> bool:
    """Returns whether the present computation is not traced, wrapped or differentiated, other than by autograd.

    Why: recomputed weights and compiled kernels are right for plain tensors and plain execution only.
    Public way: none asks for dispatch modes or for transforms of `torch.func`; `torch.jit.is_tracing` knows its own.
    Without it: no execution counts as plain. All results stay right; the slower, traceable ways are taken.
    """
    try:
        return (
            torch._C._len_torch_dispatch_stack() == 0
            and torch._C._functorch.peek_interpreter_stack() is None
            and torch._C._get_tracing_state() is None
            and forward_ad._current_level < 0
        )
    except AttributeError:
        return False


def is_forward_mode() -> bool:
    """Returns whether derivatives are computed along with values (`torch.autograd.forward_ad`).

    Why: fake-quantization adds the terms that carry straight-through derivatives only if they are needed.
    Public way: `forward_ad.unpack_dual` tells whether one tensor is dual, but raises outside of a level.
    Without it: AttributeError in models that are traced; nothing else tells when the terms are needed.
    """
    return forward_ad._current_level >= 0


TorchDispatchMode = _python_dispatch.TorchDispatchMode
"""The base of modes that see ATen operators.

Why: the lower level of a trace.
Public way: none. torch's documentation of modes names this very class, in this private module.
Without it: compress_core cannot be imported; models cannot be traced.
"""

function_mode_count = torch._C._len_torch_function_stack
function_mode_at = torch._C._get_function_stack_at
pop_function_mode = torch._C._pop_torch_function_stack
push_function_mode = torch._C._push_on_torch_function_stack
"""The stack of active `TorchFunctionMode`s: how many, which at a position (0 is the outermost), and changing it.

Why: functions that transforms call must not count as calls of the model, so our modes are taken off for a while. Those
    of torch.export and of users stay, in their order.
Public way: leaving a mode's context, which works for the innermost one only and runs its `__exit__`.
Without it: compress_core cannot be imported; a call inside a transform would be transformed as one of the model.
"""

TorchFunctionDisabled = torch._C.DisableTorchFunction
"""A context in which neither function modes nor `__torch_function__` of subclasses are called.

Why: what is asked of tensors while a trace is written must not be traced; constants of kernels are no part of a model.
Public way: `torch._C.DisableTorchFunctionSubclass`, which torch documents, leaves modes on.
Without it: compress_core cannot be imported; traces would hold calls that the model did not make.
"""

SubclassesDisabled = torch._C.DisableTorchFunctionSubclass
"""A context in which `__torch_function__` of subclasses is not called.

Why: what a subclass does to the tensor that it stands for must not be handled by itself.
Public way: this is the documented one, but it has no public name.
Without it: compress_core cannot be imported; functions of the weight of a compressed layer would never end.
"""


DispatchDisabled = torch._C._DisableTorchDispatch
"""A context in which operators do not reach `__torch_dispatch__` of modes and subclasses.

Why: a trace makes fake tensors itself where it knows what the mode would return; the mode must not see how.
Public way: none.
Without it: compress_core cannot be imported; traces would call the mode for each operator, which takes twice the time.
"""


# Fake tensors, and structures of tensors.

FakeTensor = fake_tensor.FakeTensor
FakeTensorMode = fake_tensor.FakeTensorMode
"""Tensors with a shape, a dtype and a device, but without values; and the mode under which operators make these.

Why: a trace costs no computation, and memory for no activation.
Public way: the device `meta`: forwards that name a device, or make tensors, fail on it, and the model has to be moved.
Without it: compress_core cannot be imported. Traces could still be made with real tensors.
"""

FAKE_TENSOR_LOGGER = fake_tensor.__name__
"""Name of the logger that fake tensors use.

Why: torch logs a stack trace for each operator that fails on fake tensors, though we go on with real ones.
Public way: `torch._logging.set_logs` is private as well, and sets levels for the whole process.
Without it: logs are longer.
"""

tree_map = _pytree.tree_map
tree_leaves = _pytree.tree_leaves
tree_flatten_with_path = _pytree.tree_flatten_with_path
"""Nested arguments and outputs: a function applied to each leaf, the leaves, and the leaves with the way to each.

Why: arguments of forwards are nested in whatever torch.export understands; both must see the same leaves in one order.
Public way: none in torch; a walk of our own would not know the classes that others register.
Without it: compress_core cannot be imported.
"""


# Tensors and operators.

version_of: Callable[[torch.Tensor], int] = operator.attrgetter("_version")
"""How often a tensor has been written to in place; not to be asked of tensors made in inference mode.

Why: tells whether a tensor still holds what a weight was computed from, or a graph was recorded with.
Public way: none. torch's notes on autograd explain this attribute; `autograd.graph.increment_version` only writes it.
Without it: AttributeError at the first forward in eval mode; comparing all values would cost what the cache saves.
"""


def is_view(tensor: torch.Tensor) -> bool:
    """Returns whether autograd knows a tensor as a view of another one.

    Why: the memory of a view is not its own to be written to, and a weight that is one is nothing that can be saved.
    Public way: none; `tensor._base` is as private, and a view of all of a tensor has nothing else that shows it.
    Without it: AttributeError.
    """
    return tensor._is_view()


def storage_identity(tensor: torch.Tensor) -> int:
    """Returns a number that two tensors have in common if they share memory, as long as both live.

    Why: a write to one is a write to the other.
    Public way: `untyped_storage().data_ptr()`: zero for all empty storages, and raises for fake tensors.
    Without it: AttributeError.

    Raises:
        RuntimeError, NotImplementedError: The tensor has no storage (sparse, nested).
    """
    return int(tensor.untyped_storage()._cdata)


def has_gradient_hooks(tensor: torch.Tensor) -> bool:
    """Returns whether the gradient of a tensor has a hook (`Tensor.register_hook`).

    Why: such a hook does not follow a parameter whose contents are swapped when channels are removed.
    Public way: none; a handle knows its hook, a tensor's hooks cannot be asked for.
    Without it: AttributeError when a model is shrunk.
    """
    return bool(tensor._backward_hooks)


def schema_of(function: Any) -> Any:
    """Returns the schema of an ATen operator: its arguments, and which of these it writes to; None for others.

    Why: tells writes from reads, and reductions over some dimensions from those over all.
    Public way: none for an operator in hand; `torch.library` only defines schemas.
    Without it: None for all: writes in place go unseen in traces.
    """
    return getattr(function, "_schema", None)


LOW_LEVEL_FUNCTIONS = torch._VF
"""The module of functions that torch calls in its layers and utilities and gives no other name.

Why: packing a sequence is such a function; its result is quantized where it is made.
Public way: `torch.overrides` does not list them, though its modes see them.
Without it: compress_core cannot be imported; packed sequences could not be quantized before a recurrent layer.
"""


# What is kept for the backward pass.


def may_set_saved_tensors_hooks() -> bool:
    """Returns whether saved-tensors hooks can be set, that is, none are set or forbidden by other code.

    Why: checkpointing and offloading set hooks; ours inside of these would undo what they save.
    Public way: `torch.autograd.graph` sets and forbids hooks, and cannot be asked about them.
    Without it: it is not known, so never: weights are kept for the backward pass, not recomputed.
    """
    try:
        autograd: Any = torch._C._autograd
        return bool(
            autograd._saved_tensors_hooks_is_enabled() and autograd._top_saved_tensors_default_hooks(False) is None
        )
    except AttributeError:
        return False


def saved_tensors_hook() -> Any:
    """Returns the innermost hook that packs tensors for the backward pass, or None.

    Why: another one than before may be that of a checkpoint; that it is the same shows at little cost that none is.
    Public way: as `may_set_saved_tensors_hooks`.
    Without it: AttributeError at the first forward with a transform at a call site.
    """
    autograd: Any = torch._C._autograd
    hooks = autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


# Since torch 2.14 a function of its own does what `checkpoint` did.
_CHECKPOINT = inspect.unwrap(getattr(checkpoint, "_checkpoint_impl", checkpoint.checkpoint)).__code__
_REENTRANT = checkpoint.CheckpointFunction.forward.__code__


def checkpoint_of(frame: FrameType) -> tuple[Any, str] | None:
    """Returns where a frame of `torch.utils.checkpoint` keeps the function that it will run again: (object, attribute).

    None for all other frames, and for those that keep no function, because no gradient is recorded.

    Why: transforms at call sites have to be applied again when the function is run again.
    Public way: `context_fn` of `checkpoint`, which only the caller can give, and not with `use_reentrant=True`.
    Without it: None, and gradients of checkpointed functions with transforms inside are wrong or raise.
    """
    if frame.f_code is _REENTRANT:
        return frame.f_locals["ctx"], "run_function"
    if frame.f_code is _CHECKPOINT and "gen" in frame.f_locals:
        running = frame.f_locals["gen"].gi_frame
        kept = None if running is None else running.f_locals.get("new_frame")
        return None if kept is None else (kept, "recompute_fn")
    return None


CHECKPOINT_OPERATOR = wrap.tag_activation_checkpoint
"""The operator by which torch.compile represents `torch.utils.checkpoint.checkpoint`; it takes the function.

Why: function modes see this operator and not the calls inside the function, unless the function enters the mode itself.
Public way: none.
Without it: compress_core cannot be imported. Compiled models would skip the transforms inside checkpointed functions.
"""

is_any_autocast_enabled = torch._C._is_any_autocast_enabled
"""Returns whether autocast is on for any type of device.

Why: under autocast layers keep a copy of their weight, which need not be recomputed.
Public way: `torch.is_autocast_enabled(device_type)`, for types that are known beforehand.
Without it: compress_core cannot be imported; the public function would do for the types that we know.
"""


# Processes.


def default_store() -> Any:
    """Returns the store through which the processes of the default group have found each other.

    Why: it tells which process has not come, and can be left at any time; a collective can do neither.
    Public way: `init_process_group(store=...)`, for a store that the user makes; `monitored_barrier` names who is
        missing, but only when its time is up, and the group cannot be used afterwards.
    Without it: AttributeError in the first call of several processes; a store of our own would need an address.
    """
    from torch.distributed import distributed_c10d  # noqa: PLC0415 - torch may be built without it

    return distributed_c10d._get_default_store()


# Layers.

AnyBatchNorm = batchnorm._BatchNorm
AnyNorm = batchnorm._NormBase
AnyConv = conv._ConvNd
AnyConvTranspose = conv._ConvTransposeNd
"""The classes that all batch norms, all norms with running statistics (batch and instance), all convolutions and all
transposed ones derive from.

Why: libraries derive layers of their own from these bases, `nn.SyncBatchNorm` does too, and all behave alike.
Public way: a tuple of `nn.BatchNorm1d`, ..., `nn.Conv3d` does not know such layers.
Without it: compress_core cannot be imported; the tuples would do for torch's own layers.
"""

HOOK_ATTRIBUTES = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""The attributes of a module that hold its hooks, each a dict.

Why: a model that is rolled back has the same hooks in the same order; the conformance kit compares them.
Public way: hooks can be registered, and removed by who has the handle; not listed.
Without it: the conformance kit does not see hooks of this kind that were left behind.
"""


def computing_hooks(module: nn.Module) -> list[tuple[str, type[Any]]]:
    """Returns the hooks of a module that compute one of its tensors: name of the tensor, class of the hook.

    Classes are `WeightNorm` and `SpectralNorm` of `torch.nn.utils`, and those derived from `BasePruningMethod`.

    Why: `fold_computed_weights` replaces what they compute by plain parameters.
    Public way: none lists the hooks of a module; `prune` keeps the name of its tensor in a private attribute.
    Without it: weights under the old style of `weight_norm` and `spectral_norm` and under `prune` are not folded.
    """
    found: list[tuple[str, type[Any]]] = []
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            found.append((hook.name, type(hook)))
        elif isinstance(hook, BasePruningMethod):
            found.append((hook._tensor_name, type(hook)))
    return found


TENSOR_HOOK_ATTRIBUTES = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""The attributes of a tensor that hold its hooks, each a dict or None.

Why: as `HOOK_ATTRIBUTES`.
Public way: as there.
Without it: hooks of tensors outlive a rollback, and the conformance kit does not see them.
"""


def global_hooks() -> dict[str, list[int]]:
    """Returns the ids of the hooks that torch calls for every module and optimizer of the process, by kind.

    Why: the conformance kit sees that an algorithm leaves none.
    Public way: none, see `HOOK_ATTRIBUTES`.
    Without it: such hooks are not seen.
    """
    # Not torch.optim.optimizer: torch deletes that name.
    found = {**vars(torch.nn.modules.module), **vars(sys.modules[torch.optim.Optimizer.__module__])}
    kinds = [name for name in found if name.startswith("_global_") and name.endswith("_hooks")]
    return {name: [id(hook) for hook in found[name].values()] for name in kinds}


def has_hooks(module: nn.Module) -> bool:
    """Returns whether a module has hooks around its forward or its backward, which only a call of the module runs.

    Why: transforms without hooks can be called by other methods than `forward`, and again in the backward pass.
    Public way: none, see `HOOK_ATTRIBUTES`.
    Without it: AttributeError at the first forward.
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def remove_forward_hooks(module: nn.Module, kind: type) -> None:
    """Removes forward hooks and forward pre-hooks of a class from a module whose copy or pickle has no handles of them.

    Why: the recorder of the batch for a loss is a hook of the model, and a stripped model must be plain.
    Public way: handles, which copies do not have.
    Without it: AttributeError at `strip` of models that have such a hook.
    """
    for hooks, with_keywords in (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[key]
            with_keywords.pop(key, None)


MODULE_CALL = nn.Module._call_impl.__code__
"""The code that runs a module's hooks and its forward.

Why: calls of functions that a user's hook makes are not the model's; only the stack tells whether a hook is running.
Public way: none; hooks may be registered at any time, so that wrapping them misses some.
Without it: compress_core cannot be imported. With another layout what hooks call counts as a part of the forward.
"""


def frames_dynamo_traces() -> Any:
    """Returns the innermost of the frames that dynamo is tracing; loaded when it is, which takes a second.

    Why: under torch.compile, too, what hooks call is not the model's.
    Public way: none.
    Without it: compiling a model with activation transforms at call sites raises.
    """
    dynamo: Any = sys.modules["torch._dynamo.symbolic_convert"]
    return dynamo.InstructionTranslator.current_tx().output.current_tx


def add_own_forward_pre_hook(module: nn.Module, hook: Callable[..., None]) -> None:
    """Gives a module that has no hook one that stays for good.

    Why: torch's fused transformer layers bypass their children unless one of these has a hook.
    Public way: `register_forward_pre_hook` counts through the process: equal modules would differ by a number.
    Without it: AttributeError when the first activation transform is added.
    """
    module._forward_pre_hooks[0] = hook


def recurrent_overrides() -> dict[str, Any]:
    """Returns attributes for a subclass of a recurrent layer whose weights are computed each time they are read.

    Why: recurrent layers hand a cached list of parameters to their kernels and never read these by name. And computed
        weights are new objects at each read: torch would rebuild its list before every forward.
    Public way: none; `torch.nn.utils.parametrize` relies on the list being rebuilt.
    Without it: recurrent layers compute with their stored weights, as if these had no transform.
    """
    return {
        "_flat_weights": property(_flat_weights, _set_flat_weights),
        "_weights_have_changed": lambda self: False,
    }


def replica_override(refuse: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """Returns attributes for a subclass of a layer that `nn.DataParallel` must not copy to several devices.

    Why: the copies that it makes in each step have neither parameters to compute weights from nor transforms of their
        own device.
    Public way: none; torch calls this method of each module.
    Without it: an error all the same, but torch's own: "property of 'Conv2d' object has no setter".

    Args:
        refuse: Called with the layer; raises an error.
    """
    return {"_replicate_for_data_parallel": refuse}


def _flat_weights(self: nn.RNNBase) -> list[Any]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _set_flat_weights(self: nn.RNNBase, value: list[Any]) -> None:
    # What torch stores here are the weights it just read, computed ones; copies and pickles need the stored ones.
    self.__dict__["_flat_weights"] = [self._parameters.get(name) for name in self._flat_weights_names]


ASSIGN_ENTRY = "assign_to_params_buffers"
"""The entry of `local_metadata` by which `load_state_dict(assign=True)` tells modules to take the tensors themselves.

Why: the transforms of activations are loaded by their module, and have to be told the same.
Public way: none below `load_state_dict`, which would check the part for completeness as if it were a model.
Without it: the values are copied; parameters on the device `meta` stay there.
"""

PARAMETER_MARK = "_is_param"
"""The attribute by which `nn.Parameter(tensor)` marks tensors of a subclass as parameters.

Why: a parameter that a user makes from the weight of a compressed layer has to be an ordinary one.
Public way: none; for a tensor of a subclass, `nn.Parameter` returns that tensor.
Without it: such a parameter stays connected with the layer: writes to it are writes to the layer.
"""


# The compiler.


dynamo_callback = _eval_frame.get_eval_frame_callback
"""Returns what dynamo calls for the functions that are called now: None or False where none of them will be compiled.

Why: a compiled model that has fallen back to eager would go on to compile parts of a forward by themselves, and there
    hide functions from the mode that counts their calls. No function of our own: dynamo would compile that.
Public way: `torch.compiler.is_compiling` is False between compiled parts.
Without it: compress_core cannot be imported; at worst there would be warnings of calls that were not seen.
"""


def skip_frame(reason: str) -> None:
    """Makes dynamo, which is tracing this call within a `try`, leave the function it began with to eager execution.

    Why: dynamo hides some functions from modes; the forward has to be run as it is written.
    Public way: `torch.compiler.disable` marks functions beforehand; that a call was hidden is known afterwards.
    Without it: AttributeError while such a model is compiled.
    """
    torch._dynamo.skip_frame(reason)


def import_compiler() -> None:
    """Imports torch's compiler, which takes more than a second.

    Why: some versions cannot be imported within the modes that `compile_graph` is to be called in.
    Public way: `torch.compile` imports it when a compiled function is first called, within whatever modes are on then.
    Without it: ImportError, after which kernels are eager ones (or as the caller has it).
    """
    from torch._inductor import compile_fx  # noqa: F401, PLC0415


@contextlib.contextmanager
def onnx_translations_kept() -> Iterator[None]:
    """Context manager in which `torch.onnx.export` takes its table of translations from an earlier export, if any.

    Why: for each export it reads the source of 500 functions anew, a third of the time that small models take.
    Public way: `torch.onnx.export` takes more translations, but not the table.
    Without it: the table is made for each export.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry  # noqa: PLC0415
    except ImportError:
        yield
        return
    make = ONNXRegistry.__dict__.get("from_torchlib")
    if not isinstance(make, classmethod):
        yield
        return

    def from_torchlib(cls: Any, opset_version: int = 18) -> Any:
        if opset_version not in _translations:
            _translations[opset_version] = make.__func__(cls, opset_version=opset_version)
        return _translations[opset_version]

    setattr(ONNXRegistry, "from_torchlib", classmethod(from_torchlib))  # noqa: B010 - no assignment to a method for mypy
    try:
        yield
    finally:
        setattr(ONNXRegistry, "from_torchlib", make)  # noqa: B010


# Version of the operator set -> torch's table of translations for it.
_translations: dict[int, Any] = {}


def compile_graph(
    function: Callable[..., tuple[torch.Tensor, ...]], tensors: list[torch.Tensor]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Returns a function without gradients as torch's compiler makes it, for tensors of any size.

    Why: `torch.compile` looks up, for each call, which of its variants fits: four times as long as such a call takes
        otherwise. Whoever knows that beforehand calls the kernel itself.
    Public way: `torch.compile`; `torch._inductor.standalone_compile` traces anew, and wraps in what functions need that
        change their inputs or have a graph: a third of the time to compile, and a quarter of that of a short call.
    Without it: whatever torch raises; fake-quantization then uses eager kernels, which are slower, and says so once.

    Args:
        function: Takes tensors, and returns a tuple of new tensors.
        tensors: Examples. Sizes that are equal stay equal, others may be any.
    """
    from torch._guards import TracingContext, tracing  # noqa: PLC0415
    from torch._inductor import config, lowering  # noqa: PLC0415
    from torch._inductor.compile_fx import compile_fx_inner  # noqa: PLC0415
    from torch._inductor.decomposition import select_decomp_table  # noqa: PLC0415
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415

    traced = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="symbolic")(*tensors)
    # Without what tracing attached to it, so that the compiler's cache can tell whether it knows the graph.
    graph = torch.fx.GraphModule({}, traced.graph)
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    # Checks of sizes are another microsecond for each call; from torch 2.14 on, they are what reads the sizes.
    asserts = hasattr(lowering, "_record_symbolic_input_source")
    with tracing(TracingContext(inputs[0].fake_mode)), config.patch(size_asserts=asserts):
        code: Any = compile_fx_inner(graph, inputs, is_inference=True)
    call = code.current_callable
    return lambda *arguments: call(list(arguments))
