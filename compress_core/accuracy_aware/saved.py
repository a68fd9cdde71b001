"""The files of accuracy-aware training: the last state of the search, and the best model so far.

A best model has the number of its validation in its name, and is removed only when a later state of the search that no
longer needs it is on the disk. So at any moment a process can be killed, and what `last.pt` refers to is there.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field

from compress_core.accuracy_aware.functions import of_first_rank
from compress_core.accuracy_aware.records import EpochRecord, Phase
from compress_core.accuracy_aware.search import SearchState
from compress_core.data.ranks import is_first_rank, together
from compress_core.errors import FileError, StateError, UsageError
from compress_core.saved import parsed
from compress_core.session.checkpoints import Checkpoint, read_checkpoint, save_checkpoint
from compress_core.session.controller import CompressionController

LAST = "last.pt"
_KEY = "accuracy_aware_training"


class Progress(BaseModel):
    """Everything that the loop knows, besides the model and the optimizers.

    Attributes:
        mode: The mode.
        settings: The numbers of the config and the arguments that have to be the same to resume.
        uncompressed_accuracy: Metric of the uncompressed model.
        phase: The phase.
        epochs: Epochs trained in all.
        epochs_since_reset: Epochs trained since the optimizers were made.
        best_metric: Best metric since then; None before the first.
        is_stopped: Whether the user has stopped the initial phase.
        history: All validations.
        best: Index in `history` of the best candidate.
        best_of_user: Name of the copy of the file that `dump_checkpoint_fn` wrote for it.
        search: Where the search is; None before it.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    mode: Literal["early_exit", "adaptive_compression_level"]
    settings: dict[str, float | int | str | None]
    uncompressed_accuracy: float
    phase: Phase = "initial"
    epochs: int = Field(0, ge=0)
    epochs_since_reset: int = Field(0, ge=0)
    best_metric: float | None = None
    is_stopped: bool = False
    history: list[EpochRecord] = Field(default_factory=list)
    best: int | None = Field(None, ge=0)
    best_of_user: str | None = None
    search: SearchState | None = None


def is_single_process() -> bool:
    """Returns whether no other process trains with this one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def best_name(index: int) -> str:
    """Returns how the files of the candidate with this index begin."""
    return f"best_{index:05d}"


class Folder:
    """The folder of one run.

    Args:
        path: The folder; it exists.
        controller: The controller.
    """

    def __init__(self, path: Path, controller: CompressionController) -> None:
        self.path, self._controller = path, controller

    @classmethod
    def new(cls, log_dir: str | os.PathLike[str] | None, controller: CompressionController) -> Folder:
        """Makes a folder of its own for a run: `<log_dir>/accuracy_aware_training/<date and time>`.

        Raises:
            FileError: It cannot be made.
        """
        name = of_first_rank("the name of the folder", time.strftime("%Y-%m-%d__%H-%M-%S"))
        above = Path("runs" if log_dir is None else log_dir) / _KEY
        found = of_first_rank("the folder", str(_made(above, name)) if is_first_rank() else "")
        return cls(Path(found), controller)

    def save_best(self, index: int) -> None:
        """Saves the model as the candidate with this index."""
        with together("accuracy-aware training: saving the best model"):
            if is_first_rank():
                save_checkpoint(self._best(index), self._controller)

    def load_best(self, index: int) -> None:
        """Restores model and controller as they were saved; random generators go on."""
        with together("accuracy-aware training: loading the best model"):
            checkpoint = read_checkpoint(self._best(index))
        checkpoint.restore(self._controller, rng=False)

    def save_last(self, progress: Progress, optimizer: Any, scheduler: Any) -> None:
        """Saves everything that is needed to go on; removes best models that are no longer the best."""
        with together("accuracy-aware training: saving its state"):
            if not is_first_rank():
                return
            extra = {_KEY: progress.model_dump(), "generators": [g.get_state() for g in self._generators()]}
            save_checkpoint(self.path / LAST, self._controller, optimizer=optimizer, scheduler=scheduler, **extra)
            self.remove_others(progress.best)

    def remove_others(self, best: int | None) -> None:
        """Removes the files of models that are no longer the best."""
        for file in self.path.glob("best_*"):
            if best is None or not file.name.startswith(best_name(best)):
                with contextlib.suppress(OSError):
                    file.unlink()

    def restore(self, checkpoint: Checkpoint, optimizer: Any, scheduler: Any) -> None:
        """Restores what `save_last` has saved."""
        saved, generators = checkpoint.extra.get("generators"), self._generators()
        if not isinstance(saved, list) or len(saved) != len(generators):
            raise StateError(
                f"the checkpoint '{checkpoint.path}' has the random generators of other data loaders; register the "
                "same loaders as when it was saved (register_default_init_args, init_loader)"
            )
        single = is_single_process()
        checkpoint.restore(self._controller, optimizer=optimizer, scheduler=scheduler, rng=single)
        for generator, state in zip(generators if single else (), saved, strict=False):
            generator.set_state(state)

    def _generators(self) -> list[torch.Generator]:
        return self._controller.context.generators()

    def _best(self, index: int) -> Path:
        return self.path / f"{best_name(index)}.pt"


def read_progress(path: str | os.PathLike[str]) -> tuple[Checkpoint, Progress]:
    """Reads what `save_last` has saved.

    Args:
        path: The file, or the folder that it is in.

    Raises:
        FileError: There is no such file.
        StateError: It is damaged, or no state of accuracy-aware training.
    """
    file = Path(path)
    checkpoint = read_checkpoint(file / LAST if file.is_dir() else file)
    if _KEY not in checkpoint.extra:
        raise StateError(
            f"'{checkpoint.path}' is a checkpoint, but not one of accuracy-aware training that can be resumed; give "
            f"the file {LAST} of the folder of a run, or the folder"
        )
    return checkpoint, parsed(Progress, checkpoint.extra[_KEY], f"{checkpoint.path}: extra['{_KEY}']")


def check_same_settings(saved: Progress, now: Progress, path: str) -> None:
    """Refuses to go on with other numbers than those that the search began with.

    Raises:
        StateError: Names the first that differs.
    """
    if saved.mode != now.mode:
        raise StateError(f"the checkpoint '{path}' is of mode '{saved.mode}', and the config has '{now.mode}'")
    for name in sorted(saved.settings.keys() | now.settings.keys()):
        before, here = saved.settings.get(name), now.settings.get(name)
        if before != here:
            raise StateError(
                f"{name}: is {here!r}, and was {before!r} when the checkpoint '{path}' was saved; set it back to go "
                "on, or begin anew without resume_from"
            )


def _made(above: Path, name: str) -> Path:
    for number in range(1000):
        folder = above / (name if not number else f"{name}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise FileError(f"log_dir: cannot make the folder '{folder}': {error.strerror or error}") from error
        return folder
    raise UsageError(f"log_dir: '{above}' has a thousand runs of this second; give another folder")
