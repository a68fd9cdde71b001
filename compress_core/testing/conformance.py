"""Checks of the contract. Each takes a `Case` and raises AssertionError where an algorithm breaks its promise.

What the plain model cannot do (some recurrent layers do not compile) is not asked of the compressed one: the check is
skipped (`unittest.SkipTest`, which pytest understands).
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import SkipTest

import torch
from torch import nn

from compress_core.api import create_compressed_model
from compress_core.contract.hookspecs import hookimpl
from compress_core.session.controller import CompressionController
from compress_core.testing.fingerprint import fingerprint
from compress_core.torch_internals import tree_leaves
from compress_core.transforms.activation import activation_transforms
from compress_core.transforms.generated import base_class


@dataclass
class Case:
    """A model and a config to check.

    Attributes:
        make_model: Makes the model; the same weights at each call are not needed.
        inputs: Example arguments of its forward.
        config: The config; its algorithms must not need data unless `loader` gives it.
        loader: Calibration batches.
        tolerance: Largest difference that compilation may make, absolute and relative.
        strip_tolerance: The same for `strip`: 0, unless the stripped model sums in another order because its tensors
            are smaller.
    """

    make_model: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    config: Mapping[str, Any]
    loader: Iterable[Any] | None = None
    tolerance: float = 1e-4
    strip_tolerance: float = 0.0
    _state: dict[str, torch.Tensor] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """Returns a model with the weights of this case."""
        model = self.make_model()
        if not self._state:
            self._state = copy.deepcopy(model.state_dict())
        model.load_state_dict(self._state)
        model.zero_grad()
        return model

    def compressed(self) -> tuple[CompressionController, nn.Module]:
        """Returns a compressed model and its controller."""
        return create_compressed_model(self.model(), self.config, init_loader=self.loader)


def conformance_checks() -> Sequence[Callable[[Case], None]]:
    """Returns all checks."""
    return (
        check_keeps_identity,
        check_loads_plain_state_dict,
        check_state_dict_round_trip,
        check_deepcopy,
        check_pickle,
        check_torch_save,
        check_compile_eval,
        check_compile_train,
        check_export_eval,
        check_export_train,
        check_backward_and_autocast,
        check_strip,
        check_state_is_json_and_resumes,
        check_rolls_back_from_every_hook,
        check_rolls_back_from_every_forward,
        check_rolls_back_from_the_loader,
    )


def check_keeps_identity(case: Case) -> None:
    """The model is the same object of the same class, with the same parameter objects under the same names.

    Of a model with replaced modules this holds for what has not been replaced.
    """
    model = case.model()
    before = dict(model.named_parameters())
    classes = {name: type(module) for name, module in model.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    controller, compressed = create_compressed_model(model, case.config, init_loader=case.loader)
    assert compressed is model
    after = dict(model.named_parameters())
    replacing = _replaces_modules(controller)
    for name, parameter in before.items():
        if name in after or not replacing:
            assert after[name] is parameter, f"{name} is another object now"
    for name, module in model.named_modules():
        if name in classes and (module is modules[name] or not replacing):
            assert base_class(module) is classes[name], f"{name} is a {type(module)}"
            assert isinstance(module, classes[name])
            assert module.training is modes[name]
    if not any(name.startswith(("weight_transforms", "activation_transforms")) for name, _ in model.named_modules()):
        assert type(model) is classes[""]


def check_loads_plain_state_dict(case: Case) -> None:
    """The state_dict of the plain model loads strictly, and changes no helper."""
    controller, model = case.compressed()
    _skip_if_replaced(controller)
    helpers = {k: v.clone() for k, v in model.state_dict().items() if k not in case._state}
    plain = {name: v * 0.5 + 0.125 if v.is_floating_point() else v for name, v in case._state.items()}
    model.load_state_dict(plain, strict=True)
    loaded = model.state_dict()
    for name, value in plain.items():
        assert torch.equal(loaded[name], value), name
    for name, value in helpers.items():
        assert torch.equal(loaded[name], value), name


def check_state_dict_round_trip(case: Case) -> None:
    """What a compressed model saves brings another one to the same outputs, through weights_only."""
    _, model = case.compressed()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    _, other = case.compressed()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(0.5)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    _assert_same(_run(other, case), _run(model, case))


def check_deepcopy(case: Case) -> None:
    """A deep copy computes the same and shares nothing."""
    _, model = case.compressed()
    expected = _run(model, case)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    _assert_same(_run(twin, case), expected)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


def check_pickle(case: Case) -> None:
    """A pickled model comes back as it was."""
    _, model = case.compressed()
    twin = pickle.loads(pickle.dumps(model))
    _assert_same(_run(twin, case), _run(model, case))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


def check_torch_save(case: Case) -> None:
    """`torch.save` of the whole model works."""
    _, model = case.compressed()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    _assert_same(_run(torch.load(file, weights_only=False), case), _run(model, case))


def check_compile_eval(case: Case) -> None:
    """`torch.compile(fullgraph=True)` works in eval mode."""
    _check_compile(case, training=False)


def check_compile_train(case: Case) -> None:
    """`torch.compile(fullgraph=True)` works in training mode, with gradients."""
    _check_compile(case, training=True)


def check_export_eval(case: Case) -> None:
    """`torch.export` works in eval mode."""
    _check_export(case, training=False)


def check_export_train(case: Case) -> None:
    """`torch.export` works in training mode."""
    _check_export(case, training=True)


def check_backward_and_autocast(case: Case) -> None:
    """Every parameter that gets a gradient in the plain model gets one, under autocast too, of its own shape."""
    plain = case.model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            plain(*case.inputs)
        except RuntimeError as error:
            raise SkipTest(f"the plain model cannot do this either: {error}") from error
    torch.autograd.backward(_scalar(plain(*case.inputs)))
    controller, model = case.compressed()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = _scalar(model(*case.inputs))
    torch.autograd.backward(loss)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        if name not in gradients and _replaces_modules(controller):
            continue
        gradient = gradients[name]
        assert (gradient is None) == (parameter.grad is None), name
        assert gradient is None or (gradient.shape == parameter.shape and bool(gradient.isfinite().all())), name


def check_strip(case: Case) -> None:
    """`strip` gives a plain model of plain classes with the names of before, and the same outputs.

    Activation transforms that an algorithm leaves in place at strip are a part of the plain model: they keep their
    modules' classes and add names, and the model is copied and pickled with them. Where modules were replaced, the
    plain model is made of torch's own and of the original's classes, and its names are those of the compressed one.
    """
    controller, model = case.compressed()
    expected = _run(model, case)
    plain = controller.strip()
    if case.strip_tolerance:
        _assert_close(_run(plain, case), expected, case.strip_tolerance)
    else:
        _assert_same(_run(plain, case), expected)
    _assert_same(_run(model, case), expected)
    original = case.model()
    if activation_transforms(plain):
        _assert_same(_run(copy.deepcopy(plain), case), expected)
        _assert_same(_run(pickle.loads(pickle.dumps(plain)), case), expected)
        for name, module in original.named_modules():
            assert base_class(plain.get_submodule(name)) is type(module), f"{name} has another class"
        assert not any(".weight_transforms." in f".{name}" for name in plain.state_dict())
        assert set(plain.state_dict()) >= set(original.state_dict())
        return
    if _replaces_modules(controller):
        own = {type(module) for module in original.modules()}
        for name, module in plain.named_modules():
            assert type(module) in own or type(module).__module__.startswith("torch.nn."), f"{name} is no plain module"
        assert set(plain.state_dict()) <= set(model.state_dict())
        return
    assert [type(m) for m in plain.modules()] == [type(m) for m in original.modules()]
    assert list(plain.state_dict()) == list(original.state_dict())


def check_state_is_json_and_resumes(case: Case) -> None:
    """State and state_dict together, through JSON and weights_only, give the same model without any data."""
    controller, model = case.compressed()
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    state = json.loads(json.dumps(controller.get_compression_state()))
    resumed_controller, resumed = create_compressed_model(case.model(), case.config, compression_state=state)
    resumed.load_state_dict(model.state_dict(), strict=True)
    _assert_same(_run(resumed, case), _run(model, case))
    assert resumed_controller.get_compression_state()["algorithms"] == state["algorithms"]
    assert resumed_controller.scheduler.get_state() == controller.scheduler.get_state()
    assert resumed_controller.compression_stage() == controller.compression_stage()


def check_rolls_back_from_every_hook(case: Case) -> None:
    """An exception or Ctrl-C at any hook leaves model and random generators as they were, bit for bit."""
    hooks = ("compress_configure", "compress_plan", "compress_commit", "compress_calibrate")
    for hook in (*hooks, "compress_observe", "compress_initialize"):
        for error in (RuntimeError("injected"), KeyboardInterrupt()):
            assert _check_rollback(case, observer=_failing_observer(hook, error), error=error), f"{hook} was not called"
    state = case.compressed()[0].get_compression_state()
    for error in (RuntimeError("injected"), KeyboardInterrupt()):
        observer = _failing_observer("compress_load_state", error)
        assert _check_rollback(case, observer=observer, error=error, state=state), "compress_load_state was not called"


def check_rolls_back_from_every_forward(case: Case) -> None:
    """An exception in the n-th forward of initialization leaves everything as it was, whatever n.

    A forward that is only tried, such as one with fake tensors, may fail with an exception without consequences.
    """
    model = case.model()
    counter = _CountingForward(model, 0, ValueError())
    handle = model.register_forward_pre_hook(counter)
    create_compressed_model(model, case.config, init_loader=case.loader)
    handle.remove()
    forwards = -counter.left
    if not forwards:
        raise SkipTest("initialization with this config runs no forward")
    for count in range(1, forwards + 1):
        interrupt = KeyboardInterrupt()
        assert _check_rollback(case, failing_forward=count, error=interrupt), f"forward {count} was not reached"
        reached = _check_rollback(case, failing_forward=count, error=ValueError("injected"))
        assert reached or count > 1, "the model failed from the first forward on, and nobody cared"


def check_rolls_back_from_the_loader(case: Case) -> None:
    """An exception raised by the data loader leaves everything as it was."""
    if case.loader is None:
        raise SkipTest("this case has no loader")
    batches = list(case.loader)
    for count in range(len(batches)):
        for error in (OSError("injected"), KeyboardInterrupt()):
            # A loader that is not read so far has nothing to fail with.
            _check_rollback(case, loader=_FailingLoader(batches, count, error), error=error)
    first = OSError("injected")
    assert _check_rollback(case, loader=_FailingLoader(batches, 0, first), error=first), "the loader was not read"


def _failing_observer(hook: str, error: BaseException) -> object:
    if hook == "compress_configure":

        def fail(self: object, algorithm: Any) -> None:
            raise error

    elif hook in {"compress_observe", "compress_initialize"}:

        def fail(self: object, model: nn.Module) -> None:  # type: ignore[misc]
            next(model.parameters()).data.add_(1)
            raise error

    else:

        def fail(self: object, model: nn.Module, algorithm: Any) -> None:  # type: ignore[misc]
            next(model.parameters()).data.add_(1)
            raise error

    return type("FailingObserver", (), {hook: hookimpl(fail)})()


class _CountingForward:
    """Fails at the n-th call of a model's forward, and with an exception at all later ones; copies do not count."""

    def __init__(self, model: nn.Module, limit: int, error: BaseException) -> None:
        self.model = model
        self.left = limit
        self.limit = limit
        self.error = error

    def __deepcopy__(self, memo: Any) -> _CountingForward:
        return self

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if module is not self.model:
            return
        self.left -= 1
        if self.limit and (self.left == 0 or (self.left < 0 and isinstance(self.error, Exception))):
            torch.rand(3)
            raise self.error


