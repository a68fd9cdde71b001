"""The forward of a module with activation transforms: applies the chains of all its places."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from compress_core.errors import TransformError
from compress_core.torch_internals import add_own_forward_pre_hook, dynamo_callback, skip_frame
from compress_core.transforms.activation_functions import activation_module
from compress_core.transforms.call_sites import (
    CallSiteMode,
    TransformedFunction,
    count_replaced,
    explains,
    functions_named,
    is_observed,
    run_quietly,
    transformed_functions,
)
from compress_core.transforms.chain import TransformChain, TransformContainer
from compress_core.transforms.gradient_checkpoints import Surroundings
from compress_core.transforms.nested import argument, replace_argument, replace_at
from compress_core.transforms.places import ActivationPlace, CallInput, CallOutput, ModuleInput, ModuleOutput
from compress_core.transforms.python_state import names_in

logger = logging.getLogger(__name__)

# Modules that return a new tensor without other readers, never their input or a view of it.
_MAKERS: frozenset[type[nn.Module]] = frozenset(
    [
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm),
        *(nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softmax),
    ]
)


@dataclass
class _Plan:
    """What the forward has to do; derived once from the places."""

    inputs: tuple[tuple[str, ModuleInput], ...] = ()
    outputs: tuple[tuple[str, ModuleOutput], ...] = ()
    functions: tuple[TransformedFunction, ...] = ()
    # If the module is an activation function that the transform can compute as well: its name, and the function called.
    activation: tuple[str, tuple[Any, ...]] | None = None
    # Whether the module returns a new tensor without other readers.
    is_maker: bool = False
    # Names of the parameters of the module's forward: those that can be passed by position, and all.
    positional: tuple[str, ...] = ()
    parameters: frozenset[str] = frozenset()
    # Whether a method of the class reads an attribute `forward`, perhaps to call the forward from within itself.
    may_call_itself: bool = False


@dataclass
class _Running:
    """A forward that is running, and may call itself.

    Attributes:
        is_transformed: Whether the places are counted in it; otherwise it was given a batch, and they are counted in
            the inner one that is given the input.
        has_inner: Whether there has been such an inner one.
    """

    is_transformed: bool
    has_inner: bool = False


class ActivationTransforms(TransformContainer):
    """The attribute `activation_transforms` of a module: a chain for each place.

    Args:
        owner: Class of the module, as it was before any transform.
    """

    def __init__(self, owner: type[nn.Module]) -> None:
        super().__init__()
        self.owner = owner
        self.places: dict[str, ActivationPlace] = {}
        self._warned = False
        self._plan = _Plan()
        # Of a module that may call its forward from within: the forward that is running, for each thread.
        self._running: dict[int, _Running] = {}
        # torch's fused transformer layers bypass their children unless one of these has a hook. This hook never runs.
        add_own_forward_pre_hook(self, _no_fast_path)

    def __getstate__(self) -> dict[str, Any]:
        # Without the plan: not all function objects such as torch.relu can be pickled, so they are looked up again.
        return {**{name: value for name, value in self.__dict__.items() if name != "_plan"}, "_running": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.make_plan()

    def make_plan(self) -> None:
        """Builds the plan of the forward from the places; called whenever the places change."""
        places = self.places
        calls = {name: place for name, place in places.items() if isinstance(place, CallInput | CallOutput)}
        plan = _Plan(
            tuple((name, place) for name, place in places.items() if isinstance(place, ModuleInput)),
            tuple((name, place) for name, place in places.items() if isinstance(place, ModuleOutput)),
            transformed_functions(calls),
        )
        plan.is_maker = self.owner in _MAKERS
        known = activation_module(self.owner)
        if known is not None and len(plan.outputs) == 1 and not calls:
            plan.activation = (known[0], functions_named(known[1]))
        if plan.inputs:
            plan.positional, plan.parameters = _parameters(self.owner)
        plan.may_call_itself = _may_call_itself(self.owner)  # type: ignore[arg-type]
        self._plan = plan

    def chain(self, name: str) -> TransformChain:
        """Returns the chain of one place."""
        return cast("TransformChain", self._modules[name])

    def chain_name(self, place: ActivationPlace) -> str | None:
        """Returns the name of the chain at a place, or None."""
        return next((name for name, other in self.places.items() if other == place), None)

    def run(self, forward: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Calls `forward(module, *args, **kwargs)` with all transforms applied."""
        if self._plan.may_call_itself:
            return self._run_outermost(forward, module, args, kwargs)
        return self._run(forward, module, args, kwargs)

    def _run_outermost(self, forward: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Runs a forward that may call itself again: what the inner one does belongs to the outer one, as in a trace.

        Detectors take an image in eval mode, and in training mode the whole batch, of which they give the image to
        their own forward: then the inner one is that of the trace.
        """
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        outer = self._running.get(thread)
        if outer is not None and outer.is_transformed:
            return forward(module, *args, **kwargs)
        place = self._place_of_batch(args, kwargs) if outer is None else None
        running = _Running(is_transformed=place is None)
        self._running[thread] = running
        try:
            if place is None:
                return self._run(forward, module, args, kwargs)
            output = forward(module, *args, **kwargs)
            if not running.has_inner:
                raise TransformError(
                    f"{place}: the value is a dict where the example input gave a tensor, and the forward does not "
                    "call itself with that; give an example input for each structure"
                )
            return output
        finally:
            if outer is None:
                del self._running[thread]
            else:
                outer.has_inner = True
                self._running[thread] = outer

    def _place_of_batch(self, args: Any, kwargs: Any) -> ModuleInput | None:
        """Returns the place of an argument that is a dict where the example input gave a tensor, if there is one."""
        names = self._plan.positional
        for _, place in self._plan.inputs:
            if len(place.argument) == 1 and isinstance(argument(args, kwargs, place.argument[0], names), Mapping):
                return place
        return None

    def _run(self, forward: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        plan = self._plan
        if plan.inputs:
            args, kwargs = run_quietly(self._transform_inputs, args, kwargs)
        if plan.activation is not None and len(args) == 1 and not kwargs:
            chain, (activation, functions) = self.chain(plan.outputs[0][0]), plan.activation
            in_place = bool(getattr(module, "inplace", False))
            if chain.fuses(activation, in_place=in_place) and count_replaced(functions):
                return run_quietly(chain.forward_fused, args[0], activation, in_place)
        if plan.functions or issubclass(self.owner, nn.TransformerEncoder):
            # An active function mode keeps an encoder from packing its input for the fused layers.
            output = self._run_counted(forward, module, args, kwargs)
        elif plan.inputs and not torch.compiler.is_compiling():
            output = self._run_with_inputs(forward, module, args, kwargs)
        else:
            output = forward(module, *args, **kwargs)
        if not plan.outputs:
            return output
        if plan.is_maker and isinstance(output, torch.Tensor) and not is_observed():
            return run_quietly(self._transform_own, output)
        return run_quietly(self._transform_outputs, output)

    def _run_with_inputs(self, forward: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        try:
            return forward(module, *args, **kwargs)
        except RuntimeError as error:
            if "requires_grad flags of leaf" not in str(error):
                raise
            places = ", ".join(str(place) for _, place in self._plan.inputs)
            raise TransformError(
                "the forward sets requires_grad of a tensor that is transformed, and therefore has a gradient already "
                f"({places}). Remove that line (or freeze the layers before it, as freeze_feature_encoder() of audio "
                "models does), or name the quantizer of this input in ignored_scopes"
            ) from error

    def _run_counted(self, forward: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and dynamo_callback() not in (None, False):
            # A compiled model has fallen back to eager here, perhaps because dynamo hides a function from modes.
            # Without this, dynamo would compile parts of this forward separately and hide the function there.
            forward = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
        mode = CallSiteMode(self._plan.functions, module.training, self._call)
        if not torch.compiler.is_dynamo_compiling():
            mode.surroundings = Surroundings(sys._getframe())
        try:
            with mode:
                output = forward(module, *args, **kwargs)
            self._check_counts(mode)
        except TransformError:
            # Dynamo cannot break a graph within `try`; where the check asks for that, all of this runs in eager mode.
            raise
        return output

    def _transform_inputs(self, args: Any, kwargs: Any) -> Any:
        for name, place in self._plan.inputs:
            names = (self._plan.positional, self._plan.parameters)
            args, kwargs = replace_argument(args, kwargs, place.argument, self.chain(name), place, *names)
        return args, kwargs

    def _transform_own(self, output: torch.Tensor) -> torch.Tensor:
        for name, _ in self._plan.outputs:
            output = self.chain(name).forward_owned(output)
        return output

    def _transform_outputs(self, output: Any) -> Any:
        for name, place in self._plan.outputs:
            output = replace_at(output, place.item, self.chain(name), place)
        return output

    def _call(self, function: TransformedFunction, call: int, training: bool, func: Any, args: Any, kwargs: Any) -> Any:
        """Makes one call of a function with the transforms of its sites."""
        inputs = [site for site in function.inputs if site.calls.includes(call, training=training)]
        outputs = [site for site in function.outputs if site.calls.includes(call, training=training)]
        if not inputs and not outputs:
            return func(*args, **kwargs)
        written = args[0] if function.in_place else kwargs.get("out")
        if function.in_place and torch.is_grad_enabled():
            # A copy, because writing the result back below must not overwrite what autograd has saved of this call.
            args = (run_quietly(torch.clone, args[0]), *args[1:])
        for site in inputs:
            args, kwargs = run_quietly(replace_argument, args, kwargs, site.path, self.chain(site.chain), site.place)
        result = None
        if function.activation is not None and len(outputs) == 1:
            chain = self.chain(outputs[0].chain)
            if chain.computes and not chain.bypassed:
                result = self._computed(function, chain, args, kwargs)
            else:
                result = self._fused(function, function.activation, outputs[0].chain, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
            for site in outputs:
                result = run_quietly(replace_at, result, site.path, self.chain(site.chain), site.place)
        if isinstance(written, torch.Tensor) and result is not written:
            run_quietly(torch.Tensor.copy_, written, result)
            return written
        return result

    def _computed(
        self, function: TransformedFunction, chain: TransformChain, args: Any, kwargs: Any
    ) -> torch.Tensor | None:
        """Computes an activation function, and all transforms of its result, by transforms alone.

        Returns None for a call without an argument, which torch refuses.
        """
        argument = args[0] if args else kwargs.get("input")
        in_place = bool(args[1] if len(args) > 1 else kwargs.get("inplace", False))
        if argument is None:
            return None
        if not count_replaced(function.objects):
            raise TransformError(
                f"'{chain.first_name}' computes {function.name} itself, and a transform of an outer module is at the "
                "same call; name one of them in ignored_scopes"
            )
        # A copy, because what is written to below must not be what autograd has saved.
        given = run_quietly(torch.clone, argument) if in_place and torch.is_grad_enabled() else argument
        result = run_quietly(chain.computed, given)
        return run_quietly(torch.Tensor.copy_, argument, result) if in_place else result

    def _fused(
        self, function: TransformedFunction, activation: str, chain_name: str, args: Any, kwargs: Any
    ) -> torch.Tensor | None:
        chain = self.chain(chain_name)
        tensor = args[0] if args else kwargs.get("input")
        in_place = bool(args[1] if len(args) > 1 else kwargs.get("inplace", False))
        if tensor is None or not chain.fuses(activation, in_place=in_place) or not count_replaced(function.objects):
            return None
        return run_quietly(chain.forward_fused, tensor, activation, in_place)

    def _check_counts(self, mode: CallSiteMode) -> None:
        for index, function in enumerate(mode.functions):
            seen = mode.counted(index)
            was_traced = function.calls.was_traced(seen, training=mode.training)
            if was_traced and not (seen == 0 and function.may_be_hidden):
                continue
            if torch.compiler.is_compiling():
                if seen == 0 and torch.compiler.is_dynamo_compiling():
                    skip_frame(f"torch.compile hides calls of {function.name} from function modes")
            elif not self._warned and not explains(function.calls, seen, training=mode.training):
                self._warned = True
                self._warn_of_count(function, seen, mode.training)

    def _warn_of_count(self, function: TransformedFunction, seen: int, training: bool) -> None:
        sites = [*function.inputs, *function.outputs]
        known = dict.fromkeys(
            getattr(transform, "label", "") or f"{site.place} ({key})"
            for site in sites
            for key, transform in self.chain(site.chain)._modules.items()
        )
        names = ", ".join(f"'{name}'" for name in known)
        logger.warning(
            "%s: a forward in %s mode called %s %d times where the example input led to %d calls, so %s may get "
            "activations that are not theirs, or none; give an example input for each path through the model, or add "
            "these names to ignored_scopes of their algorithm",
            sites[0].place.module or "model",
            "training" if training else "eval",
            function.name,
            seen,
            len(function.calls.expected(training=training)),
            names,
        )


def _no_fast_path(module: nn.Module, args: Any) -> None:
    return None


def _parameters(owner: type[nn.Module]) -> tuple[tuple[str, ...], frozenset[str]]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = list(inspect.signature(owner.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return (), frozenset()
    return tuple(p.name for p in parameters if p.kind in kinds), frozenset(p.name for p in parameters)


@functools.cache
def _may_call_itself(owner: type[nn.Module]) -> bool:
    """Returns whether a method of the class reads an attribute `forward`, of the module or of another one."""
    methods = [
        inspect.unwrap(method)
        for cls in owner.__mro__
        if issubclass(cls, nn.Module) and cls is not nn.Module
        for method in vars(cls).values()
        if callable(method)
    ]
    return any("forward" in names_in(method.__code__) for method in methods if inspect.isfunction(method))
