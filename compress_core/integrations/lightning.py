"""Compression in the `Trainer` of Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compress_core.data import ranks
from compress_core.errors import UsageError
from compress_core.integrations.progress import Progress
from compress_core.integrations.saved_run import KEY, parsed_run
from compress_core.session.controller import CompressionController
from compress_core.session.model_copies import take_decisions

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import WeightAveraging
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
    from lightning.pytorch.trainer.states import TrainerFn
except ImportError as error:
    raise ImportError(
        f"compress_core.integrations.lightning needs lightning ({error}): pip install 'compress-core[lightning]'"
    ) from error

_WHERE = "ckpt_path"


class CompressionCallback(Callback):
    """Drives a controller in Lightning's `Trainer`.

    It begins epochs and optimizer steps (not micro-batches), adds `controller.loss()` to what `training_step` returns,
    saves the compression state in every checkpoint (`ModelCheckpoint`), resumes with `fit(ckpt_path=)`, and logs the
    statistics at the end of each epoch as `compression/...`. With manual optimization, each batch is a step, and the
    loss of the algorithms is left to `training_step`. An average of the weights (`WeightAveraging`, before this
    callback) gets the masks of the model.

    Example:
        >>> controller, module.network = create_compressed_model(module.network, config)
        >>> trainer = Trainer(max_epochs=10, callbacks=[CompressionCallback(controller)])
        >>> trainer.fit(module, loader)
        >>> plain = controller.strip()

    Args:
        controller: The controller of a model that the `LightningModule` has as an attribute, or of itself.
        log_statistics: Whether to log the statistics of each epoch.

    Raises:
        UsageError: `controller` is no controller.
    """

    def __init__(self, controller: CompressionController, *, log_statistics: bool = True) -> None:
        self._progress = Progress(controller)
        self._log_statistics = log_statistics
        self._resumed = False

    @property
    def controller(self) -> CompressionController:
        """The controller."""
        return self._progress.controller

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that the trainer trains the controller's model, and places the checks of checkpoints."""
        if not any(module is self.controller.model for module in pl_module.modules()):
            children = [name for name, _ in pl_module.named_children()]
            raise UsageError(
                f"CompressionCallback: the controller's model is not in this {type(pl_module).__name__} (it has "
                f"{children}); assign what create_compressed_model returned: controller, module.network = "
                "create_compressed_model(module.network, config)"
            )
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise UsageError(
                f"{type(trainer.strategy).__name__}: processes have parts of weights; use Trainer(strategy='ddp')"
            )
        callbacks = _callbacks(trainer)
        late = [c for c in callbacks[callbacks.index(self) :] if isinstance(c, WeightAveraging)]
        if late:
            raise UsageError(
                f"Trainer(callbacks=): put {type(late[0]).__name__} before the CompressionCallback, which gives the "
                "average its masks once it is updated"
            )
        if stage == "fit":
            self._resumed = False
            _wrap(_CheckedLoad(pl_module, self))
            _wrap(_StepWithLoss(pl_module, self.controller))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the processes, which have compressed the model each on its own."""
        if trainer.world_size > 1:
            with ranks.together("CompressionCallback.on_fit_start"):
                state = self.controller.get_compression_state()
                values = {name: ranks.fingerprint([repr(part)]) for name, part in state["algorithms"].items()}
                ranks.require_same(
                    "algorithms of the compressed models",
                    values,
                    "create the controller from the same weights and the same data on all ranks, with the same seed",
                )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sets the clock of the controller, if a training is resumed; the weights have been loaded."""
        if trainer.state.fn == TrainerFn.FITTING and KEY in checkpoint:
            self._progress.resume(parsed_run(checkpoint[KEY], str(trainer.ckpt_path or _WHERE)))
            self._resumed = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the compression state."""
        checkpoint[KEY] = self._progress.saved().to_dict()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a training, unless one is resumed."""
        self.controller.check_optimizers(*trainer.optimizers)
        if not self._resumed:
            self._progress.start()
            self._progress.epochs_before -= trainer.current_epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins an epoch of the controller."""
        self._progress.begin_epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins an optimizer step of the controller, at the first of its micro-batches."""
        # Resumed from a checkpoint of the last step of an epoch, Lightning goes on without on_train_epoch_start.
        self._progress.begin_epoch(trainer.current_epoch)
        if batch_idx % trainer.accumulate_grad_batches == 0 or not pl_module.automatic_optimization:
            self.controller.scheduler.step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Gives averages of the weights the masks of the model."""
        self._mask_averages(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the statistics of the controller."""
        self._mask_averages(trainer, pl_module)
        if self._log_statistics:
            figures = self._progress.figures()
            pl_module.log_dict(figures, on_step=False, on_epoch=True, batch_size=1, sync_dist=trainer.world_size > 1)

    def _mask_averages(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An average of masks is no mask: with `use_buffers`, a weight that was ever kept would stay."""
        for other in _callbacks(trainer):
            average = getattr(other, "_average_model", None) if isinstance(other, WeightAveraging) else None
            if average is not None:
                model = self.controller.model
                name = next(name for name, module in pl_module.named_modules() if module is model)
                take_decisions(average.module.get_submodule(name), model)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the last epoch, and warns if the model is not compressed as far as was asked for."""
        self.controller.log_epoch()
        self._progress.warn_if_unfinished("at the end of the training")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes what `setup` has placed."""
        for name in (_CheckedLoad.name, _StepWithLoss.name):
            if isinstance(vars(pl_module).get(name), _Wrapper):
                delattr(pl_module, name)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


class _Wrapper:
    """A method of a `LightningModule`, replaced for one object; unlike a closure it can be copied and pickled."""

    name: str

    def __init__(self, module: LightningModule) -> None:
        self.module = module

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method; Lightning and `inspect` look at its signature."""
        method: Callable[..., Any] = getattr(type(self.module), self.name).__get__(self.module)
        return method


class _StepWithLoss(_Wrapper):
    name = "training_step"

    def __init__(self, module: LightningModule, controller: CompressionController) -> None:
        super().__init__(module)
        self.controller = controller

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.__wrapped__(*args, **kwargs)
        if not self.module.automatic_optimization:
            return found
        if isinstance(found, torch.Tensor):
            return found + self.controller.loss()
        if isinstance(found, dict) and isinstance(found.get("loss"), torch.Tensor):
            return {**found, "loss": found["loss"] + self.controller.loss()}
        return found  # nothing, which skips the step; or what Lightning refuses itself


class _CheckedLoad(_Wrapper):
    name = "on_load_checkpoint"

    def __init__(self, module: LightningModule, callback: CompressionCallback) -> None:
        super().__init__(module)
        self.callback = callback

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        if KEY in checkpoint:
            where = str(self.module.trainer.ckpt_path or _WHERE)
            parsed_run(checkpoint[KEY], where).check(self.callback.controller)
        elif self.module.trainer.state.fn == TrainerFn.FITTING:
            raise UsageError(
                "ckpt_path: this checkpoint has no compression state; it was saved without the CompressionCallback, or "
                "with ModelCheckpoint(save_weights_only=True)"
            )
        self.__wrapped__(checkpoint)


def _wrap(wrapper: _Wrapper) -> None:
    module, name = wrapper.module, wrapper.name
    existing = vars(module).get(name)
    if existing is not None and not isinstance(existing, _Wrapper):
        raise UsageError(f"CompressionCallback: '{name}' of this {type(module).__name__} has been replaced already")
    setattr(module, name, wrapper)
