"""Loads a model named on the command line: `package.module:attribute` or `path/to/file.py:attribute`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from compress_core.errors import UsageError

MODEL_HELP = (
    "package.module:attribute or path/to/file.py:attribute: a torch.nn.Module, or a function (or class) that returns "
    "one when it is called without arguments"
)


def load_model(name: str) -> nn.Module:
    """Returns the model with a name.

    Modules are also searched in the current directory. A file can import modules in its own directory, as when it is
    run.

    Args:
        name: `module:attribute` or `file.py:attribute`. The attribute is a model, or a function or class that returns
            one when called without arguments.

    Raises:
        UsageError: The name does not exist, loading it fails, or it is not a model.
    """
    source, colon, attribute = name.rpartition(":")
    if not (colon and source and attribute):
        raise UsageError(f"{name!r} does not name a model: write package.module:attribute or path/to/file.py:attribute")
    file = Path(source) if source.endswith(".py") else None
    with _import_path([Path.cwd()] if file is None else [file.parent, Path.cwd()]):
        module = _attempt(f"importing {source}", lambda: _module(source, file))
        found: Any = module
        for part in attribute.split("."):
            found = _attempt(name, functools.partial(_attribute, found, part, name))
        if not isinstance(found, nn.Module):
            if not callable(found):
                raise UsageError(
                    f"{name} is {_kind(found)}; it has to be a torch.nn.Module or a function that makes one"
                )
            found = _attempt(f"{attribute}()", found)
            if not isinstance(found, nn.Module):
                raise UsageError(f"{name} returns {_kind(found)}; it has to return a torch.nn.Module")
    return found


def _module(source: str, file: Path | None) -> ModuleType:
    if file is None:
        return importlib.import_module(source)
    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    # Under a different name, because the file may be named like a module that other code imports.
    name = f"_model_of_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up the module that they are defined in
    spec.loader.exec_module(module)
    return module


def _attribute(owner: Any, part: str, name: str) -> Any:
    try:
        return getattr(owner, part)
    except AttributeError:
        raise UsageError(f"{name}: {_kind(owner)} has no attribute {part!r}") from None


def _attempt(what: str, action: Callable[[], Any]) -> Any:
    """Calls the user's code and turns any exception into a UsageError of one line."""
    try:
        return action()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # SystemExit: a script that calls sys.exit when it is imported
        raise UsageError(f"{what} fails: {type(error).__name__}: {error}") from error


def _kind(value: Any) -> str:
    if isinstance(value, ModuleType):
        return f"the module {value.__name__.removeprefix('_model_of_')}"
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


@contextlib.contextmanager
def _import_path(directories: Sequence[Path]) -> Iterator[None]:
    """Context manager in which modules in these directories can be imported."""
    entries = [str(directory.resolve()) for directory in directories]
    sys.path[:0] = entries
    try:
        yield
    finally:
        for entry in entries:
            with contextlib.suppress(ValueError):
                sys.path.remove(entry)
