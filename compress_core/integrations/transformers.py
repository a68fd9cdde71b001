"""Compression in the `Trainer` of Hugging Face transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress_core.api import create_compressed_model
from compress_core.config import CompressionConfig
from compress_core.errors import FileError, StateError, UsageError
from compress_core.integrations.progress import Progress
from compress_core.integrations.saved_run import SavedRun, read_run, write_run
from compress_core.session.controller import CompressionController

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise ImportError(
        f"compress_core.integrations.transformers needs transformers ({error}): "
        "pip install 'compress-core[transformers]'"
    ) from error

# Transforms keep their parameters in containers of these names: scales, ranges, scores.
_OF_TRANSFORMS = "_transforms."


class CompressionCallback(TrainerCallback):
    """Drives a controller in a `Trainer`.

    It begins epochs and optimizer steps (not micro-batches), adds `controller.loss()` to the training loss, keeps
    weight decay away from scales, saves the compression state in every folder that the Trainer saves the model to,
    resumes from there, and logs the statistics at the end of each epoch as `compression/...`.

    Example:
        >>> controller, model = create_compressed_model(model, config)
        >>> trainer = CompressionCallback(controller).attach(Trainer(model=model, args=args, train_dataset=data))
        >>> trainer.train()
        >>> controller.strip().save_pretrained("compressed")

    Args:
        controller: The controller of the model that the Trainer trains.
        log_statistics: Whether to log the statistics at the end of each epoch.

    Raises:
        UsageError: `controller` is no controller.
    """

    def __init__(self, controller: CompressionController, *, log_statistics: bool = True) -> None:
        self._progress = Progress(controller)
        self._log_statistics = log_statistics
        self._trainer: Trainer | None = None
        self._resumed: SavedRun | None = None
        self._epoch = 0

    @property
    def controller(self) -> CompressionController:
        """The controller."""
        return self._progress.controller

    def attach(self, trainer: Trainer) -> Trainer:
        """Makes a Trainer train with compression.

        Args:
            trainer: The Trainer, or any subclass of it, of the model that the controller compresses.

        Returns:
            The same Trainer.

        Raises:
            UsageError: It trains another model, or in a way in which compression would be wrong.
        """
        self._check(trainer)
        if self._trainer is not None:
            raise UsageError("this CompressionCallback is attached to a Trainer already; make another one")
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        wrappers: dict[str, Callable[..., Any]] = {
            "train": self._train,
            "compute_loss": self._compute_loss,
            "save_model": self._save_model,
            "get_decay_parameter_names": self._decay_names,
        }
        for name, wrapper in wrappers.items():
            setattr(trainer, name, partial(wrapper, getattr(trainer, name)))
        return trainer

    def _check(self, trainer: Trainer) -> None:
        args = trainer.args
        if trainer.model_init is not None:
            raise UsageError("Trainer: model_init makes a model of its own for each training; give model=")
        if trainer.accelerator.unwrap_model(trainer.model) is not self.controller.model:
            raise UsageError(
                f"Trainer: its model is a {type(trainer.model).__name__} that is not the controller's; give it the "
                "model that create_compressed_model returned"
            )
        for used, name in ((trainer.is_deepspeed_enabled, "DeepSpeed"), (trainer.is_fsdp_enabled, "FSDP")):
            if used:
                raise UsageError(f"Trainer: with {name}, processes have parts of weights; train with torchrun alone")
        if args.n_gpu > 1:
            raise UsageError(
                f"Trainer: one process with {args.n_gpu} GPUs copies the model for each step (DataParallel); start one "
                "process for each GPU with torchrun, or make one visible with CUDA_VISIBLE_DEVICES"
            )
        if args.auto_find_batch_size:
            raise UsageError(
                "Trainer: auto_find_batch_size begins the training again after steps have been made; give "
                "per_device_train_batch_size"
            )

    def _train(
        self, train: Callable[..., Any], resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Wraps `Trainer.train`: the checkpoint must fit the controller before anything is loaded."""
        assert self._trainer is not None
        path = resume_from_checkpoint
        if path is True:
            path = get_last_checkpoint(self._trainer.args.output_dir)  # type: ignore[no-untyped-call]
        self._resumed = None
        if isinstance(path, (str, os.PathLike)):
            run = read_run(path)
            run.check(self.controller)
            self._resumed = run
        return train(resume_from_checkpoint, *args, **kwargs)

    def _compute_loss(
        self, compute_loss: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Wraps `Trainer.compute_loss`: in training, the loss of the algorithms is added."""
        found = compute_loss(model, inputs, *args, **kwargs)
        if not model.training:
            return found
        loss, *outputs = found if isinstance(found, tuple) else (found,)
        loss = loss + self._own_loss(kwargs.get("num_items_in_batch"))
        return (loss, *outputs) if outputs else loss

    def _own_loss(self, num_items_in_batch: Any) -> torch.Tensor:
        """Returns the loss of the algorithms, so that it counts once for each optimizer step."""
        trainer = self._trainer
        assert trainer is not None
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_items or trainer.compute_loss_func is not None
        # Losses that are divided by the number of items of all micro-batches are summed up, others are averaged.
        return self.controller.loss() / (trainer.current_gradient_accumulation_steps if scaled else 1)

    def _save_model(
        self, save_model: Callable[..., Any], output_dir: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Wraps `Trainer.save_model`: the compression state comes first, so no weights are ever without it."""
        assert self._trainer is not None
        if self._trainer.args.should_save:
            write_run(str(output_dir or self._trainer.args.output_dir), self._progress.saved())
        return save_model(output_dir, *args, **kwargs)

    def _decay_names(self, names: Callable[..., list[str]], model: nn.Module) -> list[str]:
        """Wraps `Trainer.get_decay_parameter_names`: decay would shrink scales, whatever the loss says."""
        return [name for name in names(model) if _OF_TRANSFORMS not in name]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the clock of the controller."""
        if self._trainer is None:
            raise UsageError(
                "CompressionCallback: call callback.attach(trainer) once the Trainer is made; in callbacks=[...] alone "
                "it sees neither the loss nor what is saved"
            )
        self.controller.check_optimizers(kwargs.get("optimizer"))
        self._epoch = 0
        if self._resumed is None:
            self._progress.start()
            return
        self._progress.resume(self._resumed)
        # Exactly a whole number at the end of an epoch; the Trainer begins the epoch it was in once more.
        self._epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins an epoch of the controller."""
        self._progress.begin_epoch(self._epoch)
        self._epoch += 1

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logs the statistics of the controller."""
        assert self._trainer is not None
        if self._log_statistics:
            self._trainer.log(self._progress.figures())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins an optimizer step of the controller."""
        self.controller.scheduler.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logs the last epoch, and warns if the model is not compressed as far as was asked for."""
        self.controller.log_epoch()
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None:  # the Trainer has loaded its weights
            self._progress.resume(read_run(best))
        self._progress.warn_if_unfinished(f"with the weights of '{best}'" if best else "at the end of the training")


def load_compressed(
    model: nn.Module, config: CompressionConfig | Mapping[str, Any] | str | Path, folder: str | os.PathLike[str]
) -> tuple[CompressionController, nn.Module]:
    """Compresses a model as one that the Trainer saved with a `CompressionCallback`, and loads its weights.

    `from_pretrained` alone would load the weights without masks and scales.

    Args:
        model: The model as it was before compression; its weights do not matter:
            `AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folder))`.
        config: The config that it was compressed with.
        folder: A folder that the Trainer has saved the model to.

    Returns:
        The controller, with its clock where it was, and the model.

    Raises:
        FileError: The folder cannot be read.
        StateError: It has no compression state, or other weights than this model.
    """
    run = read_run(folder)
    controller, model = create_compressed_model(model, config, run.compression_state)
    _load_weights(model, Path(folder))
    run.check(controller, ("plan", "state"))
    return controller, model


def _load_weights(model: nn.Module, folder: Path) -> None:
    from safetensors import SafetensorError  # noqa: PLC0415 - comes with transformers, and only this needs it
    from safetensors.torch import load_file  # noqa: PLC0415

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileError(f"there is no model.safetensors in '{folder}'")
    try:
        weights = {name: value for file in files for name, value in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise StateError(f"the weights in '{folder}' are damaged: {error}") from error
    try:
        found = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise StateError(f"the weights in '{folder}' are not those of this model: {error}") from error
    # Of tensors that share memory, files have the first alone.
    state = model.state_dict()
    loaded = {tensor.data_ptr() for name, tensor in state.items() if name in weights}
    missing = [name for name in found.missing_keys if state[name].data_ptr() not in loaded]
    if missing or found.unexpected_keys:
        what, names = ("lack", missing) if missing else ("have", found.unexpected_keys)
        raise StateError(f"the weights in '{folder}' {what} {names[:3]}, so they are not those of this model")
