"""Checkpoints of a training: model, compression, optimizer and random generators in one file, loaded without pickle."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from compress_core.data.rng import RngState
from compress_core.errors import StateError, UsageError
from compress_core.session.checkpoint_file import Content, plain, read, write
from compress_core.session.checkpoint_parts import (
    Given,
    check_entries,
    check_parts,
    given_parts,
    load_parts,
    loading,
    saved_parts,
)
from compress_core.session.controller import CompressionController
from compress_core.session.same_algorithms import check_same_algorithms
from compress_core.transforms.interrupts import interrupts_held


def save_checkpoint(
    path: str | os.PathLike[str],
    controller: CompressionController,
    *,
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    ema: Any = None,
    **extra: Any,
) -> None:
    """Writes all that a training needs to go on with the same bits to one file.

    These are the `state_dict` of the controller's model (not of a wrapper of it, such as DDP), the compression state
    with its clock, the states of what is given, and of the global random generators of torch, CUDA, Python and NumPy.
    A process that is killed while it writes leaves the old file. With several processes, only one of them should save.

    Args:
        path: The file; its folder must exist. An existing file is replaced and keeps its permissions; of a symbolic
            link, the file that it leads to is replaced.
        controller: The controller.
        optimizer: The optimizer; here and below, a list if there are several.
        scheduler: The scheduler of the learning rate.
        scaler: The gradient scaler.
        ema: An average of the weights: an `AveragedModel`, a copy of the model, or anything else with a `state_dict`.
        extra: Anything else by name: numbers, strings, tensors, lists and dicts of these.

    Raises:
        UsageError: Something cannot be loaded without pickle, is not a controller or has no `state_dict`; nothing was
            written.
        FileError: The file cannot be written; an existing one is as it was.
    """
    _check_controller(controller)
    given = given_parts(optimizer=optimizer, scheduler=scheduler, scaler=scaler, ema=ema)
    controller.check_optimizers(*given.get("optimizer", ()))
    content = {
        "extra": {name: plain(value, f"extra['{name}']") for name, value in extra.items()},
        "parts": saved_parts(given, controller.model),
        "model": plain(controller.model.state_dict(), "model"),
        "compression_state": controller.get_compression_state(),
        "rng": RngState().to_dict(),
    }
    write(path, content)


def read_checkpoint(path: str | os.PathLike[str], *, map_location: Any = None) -> Checkpoint:
    """Reads a checkpoint without changing anything, and without running code of the file's.

    Args:
        path: A file that `save_checkpoint` wrote.
        map_location: Where tensors are read to, as in `torch.load`; by default the CPU, from where `restore` copies
            them to wherever model and optimizer are.

    Returns:
        The checkpoint.

    Raises:
        FileError: There is no such file, or it cannot be read.
        StateError: It is no checkpoint, is damaged, or has another format.
    """
    return Checkpoint(os.fspath(path), read(path, map_location))


def load_checkpoint(
    path: str | os.PathLike[str],
    controller: CompressionController,
    *,
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    ema: Any = None,
    map_location: Any = None,
    rng: bool = True,
) -> dict[str, Any]:
    """Reads a checkpoint and restores it: `read_checkpoint(path).restore(controller, ...)`.

    The controller must have the structure that was saved: created from the same model and config, or, if channels have
    been removed by `shrink`, with `compression_state=read_checkpoint(path).compression_state`. It may have been
    trained.

    Args:
        path: A file that `save_checkpoint` wrote.
        controller: The controller.
        optimizer: What was saved as `optimizer`.
        scheduler: What was saved as `scheduler`.
        scaler: What was saved as `scaler`.
        ema: What was saved as `ema`.
        map_location: Where tensors are read to, as in `torch.load`; by default the CPU.
        rng: Whether to restore the random generators, too.

    Returns:
        What was saved as `extra`.

    Raises:
        FileError: There is no such file, or it cannot be read.
        StateError: It is no checkpoint, is damaged, has another format, or does not fit; nothing has changed.
        UsageError: Something that was given has no `state_dict`, or is not a controller.
    """
    checkpoint = read_checkpoint(path, map_location=map_location)
    checkpoint.restore(controller, optimizer=optimizer, scheduler=scheduler, scaler=scaler, ema=ema, rng=rng)
    return checkpoint.extra


class Checkpoint:
    """What `read_checkpoint` returns.

    Attributes:
        path: The file that it was read from.
        version: The version of compress-core that wrote it.
        compression_state: For `create_compressed_model(..., compression_state=)`.
        model_state: The `state_dict` of the compressed model.
        extra: What was saved as `extra`.
    """

    def __init__(self, path: str, content: Content) -> None:
        self.path = path
        self.version = content.version
        self.compression_state: dict[str, Any] = content.compression_state
        self.model_state: dict[str, Any] = content.model
        self.extra: dict[str, Any] = content.extra
        self._parts = content.parts
        self._rng = content.rng

    def __repr__(self) -> str:
        return f"Checkpoint('{self.path}': {', '.join(['model', *self._parts, *self.extra])})"

    def restore(
        self,
        controller: CompressionController,
        *,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        ema: Any = None,
        rng: bool = True,
    ) -> None:
        """Gives model, controller, and everything else the values that they had when they were saved.

        Args:
            controller: A controller of the same structure, whatever state it is in. Its clock is set.
            optimizer: What was saved as `optimizer`, created from the parameters of the resumed model.
            scheduler: What was saved as `scheduler`.
            scaler: What was saved as `scaler`.
            ema: What was saved as `ema`.
            rng: Whether to restore the random generators, too. Several processes that draw different random numbers
                should not, because the file has those of one of them.

        Raises:
            StateError: Something was saved and not given, or given and not saved, or does not fit. Nothing has
                changed then.
            UsageError: Something that was given has no `state_dict`, or is not a controller.
        """
        _check_controller(controller)
        given = given_parts(optimizer=optimizer, scheduler=scheduler, scaler=scaler, ema=ema)
        self._check(controller, given)
        generators = self._generators() if rng else None

        def load() -> None:
            controller.live_state.load(self.compression_state, self.model_state, self._what, self._remedy)
            load_parts(given, self._parts, self._what)
            if generators is not None:
                loading("random generators", self._what, lambda _: generators.restore(), None)

        with interrupts_held():
            changed = [part for parts in given.values() for part in parts]
            controller.context.transaction.run(load, changed, local=True)
        controller.check_optimizers(*given.get("optimizer", ()))

    def _check(self, controller: CompressionController, given: Given) -> None:
        check_same_algorithms(self.compression_state, controller.get_compression_state(), self._what, self._remedy)
        try:
            check_entries(controller.model, self.model_state, f"model of {self._what}")
        except StateError as error:
            raise StateError(f"{error}. {self._remedy}") from error
        check_parts(given, self._parts, controller.model, self.path)

    def _generators(self) -> RngState:
        found: list[RngState] = []
        loading("random generators", self._what, lambda state: found.append(RngState.from_dict(state)), self._rng)
        return found[0]

    @property
    def _what(self) -> str:
        return f"the checkpoint '{self.path}'"

    @property
    def _remedy(self) -> str:
        return (
            "Create model and controller anew, from the same model and config as when it was saved: checkpoint = "
            f"read_checkpoint({self.path!r}); create_compressed_model(model, config, "
            "compression_state=checkpoint.compression_state); checkpoint.restore(controller, ...)"
        )


def _check_controller(controller: Any) -> None:
    if not isinstance(controller, CompressionController):
        hint = "; create_compressed_model returns (controller, model)" if isinstance(controller, nn.Module) else ""
        raise UsageError(f"controller: got a {type(controller).__name__}, not a CompressionController{hint}")
