"""Activation transforms: adding, finding and removing them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from compress_core.errors import TransformError
from compress_core.stages import Stage
from compress_core.transforms.activation_functions import activation_module
from compress_core.transforms.call_sites import (
    CallSiteMode,
    TransformedFunction,
    count_unmade,
    explains,
    functions_named,
    is_observed,
    run_quietly,
    transformed_functions,
)
from compress_core.transforms.chain import TransformChain, TransformContainer
from compress_core.transforms.generated import (
    ACTIVATIONS_ATTRIBUTE,
    base_class,
    transformed_class,
    update_class,
)
from compress_core.transforms.nested import replace_argument, replace_at
from compress_core.transforms.places import ActivationPlace, CallInput, CallOutput, ModuleInput, ModuleOutput

logger = logging.getLogger(__name__)

# Modules that return a tensor which they have just made, and which nobody else has: not their input, not a view.
_MAKERS: frozenset[type[nn.Module]] = frozenset(
    [
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm),
        *(nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softmax),
    ]
)


@dataclass
class _Plan:
    """What the forward has to do, derived from the places."""

    inputs: tuple[tuple[str, ModuleInput], ...] = ()
    outputs: tuple[tuple[str, ModuleOutput], ...] = ()
    functions: tuple[TransformedFunction, ...] = ()
    # What the transform may take over of a module that is an activation function: which, and what it would call.
    activation: tuple[str, tuple[Any, ...]] | None = None
    # Whether nobody else has what the module returns.
    is_maker: bool = False
    # Parameters of the module's forward: those that can be passed by position, and all.
    positional: tuple[str, ...] = ()
    parameters: frozenset[str] = frozenset()


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
        # torch's fused transformer layers bypass their children unless one of these has a hook. Nobody calls us.
        self._forward_pre_hooks[0] = _no_fast_path

    def __getstate__(self) -> dict[str, Any]:
        # Function objects such as torch.relu are found anew by name; not all of them can be pickled.
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.make_plan()

    def make_plan(self) -> None:
        """Derives from the places what the forward has to do; called whenever they change."""
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
        self._plan = plan

    def chain(self, name: str) -> TransformChain:
        """Returns the chain of one place."""
        return cast("TransformChain", self._modules[name])

    def chain_name(self, place: ActivationPlace) -> str | None:
        """Returns the name of the chain at a place, or None."""
        return next((name for name, other in self.places.items() if other == place), None)

    def run(self, forward: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Calls `forward(module, *args, **kwargs)` with all transforms applied."""
        plan = self._plan
        if plan.inputs:
            args, kwargs = run_quietly(self._transform_inputs, args, kwargs)
        if plan.activation is not None and len(args) == 1 and not kwargs:
            chain, (activation, functions) = self.chain(plan.outputs[0][0]), plan.activation
            in_place = bool(getattr(module, "inplace", False))
            if chain.fuses(activation, in_place=in_place) and count_unmade(functions):
                return run_quietly(chain.forward_fused, args[0], activation, in_place)
        if plan.functions or issubclass(self.owner, nn.TransformerEncoder):
            # The mode is what keeps an encoder from packing its input for the fused layers.
            output = self._run_counted(forward, module, args, kwargs)
        else:
            output = forward(module, *args, **kwargs)
        if not plan.outputs:
            return output
        if plan.is_maker and isinstance(output, torch.Tensor) and not is_observed():
            return run_quietly(self._transform_own, output)
        return run_quietly(self._transform_outputs, output)

    def _run_counted(self, forward: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and get_eval_frame_callback() not in (None, False):
            # A compiled model has fallen back to eager here, perhaps because dynamo hides a function from modes. It
            # would go on to compile parts of this forward by themselves, and hide it there.
            forward = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
        mode = CallSiteMode(self._plan.functions, module.training, self._call)
        try:
            with mode:
                output = forward(module, *args, **kwargs)
            self._check_counts(mode)
        except TransformError:
            # Dynamo cannot break a graph within `try`: where the check asks it to, it leaves all of this to eager.
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
            # The result is written back below; what autograd keeps of this call must not be overwritten by that.
            args = (run_quietly(torch.clone, args[0]), *args[1:])
        for site in inputs:
            args, kwargs = run_quietly(replace_argument, args, kwargs, site.path, self.chain(site.chain), site.place)
        result = None
        if function.activation is not None and len(outputs) == 1:
            result = self._fused(function, function.activation, outputs[0].chain, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
            for site in outputs:
                result = run_quietly(replace_at, result, site.path, self.chain(site.chain), site.place)
        if isinstance(written, torch.Tensor) and result is not written:
            run_quietly(torch.Tensor.copy_, written, result)
            return written
        return result

    def _fused(
        self, function: TransformedFunction, activation: str, chain_name: str, args: Any, kwargs: Any
    ) -> torch.Tensor | None:
        chain = self.chain(chain_name)
        tensor = args[0] if args else kwargs.get("input")
        in_place = bool(args[1] if len(args) > 1 else kwargs.get("inplace", False))
        if tensor is None or not chain.fuses(activation, in_place=in_place) or not count_unmade(function.objects):
            return None
        return run_quietly(chain.forward_fused, tensor, activation, in_place)

    def _check_counts(self, mode: CallSiteMode) -> None:
        for function, seen in zip(mode.functions, mode.counts, strict=True):
            expected = function.calls.expected(training=mode.training)
            if seen == len(expected):
                continue
            if torch.compiler.is_compiling():
                if seen == 0 and torch.compiler.is_dynamo_compiling():
                    torch._dynamo.skip_frame(f"torch.compile hides calls of {function.name} from function modes")
            elif not self._warned and not explains(function.calls, seen, training=mode.training):
                self._warned = True
                place = (*function.inputs, *function.outputs)[0].place
                logger.warning(
                    "%s: a forward in %s mode called %s %d times where the example input led to %d calls, so "
                    "some activations may be compressed as others should be, or not at all; give an example input for "
                    "each path through the model",
                    place.module or "model",
                    "training" if mode.training else "eval",
                    function.name,
                    seen,
                    len(expected),
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


@dataclass(frozen=True)
class ActivationTransformHandle:
    """One transform at one place, and the way to undo it.

    Attributes:
        place: Where it stands, below the model.
        key: Its name there.
        transform: The transform.
        stage: Where in the chain of this place it stands.
    """

    place: ActivationPlace
    key: str
    transform: nn.Module
    stage: Stage
    _model: nn.Module = field(repr=False)

    def remove(self) -> None:
        """Takes the transform away from this place; the last one gives the module its original class back.

        Raises:
            TransformError: It has been removed before.
        """
        owner = _owner(self._model, self.place)
        container = activations_of(owner)
        name = None if container is None else container.chain_name(_stored(container, self.place))
        if container is None or name is None or container.chain(name)._modules.get(self.key) is not self.transform:
            raise TransformError(f"'{self.place}' has no transform named '{self.key}'")
        container.chain(name).discard(self.key)
        if not container.chain(name)._modules:
            del container._modules[name], container.places[name]
            container.make_plan()
        _drop_empty(self._model)


def add_activation_transform(
    model: nn.Module, place: ActivationPlace, transform: nn.Module, *, stage: Stage, key: str | None = None
) -> ActivationTransformHandle:
    """Sends an activation through `transform`.

    One transform may be added at several places: they share its parameters.

    Args:
        model: The model that `place` was found in, or the module that `place.module` counts from.
        place: Which tensor.
        transform: Maps it to one of the same shape. Its parameters are trained, its buffers saved with the module of
            the place. It must return a new tensor or the one it was given (not a view of it), and its backward must not
            need the tensor that it returned: what comes next may write to it in place. It may take over activation
            functions that it stands directly behind: with an attribute `fused_activations`, the names of these (of
            `ACTIVATION_FUNCTIONS`), and a method `fused(x, activation)` that returns
            `self(ACTIVATION_FUNCTIONS[activation](x))` in one pass and is called instead of function and transform. For
            functions that work in place it takes a method `fused_in_place(x, activation)` that leaves in x what the
            function would, or what it returns: others may go on with x. And it may have a method `forward_owned(x)`
            that is called instead of `forward` where nobody else has x, so that it can write its result there (not
            where autograd records).
        stage: Where in the chain of this place it stands.
        key: Its name in the chain and so in `state_dict`, unique at each place; by default its class name in lower
            case. Algorithms use their own name.

    Returns:
        A handle whose `remove()` undoes this.

    Raises:
        TransformError: There is no such module or function, the forward of the module is out of reach, or the key is
            taken or unusable. Nothing has been changed.
    """
    key = type(transform).__name__.lower() if key is None else key
    if not key or "." in key:
        raise TransformError(
            f"a transform's key becomes part of names in state_dict: {key!r} must not be empty or dotted"
        )
    owner = _owner(model, place)
    _check_reachable(model, owner, place)
    if isinstance(place, CallInput | CallOutput):
        functions_named(place.function)
    transformed_class(base_class(owner), frozenset(), activations=True)  # fails before anything is changed
    container = activations_of(owner)
    name = None if container is None else container.chain_name(_stored(container, place))
    if container is not None and name is not None and key in container.chain(name)._modules:
        raise TransformError(f"'{place}' already has a transform named '{key}'; remove it first, or choose another key")
    container = _attach(owner)
    if name is None:
        name = _free_name(container, place)
        container.add_module(name, TransformChain().train(owner.training))
        container.places[name] = place
    transform.train(owner.training)
    container.chain(name).add(key, transform, int(stage))
    container.make_plan()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and owner in set(module.modules()):
            _attach(module)
    return ActivationTransformHandle(place, key, transform, stage, model)


def activation_transforms(model: nn.Module) -> list[ActivationTransformHandle]:
    """Returns every activation transform of `model`, in the order of its modules."""
    return [
        ActivationTransformHandle(
            replace(place, module=module_name),
            key,
            cast("nn.Module", transform),
            Stage(container.chain(name).stage_of(key)),
            model,
        )
        for module_name, container in _containers(model)
        for name, place in container.places.items()
        for key, transform in container.chain(name)._modules.items()
    ]


def get_activation_transform(model: nn.Module, place: ActivationPlace, key: str) -> nn.Module | None:
    """Returns the transform `key` at `place`, or None."""
    container = activations_of(_owner(model, place))
    name = None if container is None else container.chain_name(_stored(container, place))
    return None if container is None or name is None else container.chain(name)._modules.get(key)


def strip_activation_transforms(model: nn.Module) -> None:
    """Removes every activation transform of `model`, which then computes with the activations as they are."""
    for _, module in list(model.named_modules()):
        if activations_of(module) is not None:
            del module.__dict__[ACTIVATIONS_ATTRIBUTE]
            update_class(module)


def activations_of(module: nn.Module) -> ActivationTransforms | None:
    """Returns the container of a module's activation transforms, or None."""
    if isinstance(module, torch.jit.ScriptModule):  # compiled elsewhere, out of reach
        return None
    found = module.__dict__.get(ACTIVATIONS_ATTRIBUTE)
    return found if isinstance(found, ActivationTransforms) else None


def _containers(model: nn.Module) -> Iterator[tuple[str, ActivationTransforms]]:
    for name, module in list(model.named_modules()):
        if (container := activations_of(module)) is not None:
            yield name, container


def _stored(container: ActivationTransforms, place: ActivationPlace) -> ActivationPlace:
    """Returns the place under the module name that the container knows (a shared module has several)."""
    return next((p for p in container.places.values() if replace(p, module=place.module) == place), place)


def _owner(model: nn.Module, place: ActivationPlace) -> nn.Module:
    try:
        return model.get_submodule(place.module)
    except AttributeError as error:
        raise TransformError(f"there is no module '{place.module}' below {type(model).__name__}") from error


def _check_reachable(model: nn.Module, owner: nn.Module, place: ActivationPlace) -> None:
    what = f"'{place.module or 'model'}' ({type(owner).__name__})"
    if isinstance(owner, torch.jit.ScriptModule):
        raise TransformError(f"{what} is a ScriptModule, whose forward cannot be changed; compress it before scripting")
    if "forward" in owner.__dict__:
        raise TransformError(
            f"{what} has a forward of its own as an attribute (accelerate and others set one), which would bypass "
            "transforms; remove it before compression (accelerate: remove_hook_from_module) and set it again afterwards"
        )
    if type(owner).forward is nn.Module.forward:
        raise TransformError(f"{what} has no forward: it only holds other modules; name one of these")
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and owner is module.out_proj:
            raise TransformError(
                f"{what} is never called: '{name}' uses its weight directly; transform '{name}' instead"
            )
    taken = activations_of(owner) is None and hasattr(owner, ACTIVATIONS_ATTRIBUTE)
    if taken:
        raise TransformError(
            f"{what} has an attribute '{ACTIVATIONS_ATTRIBUTE}' of its own; rename it, compress-core keeps its "
            "transforms under that name"
        )


def _attach(owner: nn.Module) -> ActivationTransforms:
    container = activations_of(owner)
    if container is None:
        container = ActivationTransforms(base_class(owner))
        container.train(owner.training)
        owner.__dict__[ACTIVATIONS_ATTRIBUTE] = container
        update_class(owner)
    return container


def _drop_empty(model: nn.Module) -> None:
    """Removes containers without places; those of encoders only when nothing below them is transformed any more."""
    for _, module in list(model.named_modules()):
        container = activations_of(module)
        if container is None or container.places:
            continue
        below = any(bool(other.places) for _, other in _containers(module))
        if not below or not isinstance(module, nn.TransformerEncoder):
            del module.__dict__[ACTIVATIONS_ATTRIBUTE]
            update_class(module)


def _free_name(container: ActivationTransforms, place: ActivationPlace) -> str:
    """Returns a name for state_dict that says which place it is, the same in every run."""
    path = place.item if isinstance(place, ModuleOutput | CallOutput) else place.argument
    parts = ["output" if isinstance(place, ModuleOutput | CallOutput) else "input", *map(str, path)]
    if isinstance(place, CallInput | CallOutput):
        parts = [*place.function.split("."), str(place.calls.site), *parts]
    name = "_".join("".join(c if c.isalnum() else "_" for c in part) for part in parts)
    while name in container._modules or hasattr(container, name):
        name += "_"
    return name