class _FailingLoader:
    """Fails instead of giving the n-th batch."""

    def __init__(self, batches: Sequence[Any], limit: int, error: BaseException) -> None:
        self.batches = batches
        self.limit = limit
        self.error = error

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches[: self.limit]
        torch.rand(3)
        raise self.error


def _check_rollback(
    case: Case,
    *,
    error: BaseException,
    observer: object = None,
    failing_forward: int = 0,
    loader: Any = None,
    state: Mapping[str, Any] | None = None,
) -> bool:
    """Returns whether the error was reached."""
    model = case.model()
    if failing_forward:
        model.register_forward_pre_hook(_CountingForward(model, failing_forward, error))
    before = fingerprint(model)
    observers = [] if observer is None else [observer]
    data = case.loader if loader is None else loader
    try:
        create_compressed_model(model, case.config, state, init_loader=data, observers=observers)
    except BaseException as raised:
        if raised is not error and raised.__cause__ is not error:
            raise
        after = fingerprint(model)
        assert after == before, _differences(before, after)
        return True
    return False


def _differences(before: Any, after: Any, path: str = "") -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        return "; ".join(_differences(before.get(key), after.get(key), f"{path}.{key}") for key in keys)
    return f"{path[1:]} is not as it was"


def _check_compile(case: Case, *, training: bool) -> None:
    _skip_unless(lambda: torch.compile(case.model().train(training), fullgraph=True)(*case.inputs))
    torch.compiler.reset()
    _, model = case.compressed()
    model.train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True)
    actual, expected = compiled(*case.inputs), model(*case.inputs)
    _assert_close(actual, expected, case.tolerance)
    if training:
        torch.autograd.backward(_scalar(actual))
        torch.autograd.backward(_scalar(expected))
        for (name, got), wanted in zip(twin.named_parameters(), model.parameters(), strict=True):
            assert (got.grad is None) == (wanted.grad is None), name
            if wanted.grad is not None and got.grad is not None:
                torch.testing.assert_close(got.grad, wanted.grad, rtol=case.tolerance * 10, atol=case.tolerance)
    torch.compiler.reset()


