"""The compressed model goes through torch's compiler, exporters, and mixed precision as the plain one does."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import SkipTest

import torch
from torch import nn

from compress_core.testing.case import Case, require
from compress_core.testing.outputs import require_close, scalar
from compress_core.testing.tags import check

_TRACEABLE = (
    "Write forward of transforms with tensor operations alone: no .item(), no branches on values, no printing, no "
    "state in Python numbers."
)


@check()
def check_compile_eval(case: Case) -> None:
    """`torch.compile(fullgraph=True)` takes the model in eval mode.

    With the backend `eager`: it finds graph breaks, and what is computed is what was traced. See `check_inductor_eval`.
    """
    _check_compile(case, "eager", training=False)


@check()
def check_compile_train(case: Case) -> None:
    """`torch.compile(fullgraph=True)` takes the model in training mode, with gradients (backend `aot_eager`)."""
    _check_compile(case, "aot_eager", training=True)


@check(needs=["inductor"])
def check_inductor_eval(case: Case) -> None:
    """As `check_compile_eval`, with torch's default backend, which takes seconds to minutes."""
    _check_compile(case, "inductor", training=False)


@check(needs=["inductor"])
def check_inductor_train(case: Case) -> None:
    """As `check_compile_train`, with torch's default backend."""
    _check_compile(case, "inductor", training=True)


def _check_compile(case: Case, backend: str, *, training: bool) -> None:
    _, model = case.compressed()
    model.train(training)
    twin = copy.deepcopy(model)
    torch.compiler.reset()
    with _unless_plain_fails(lambda: _compiled(case.model().train(training), backend)(*case.inputs)):
        actual = _compiled(twin, backend)(*case.inputs)
    expected = model(*case.inputs)
    # Only Inductor sums in another order; the other backends call the operators that were traced.
    step = case.rounding_step if backend == "inductor" else 0.0
    what = f"the model compiled with the backend {backend}"
    require_close(actual, expected, case.tolerance, what, _TRACEABLE, rounding_step=step)
    if training:
        torch.autograd.backward(scalar(actual))
        torch.autograd.backward(scalar(expected))
        for (name, got), wanted in zip(twin.named_parameters(), model.parameters(), strict=True):
            require(
                (got.grad is None) == (wanted.grad is None),
                f"'{name}' gets a gradient only compiled, or only without",
                _TRACEABLE,
            )
            if wanted.grad is not None:
                gradient = f"the gradient of '{name}' with the backend {backend}"
                require_close(got.grad, wanted.grad, case.tolerance * 10, gradient, _TRACEABLE, rounding_step=2 * step)
    torch.compiler.reset()


def _compiled(model: nn.Module, backend: str) -> Callable[..., object]:
    return torch.compile(model, fullgraph=True, backend=backend)


@check()
def check_export_eval(case: Case) -> None:
    """`torch.export` takes the model in eval mode."""
    _check_export(case, training=False)


@check()
def check_export_train(case: Case) -> None:
    """`torch.export` takes the model in training mode."""
    _check_export(case, training=True)


def _check_export(case: Case, *, training: bool) -> None:
    _, model = case.compressed()
    model.train(training)
    with _unless_plain_fails(lambda: torch.export.export(case.model().train(training), case.inputs)):
        program = torch.export.export(model, case.inputs)
    require_close(
        program.module()(*case.inputs), model(*case.inputs), case.tolerance, "the exported program", _TRACEABLE
    )


@check()
def check_export_onnx(case: Case) -> None:
    """`export_onnx` writes a file that computes in ONNX Runtime what the model computes; skipped without the extra."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise SkipTest(f"{', '.join(missing)}: not installed; pip install 'compress-core[onnx]'")
    controller, model = case.trained()
    with tempfile.TemporaryDirectory() as folder:
        plain = nn.ModuleList([case.model().eval()])[0]
        with _unless_plain_fails(lambda: torch.onnx.export(plain, case.inputs, f"{folder}/plain.onnx", dynamo=True)):
            before = model.training
            controller.export_onnx(Path(folder) / "model.onnx", case.inputs)
    require(
        model.training == before, "export_onnx has changed the mode of the model", "Work on the copy you are given."
    )


@check()
def check_backward_and_autocast(case: Case) -> None:
    """Every parameter that gets a gradient in the plain model gets one, under autocast too, of its own shape."""
    plain = case.model().train()
    _, model = case.compressed()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16), _unless_plain_fails(lambda: plain(*case.inputs)):
        loss = scalar(model(*case.inputs))
    torch.autograd.backward(scalar(plain(*case.inputs)))
    torch.autograd.backward(loss)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        if name not in gradients:
            continue  # a module that was replaced
        gradient = gradients[name]
        fine = (gradient is None) == (parameter.grad is None) and (
            gradient is None or (gradient.shape == parameter.shape and bool(gradient.isfinite().all()))
        )
        require(
            fine,
            f"the gradient of '{name}' under autocast is missing, not finite, or of another shape",
            "Keep the graph in your transforms, and compute in the dtype of the weight that is given.",
        )


@contextlib.contextmanager
def _unless_plain_fails(attempt: Callable[[], object]) -> Iterator[None]:
    """What the plain model cannot do is not asked of the compressed one: it is tried only if that fails."""
    try:
        yield
    except Exception as error:
        try:
            attempt()
        except Exception as plain:
            raise SkipTest(f"the plain model cannot do this either: {plain}") from plain
        error.add_note(_TRACEABLE)
        raise
