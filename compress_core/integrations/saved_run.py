"""What the callbacks add to the checkpoints of training libraries."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress_core.errors import StateError, UsageError
from compress_core.files import file_error, replaced_file
from compress_core.session.controller import CompressionController
from compress_core.session.same_algorithms import check_same_algorithms

FILE_NAME = "compression_state.json"
KEY = "compress_core"


@dataclass(frozen=True)
class SavedRun:
    """The compression of a run, as it was when a checkpoint was saved.

    Attributes:
        compression_state: What `controller.get_compression_state()` returned.
        epochs_before: Number of epochs that the controller had seen before the library's epoch 0.
        where: The checkpoint, for messages.
    """

    compression_state: dict[str, Any]
    epochs_before: int
    where: str

    def to_dict(self) -> dict[str, Any]:
        """Returns it JSON-able."""
        return {"compression_state": self.compression_state, "epochs_before": self.epochs_before}

    def check(self, controller: CompressionController, keys: tuple[str, ...] = ("plan",)) -> None:
        """Refuses a controller with another structure than that of the checkpoint.

        Raises:
            StateError: It has other algorithms or plans; the message says how to create the right one.
        """
        remedy = (
            "Create model and controller anew, from the same model and config as when it was saved: state = "
            f"read_compression_state({self.where!r}); create_compressed_model(model, config, compression_state=state)"
        )
        here = controller.get_compression_state()
        check_same_algorithms(self.compression_state, here, f"the checkpoint '{self.where}'", remedy, keys)


def parsed_run(value: Any, where: str) -> SavedRun:
    """Returns what `SavedRun.to_dict` returned as a `SavedRun`.

    Raises:
        StateError: It is something else.
    """
    state = value.get("compression_state") if isinstance(value, Mapping) else None
    before = value.get("epochs_before") if isinstance(value, Mapping) else None
    if not isinstance(state, dict) or type(before) is not int or before < 0:
        raise StateError(f"the checkpoint '{where}' has a compression state that this version does not read")
    return SavedRun(state, before, where)


def write_run(folder: str | os.PathLike[str], run: SavedRun) -> None:
    """Writes the compression of a run into the folder of a checkpoint, which is made if there is none.

    Raises:
        FileError: The file cannot be written; an existing one is as it was.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error("cannot make the folder", folder, error) from error
    with replaced_file(Path(folder) / FILE_NAME) as file:
        file.write(json.dumps(run.to_dict()).encode())


def read_run(path: str | os.PathLike[str]) -> SavedRun:
    """Reads the compression of a run from a checkpoint of transformers, accelerate (folders) or Lightning (a file).

    Raises:
        FileError: It cannot be read.
        StateError: There is no compression state in it.
    """
    where = os.fspath(path)
    if Path(where).is_dir():
        return parsed_run(_read_folder(where), where)
    return parsed_run(_read_file(where), where)


def read_compression_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the compression state in a checkpoint that was saved with one of the callbacks.

    Nothing of the file is run: Lightning's checkpoints are read with `weights_only=True`.

    Args:
        path: A folder that transformers' Trainer, `save_pretrained` with a callback, or accelerate wrote, or a file of
            Lightning.

    Returns:
        For `create_compressed_model(..., compression_state=)`.

    Raises:
        FileError: It cannot be read.
        StateError: There is no compression state in it.
    """
    return read_run(path).compression_state


def _read_folder(folder: str) -> Any:
    file = Path(folder) / FILE_NAME
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise StateError(
            f"the checkpoint '{folder}' has no {FILE_NAME}: it was saved without the CompressionCallback"
        ) from error
    except OSError as error:
        raise file_error("cannot read", file, error) from error
    except (ValueError, RecursionError) as error:
        raise StateError(f"the checkpoint '{folder}' has a {FILE_NAME} that is no JSON ({error})") from error


def _read_file(path: str) -> Any:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise file_error("cannot read", path, error) from error
    except pickle.UnpicklingError as error:
        raise StateError(
            f"the checkpoint '{path}' has more in it than tensors and plain values, which is not loaded because it "
            "could run code. If you trust it: compression_state = torch.load(path, weights_only=False)"
            f"['{KEY}']['compression_state']"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise StateError(f"'{path}' is no checkpoint of torch, or is damaged: {error}") from error
    if not isinstance(content, Mapping) or KEY not in content:
        raise StateError(
            f"the checkpoint '{path}' has no compression state: it was saved without the CompressionCallback, or with "
            "weights only (ModelCheckpoint(save_weights_only=False) saves it)"
        )
    return content[KEY]


def check_controller(controller: Any) -> None:
    """Refuses what is not a controller.

    Raises:
        UsageError: It is something else.
    """
    if not isinstance(controller, CompressionController):
        raise UsageError(
            f"controller: got a {type(controller).__name__}, not the controller that create_compressed_model returned"
        )