def _check_export(case: Case, *, training: bool) -> None:
    _skip_unless(lambda: torch.export.export(case.model().train(training), case.inputs))
    _, model = case.compressed()
    model.train(training)
    program = torch.export.export(model, case.inputs)
    _assert_close(program.module()(*case.inputs), model(*case.inputs), case.tolerance)


def _replaces_modules(controller: CompressionController) -> bool:
    return any(algorithm.replaces_modules for algorithm in controller.algorithms.values())


def _skip_if_replaced(controller: CompressionController) -> None:
    if _replaces_modules(controller):
        raise SkipTest("modules were replaced, and their parameters have other names")


def _skip_unless(attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except Exception as error:
        raise SkipTest(f"the plain model cannot do this either: {error}") from error


def _run(model: nn.Module, case: Case) -> Any:
    model.eval()
    with torch.no_grad():
        return model(*case.inputs)


def _leaves(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _scalar(output: Any) -> torch.Tensor:
    total = torch.zeros(())
    for leaf in _leaves(output):
        total = total + leaf.float().square().mean()
    return total


def _assert_same(actual: Any, expected: Any) -> None:
    for a, e in zip(_leaves(actual), _leaves(expected), strict=True):
        assert torch.equal(a, e), f"outputs differ by up to {(a - e).abs().max()}"


def _assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    for a, e in zip(_leaves(actual), _leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)
