"""`CompressionController`: the user's handle on a compressed model in the training loop."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress_core.batchnorm.report import AdaptationReport
from compress_core.contract.algorithm import Algorithm
from compress_core.contract.batch import Batch
from compress_core.contract.clock import Clock
from compress_core.contract.context import Context
from compress_core.contract.ledger import Ledger
from compress_core.contract.levels import has_settable_rate
from compress_core.contract.stages import CompressionStage
from compress_core.contract.statistics import CompressionStatistics, Statistics, Table
from compress_core.data.forwards import without_traces
from compress_core.data.rng import preserved_rng
from compress_core.errors import CompressionError, PluginError, UsageError
from compress_core.export import ExportReport, Options
from compress_core.export.exporter import chosen_target
from compress_core.export.sizes import DynamicShapes
from compress_core.session.agreement import refuse_sharded
from compress_core.session.batch_norm import BatchNorm
from compress_core.session.batch_recorder import BatchRecorder, remove_recorders
from compress_core.session.exports import ModelExport, exporters
from compress_core.session.history import EpochFigures, History, Number, figures_at
from compress_core.session.learning_rates import check_optimizers, parameter_groups, warn_if_nothing_learns
from compress_core.session.lifecycle import Lifecycle
from compress_core.session.live_state import LiveState
from compress_core.session.logbook import Logbook
from compress_core.session.model_copies import copy_of, take_decisions
from compress_core.session.replaced import NAME as REPLACED_LAYERS
from compress_core.session.replaced import ReplacedLayers, TransformPlaces
from compress_core.session.report import Reported, ReportOptions, write_report
from compress_core.session.scheduler import CompressionScheduler
from compress_core.session.state import SavedState, dump_state
from compress_core.session.transaction import Transaction
from compress_core.session.uncompressed import UncompressedModel
from compress_core.transforms.model_wide import bake_transforms
from compress_core.transforms.python_state import copied
from compress_core.transforms.wrapped_forward import drop_mixed_precision

logger = logging.getLogger(__name__)


class CompressionController:
    """Drives the compression of one model during training.

    It also offers the methods and attributes that its algorithms list in `controller_api`, such as
    `controller.set_sparsity_level(0.7)`.

    Attributes:
        model: The model; the same object that was given to `create_compressed_model`.
        scheduler: Call `epoch_step()` before each epoch and `step()` before each optimizer step.
        algorithms: The algorithms by name, in pipeline order.
    """

    def __init__(self, model: nn.Module, lifecycle: Lifecycle, uncompressed: UncompressedModel) -> None:
        self._stripped = False
        self.model = model
        self._lifecycle = lifecycle
        self.algorithms: Mapping[str, Algorithm] = {a.name: a for a in lifecycle.algorithms}
        # Bound methods, so that the scheduler of a copy drives the copy.
        self.scheduler = CompressionScheduler(self._step, self._epoch_step, self._begin)
        self._transaction = Transaction(model, self, lifecycle, self.scheduler)
        self._history = History()
        self._logbook = Logbook()
        self._places: TransformPlaces | None = None
        self._warned_of_optimizers = False
        self._batch_norm = BatchNorm(model, lifecycle)
        lifecycle.context.batch_norm = self._batch_norm
        lifecycle.context.uncompressed_model = self._uncompressed = uncompressed
        self._recorder: BatchRecorder | None = None
        if any(algorithm.needs_batch for algorithm in lifecycle.algorithms):
            self._recorder = BatchRecorder()
            self._recorder.attach(model)

    def __getattr__(self, name: str) -> Any:
        # Python calls this only for names that the controller does not have itself.
        algorithms = self.__dict__.get("algorithms", {})
        owners = [algorithm for algorithm in algorithms.values() if name in algorithm.controller_api]
        if len(owners) == 1 and self._active:
            return getattr(owners[0], name)
        if owners:
            names = " and ".join(f"algorithms['{owner.name}']" for owner in owners)
            raise AttributeError(f"'{name}' is offered by {names}; say which: controller.algorithms[...].{name}")
        offered = sorted(api for algorithm in algorithms.values() for api in algorithm.controller_api)
        raise AttributeError(f"the controller has no '{name}'; its algorithms offer {offered}")

    def __setattr__(self, name: str, value: Any) -> None:
        # Without this, `controller.sparsity_level = 0.9` would hide the measured level behind a number.
        for algorithm in self.__dict__.get("algorithms", {}).values():
            if name in algorithm.controller_api:
                raise AttributeError(f"'{name}' belongs to {algorithm.name} and cannot be set; call its methods")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        stage = "stripped" if self._stripped else self.compression_stage().name
        return f"CompressionController({', '.join(self.algorithms)}; {stage})"

    def _repr_html_(self) -> str:
        title = f"Compressed {type(self.model).__name__}, "
        if self._stripped:
            return Table(f"{title}stripped in place", ("algorithm",), [(name,) for name in self.algorithms]).to_html()
        clock, stages = self.scheduler.clock, self.compression_stages()
        trained = "not trained yet" if clock.epoch < 0 and clock.step < 0 else f"epoch {clock.epoch}, step {clock.step}"
        rows = [
            (name, stages[name].name if name in stages else "", "" if (r := a.compression_rate) is None else r)
            for name, a in self.algorithms.items()
        ]
        return Table(f"{title}{trained}", ("algorithm", "stage", "compression rate"), rows).to_html()

    @property
    def _active(self) -> Lifecycle:
        if self._stripped:
            raise UsageError(
                "the model was stripped in place and is no longer compressed; strip(do_copy=True) works on a copy"
            )
        return self._lifecycle

    @property
    def _inspected(self) -> Lifecycle:
        """The lifecycle, after a look at layers that the user may have replaced or moved."""
        lifecycle = self._active
        if self._places is not None:
            self._places.replaced()
        return lifecycle

    def resume(self, state: SavedState) -> None:
        """Sets clock and history; called when a model is created from a state."""
        self.scheduler.load_state(state.scheduler, "compression_state.scheduler")
        self._history.load(state.history)

    def created(self) -> None:
        """Notes where the model has transforms; called at the end of creation."""
        self._places = TransformPlaces(self.model)
        if names := self.context.recorded_modules:
            if self._recorder is None:
                raise PluginError(
                    f"an algorithm has called context.record_outputs() for '{names[0]}', and none declares needs_batch,"
                    " with which it would get them; set needs_batch = True"
                )
            self._recorder.attach_outputs(self.model, names)
        self.context.transaction = self._transaction
        warn_if_nothing_learns(self.algorithms.values(), self.context, self.model)

    def _begin(self, function: Callable[[], None], lazily: bool, call: str) -> None:
        self._transaction.run(function, lazily=lazily, call=call)

    def _step(self, clock: Clock) -> None:
        lifecycle = self._active
        # Before the algorithms go on, as in `_epoch_step`.
        self._logbook.at_step(self.scheduler.clock, self._figures)
        lifecycle.step(self.model, clock)

    def _epoch_step(self, clock: Clock) -> None:
        refuse_sharded(self.model)
        lifecycle = self._inspected
        # Before the algorithms go on: what was measured is what the epoch before has trained.
        row = self._figures()
        lifecycle.epoch_step(self.model, clock)
        # Last, because what is written stays, whatever fails.
        self._logbook.at_epoch(self._history.record(row))

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressionController:
        """Returns a controller for the copy of the model that the same `deepcopy` makes."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        if twin._recorder is not None:
            twin._recorder.activate()
        return twin

    @property
    def name(self) -> str:
        """Names of the algorithms, in pipeline order."""
        return ", ".join(self.algorithms)

    @property
    def context(self) -> Context:
        """The context that the hooks of this model get."""
        return self._lifecycle.context

    @property
    def ledger(self) -> Ledger:
        """The record of what each value of the config did."""
        return self.context.ledger

    def loss(self, outputs: Any = None, *inputs: Any, **keywords: Any) -> torch.Tensor:
        """Returns the sum of the terms that the algorithms add to the loss: a scalar on the model's device.

        Args:
            outputs: Outputs of the model in this step, for algorithms whose loss needs them; by default those of the
                last forward in training mode, which is recorded if an algorithm needs it. What modules inside of the
                model have returned is always that of the last forward.
            inputs: Positional arguments that the model was called with.
            keywords: Keyword arguments that the model was called with.

        Raises:
            UsageError: An algorithm needs a forward, and there has been none, or its inputs or outputs have been
                written to in place since.
            PluginError: An algorithm returned something other than a scalar.
        """
        recorder = self._recorder
        if outputs is None:
            batch = None if recorder is None else recorder.batch
        else:
            batch = Batch(inputs, keywords, outputs, {} if recorder is None else recorder.module_outputs)
        losses = self._active.losses(self.model, batch)
        if not losses:
            device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
            return torch.zeros((), device=device)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def parameter_groups(
        self, lr: float, *, weight_decay: float | None = None, compression_weight_decay: float | None = None
    ) -> list[dict[str, Any]]:
        """Returns groups of parameters for an optimizer, with `compression_lr_multiplier` in the learning rates.

        The first group has the model's own parameters and the learning rate `lr`; then comes one for each algorithm
        that learns something, such as scales, with `lr` times the multiplier of its section or else of the config. From
        this call on gradients are not multiplied by it any more, which optimizers such as Adam would undo. The groups
        hold frozen parameters too; their key `name` is `"model"` or the name of the algorithm.

        Args:
            lr: Learning rate of the model's own parameters.
            weight_decay: Weight decay; by default that of the optimizer.
            compression_weight_decay: Weight decay of what algorithms learn, such as 0; by default `weight_decay`.

        Raises:
            UsageError: A value is not a number from 0 on.

        Example:
            ```python
            groups = controller.parameter_groups(1e-3, weight_decay=0.01, compression_weight_decay=0.0)
            optimizer = torch.optim.AdamW(groups)
            ```
        """
        self._inspected  # noqa: B018 - refuses a model that was stripped in place
        return parameter_groups(
            self.model,
            self.algorithms,
            self.context,
            lr,
            weight_decay=weight_decay,
            compression_weight_decay=compression_weight_decay,
        )

    def check_optimizers(self, *optimizers: object) -> None:
        """Logs a warning, once, if `compression_lr_multiplier` is a factor on gradients that these optimizers undo.

        Saving and loading checkpoints and the callbacks for training libraries call this.
        """
        if not self._warned_of_optimizers:
            self._warned_of_optimizers = check_optimizers(self.model, optimizers)

    def compression_stage(self) -> CompressionStage:
        """Returns the progress of compression, measured on the model."""
        return self._inspected.stage(self.model)

    def compression_stages(self) -> dict[str, CompressionStage]:
        """Returns the progress of each algorithm, by name."""
        return self._inspected.stages(self.model)

    @property
    def compression_rate(self) -> float:
        """Measured share, 0 to 1, of the compressed part of the model that was removed.

        With several algorithms it is 1 minus the product of the shares that they keep. It can be set if exactly one
        algorithm allows it.
        """
        return 1.0 - math.prod(1.0 - rate for rate in self._active.rates())

    @compression_rate.setter
    def compression_rate(self, rate: float) -> None:
        settable = [a for a in self.algorithms.values() if has_settable_rate(a)]
        if len(settable) != 1:
            names = [a.name for a in settable] or "no algorithm"
            raise CompressionError(
                f"compression_rate can be set for one algorithm, and {names} would take it; set the level of that one"
            )
        self._transaction.run(
            lambda: setattr(settable[0], "compression_rate", rate), call=f"compression_rate = {rate!r}"
        )

    def statistics(self, quickly_collected_only: bool = False) -> CompressionStatistics:
        """Returns figures measured on the current model.

        Args:
            quickly_collected_only: Ignored; accepted for compatibility with NNCF. All figures are quick to collect.
        """
        parts: dict[str, Statistics] = dict(self._inspected.statistics(self.model))
        replaced = {} if self._places is None else self._places.replaced()
        if replaced:
            parts[REPLACED_LAYERS] = ReplacedLayers(replaced)
        return CompressionStatistics({**parts, **self._active.initializer_statistics(), "ledger": self.ledger})

    @property
    def history(self) -> tuple[EpochFigures, ...]:
        """The figures of the model before the first epoch and after each one; the last row is measured now.

        `scheduler.epoch_step()` records a row before the algorithms go on, so each row is what its epoch has trained,
        with the level of that epoch. The history is part of the compression state. A training that goes back to an
        earlier epoch writes it anew from there.
        """
        return self._history.until(self._figures())

    def log_epoch(self, **values: Any) -> EpochFigures:
        """Adds to history and logs what only the training loop knows about the epoch that it has just trained.

        The last epoch, after which no other one begins, is logged by this call alone.

        Args:
            values: Numbers by name, such as `loss=0.31, accuracy=0.92`; a later call for the same epoch adds to them.

        Returns:
            The row of the history: what was given, and what was measured on the model now.

        Raises:
            UsageError: A value is no number, or has the name of what is measured.
        """
        row = self._history.until(self._figures(values))[-1]
        self._logbook.at_epoch(row)
        return self._history.record(row)

    def log_to(self, writer: Any, *, every_steps: int | None = None) -> None:
        """Logs the figures of the history to a writer, too, from now on; there may be several.

        They are measured and written where an epoch begins, before the algorithms go on, as `history` says: what is
        written at epoch 3 is what three epochs have trained. `log_epoch()` writes an epoch once it has ended. Of
        several processes the first one writes. Neither copies of the controller nor its saved state have the writers:
        call this again after a training was resumed.

        Args:
            writer: The path of a CSV file (`.csv`), with a line for each moment; a resumed training goes on in it, and
                replaces what the interrupted one has written after its checkpoint. Or a `SummaryWriter` of TensorBoard,
                or anything else with `add_scalar(name, value, step)`. Or a function that is called with a dict of
                values and the step, such as `mlflow.log_metrics` or `wandb_run.log`. In the last two cases measured
                figures are named as the callbacks for training libraries name them: `compression/quantization/...`.
            every_steps: Writes also where an optimizer step begins that follows so many; then `step` counts optimizer
                steps. By default it counts epochs. Each time reads figures from the device, which waits for it.

        Raises:
            UsageError: It is something else; or a CSV file has figures already, and this training is at its beginning.
            FileError: The file cannot be read.
        """
        self._logbook.add(writer, every_steps, self.scheduler.clock)

    def _figures(self, given: Mapping[str, Any] | None = None) -> EpochFigures:
        # What initializers report is of a pass in the past, with its wall time; it would be the same in each row.
        statistics = CompressionStatistics(self._inspected.statistics(self.model))
        measured: dict[str, Number] = {"compression_rate": self.compression_rate, **statistics.scalars()}
        return figures_at(self.scheduler.clock, measured, given)

    def get_compression_state(self) -> dict[str, Any]:
        """Returns the JSON-able state with which `create_compressed_model` builds the same structure again.

        Pass it as `compression_state=`. Weights, masks and learned values are in the model's own `state_dict`: save
        both.
        """
        lifecycle = self._active
        if self._places is not None:
            self._places.refuse("get_compression_state()")
        reports = {name: found.to_dict() for name, found in lifecycle.initializer_statistics().items()}
        return dump_state(
            lifecycle,
            lifecycle.state(self.model),
            {"scheduler": self.scheduler.get_state(), "initializers": reports, "history": self._history.to_dict()},
        )

    def load_state(self, compression_state: Mapping[str, Any], model_state: Mapping[str, Any]) -> None:
        """Takes model and algorithms back (or forward) to a state that was saved of the same structure.

        The clock is set, too. `load_checkpoint` does this for a file, and restores the optimizer with it.

        Args:
            compression_state: What `get_compression_state()` returned.
            model_state: The `state_dict` that the model had then, with masks and scales.

        Raises:
            StateError: They do not fit: other algorithms, layers or shapes; model and controller are as before.
        """
        self._inspected  # noqa: B018 - refuses a model that was stripped in place
        remedy = "Create model and controller from it: create_compressed_model(model, config, compression_state=...)"
        what = "the given state"
        self._transaction.run(
            lambda: self.live_state.load(compression_state, model_state, what, remedy), call="load_state()"
        )

    @property
    def live_state(self) -> LiveState:
        """Loads states into this controller, within a transaction; for checkpoints."""
        return LiveState(self.model, self._active, self.scheduler, self._history, self.get_compression_state)

    def strip(self, do_copy: bool = True, model: nn.Module | None = None) -> nn.Module:
        """Returns a plain model that computes the same, with transforms baked into its weights.

        Args:
            do_copy: Whether to work on a copy. Otherwise this model itself becomes plain, and the controller can no
                longer be used.
            model: A copy of the compressed model with other weights, such as an average (`ema.module`), to strip in
                place of the compressed model. What is not learned (masks, which quantizers are on) is taken from the
                compressed model, because averages do not follow it.

        Raises:
            UsageError: `model` is no copy of the compressed model.
        """
        lifecycle = self._inspected
        source = self.model if model is None else copy_of(self.model, model)
        if do_copy:
            return self._baked(lifecycle, source, copied(source))
        others = [] if source is self.model else [source]
        return self._transaction.run(lambda: self._baked(lifecycle, source, source), others, local=True)

    def _baked(self, lifecycle: Lifecycle, source: nn.Module, stripped: nn.Module) -> nn.Module:
        do_copy = stripped is not source
        if source is not self.model:
            take_decisions(stripped, self.model)
        if do_copy:
            drop_mixed_precision(stripped)
        # The copy shares classes, closures and caches with the model.
        with without_traces(self.model, parameters=False) if do_copy else contextlib.nullcontext():
            lifecycle.strip(stripped)
            bake_transforms(stripped)
        remove_recorders(stripped)
        self._stripped = not do_copy and source is self.model
        return stripped

    def export(
        self,
        path: str | os.PathLike[str],
        args: Any = None,
        *,
        target: str | None = None,
        tolerance: float | None = None,
        opset: int | None = None,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        dynamic_batch: bool = True,
        dynamic_shapes: DynamicShapes | None = None,
        external_data: bool | None = None,
        verify: bool = True,
        by_layer: bool = False,
    ) -> ExportReport:
        """Writes the compressed model to a file for a runtime, after running it there and comparing it with torch.

        Without quantization the file contains the plain model that `strip` returns; with quantization, integer weights
        and the scales that the model has been trained with. The model is not changed.

        Args:
            path: The file; an existing file is replaced only after everything else has succeeded.
            args: Arguments of forward: a tensor, a tuple, or a dict of keyword arguments. By default a batch of the
                data that the model was created with, or `input_info`. Pass realistic inputs, so that the comparison
                is meaningful.
            target: Name of the runtime, a choice at `export.target`: `onnxruntime`, `openvino`, `tensorrt`,
                `executorch`, or what plugins add. By default the runtime that the config's `target_device` names, if it
                reads such files, and else the first that does.
            tolerance: Largest allowed mean absolute difference between the runtime and torch, divided by the mean
                absolute output of torch. It applies to each output, with the runtime's graph optimizations on and off.
                By default 0.05, or more if roundings that add up are the only reason: then each layer agrees within a
                step of its quantizer on torch's own activations, and a warning and a note in the report say so.
            opset: Version of ONNX's default operator set, at least 13; by default 21. Only for ONNX files. Operators
                that an older one lacks are an `ExportError`, which names them.
            input_names: Names of the inputs, in order; by default those of forward's arguments.
            output_names: Names of the outputs.
            dynamic_batch: Whether the file accepts any batch size. If the model does not, or computes something else
                on others, the file takes the batch size of `args` only, with a warning and a note in the report. If
                `dynamic_shapes` names dimension 0 of an input, or a dimension "batch", only what it names varies.
            dynamic_shapes: Further sizes that vary: for each input, names by dimension, such as
                `{"pixels": {2: "height", 3: "width"}, "ids": {1: "length"}}`; the same name means the same size. Inputs
                are named as forward's arguments, or as in `input_names`; a list has an entry for each argument. What
                the model does not take in other sizes has that of `args`, with a warning and a note in the report.
            external_data: Whether weights are written to a second file beside the first; by default if they take more
                than the 2 GB that one file holds. Only for ONNX files.
            verify: Whether to compare with torch, on two batch sizes, before the file is written.
            by_layer: Whether to compare each quantized tensor with torch, even if the outputs agree; the result is in
                `layers` of the report.

        Returns:
            The result of the comparison.

        Raises:
            ExportError: A package is missing (the message names the extra), the model cannot be exported, or the
                difference is larger than the tolerance. No file is left then.
            ExportFileError: The file cannot be written, which is a `FileError` as well; an existing one is as it was.
            DataError: There is no example input.
            UsageError: An option has an invalid value.
        """
        options = Options(
            tolerance,
            opset,
            input_names,
            output_names,
            dynamic_batch,
            verify,
            dynamic_shapes=dynamic_shapes,
            external_data=external_data,
            by_layer=by_layer,
        )
        device = self.context.config.root.target_device
        name = chosen_target(exporters(), target, Path(path), device)
        return ModelExport(self.model, self._inspected, "export").write(path, args, name, options)

    def export_onnx(
        self,
        path: str | os.PathLike[str],
        args: Any = None,
        *,
        tolerance: float | None = None,
        opset: int = 21,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        dynamic_batch: bool = True,
        dynamic_shapes: DynamicShapes | None = None,
        external_data: bool | None = None,
        verify: bool = True,
    ) -> ExportReport:
        """Writes the compressed model to an ONNX file for ONNX Runtime; the file may have any ending.

        Arguments, result and errors are those of `export`.
        """
        options = Options(
            tolerance,
            opset,
            input_names,
            output_names,
            dynamic_batch,
            verify,
            dynamic_shapes=dynamic_shapes,
            external_data=external_data,
        )
        return ModelExport(self.model, self._inspected, "export_onnx").write(path, args, "onnxruntime", options)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        title: str | None = None,
        accuracy: Mapping[str, float] | None = None,
        evaluate_fn: Callable[[nn.Module], Any] | None = None,
        args: Any = None,
        latency: bool = True,
    ) -> None:
        """Writes a report of the compressed model as one HTML page, which needs neither a network nor JavaScript.

        Everything is measured on a copy: model, controller and random generators are as before. A batch of the
        calibration data is read for the inputs, and a few more for the histograms of activations.

        Of several processes rank 0 writes; all may call this, and all have to if `evaluate_fn` waits for the others.

        Args:
            path: The file, which ends in .html; it appears completely or not at all.
            title: The heading; by default the class of the model.
            accuracy: What you have measured, by step and in order: `{"float": 0.93, "compressed": 0.87}`.
            evaluate_fn: `evaluate_fn(model)`, returns a number. It is called with a copy of the compressed model, and
                of the uncompressed model if that is kept (see `Algorithm.needs_uncompressed`).
            args: Arguments of forward, as for `export`, to trace the network and to take the time of a forward with. By
                default a batch of the data that the model was created with, or `input_info`.
            latency: Whether to take the time of a forward, of the model before compression and stripped.

        Raises:
            ExportError: jinja2 is missing (`pip install 'compress-core[report]'`).
            FileError: The file cannot be written.
            UsageError: An argument has an invalid value.
        """
        options = ReportOptions(title, accuracy, evaluate_fn, args, latency)
        write_report(Reported(self, self._inspected, self._uncompressed), path, options)

    def initialize(self, name: str, loader: Any = None, **options: Any) -> Statistics | None:
        """Runs a shared initializer again on the current model; if that fails, the model is restored.

        Args:
            name: Name of the initializer, as in the section `initializer` of the config.
            loader: Batches, or `InitArgs`; by default the data that the model was created with.
            options: Further arguments of the initializer.

        Returns:
            The statistics of this run.

        Raises:
            UsageError: The config does not ask for this initializer, or it does not take these options.
            DataError: There are no usable batches.
        """

        def run() -> None:
            lifecycle = self._inspected
            with preserved_rng():
                lifecycle.run_again(name, self.model, loader, options)

        self._transaction.run(run, call=f"initialize({name!r})")
        return self._lifecycle.initializers[name].statistics()

    def adapt_batchnorm(
        self,
        loader: Any = None,
        *,
        num_samples: int | None = None,
        method: str | None = None,
    ) -> AdaptationReport:
        """Adapts the running statistics of batch norm again.

        Until the model is trained, this starts from the statistics of the uncompressed model, so repeated calls do not
        accumulate. After training those statistics are no longer valid, and `exact` replaces `paired`.

        Args:
            loader: Batches, or `BNAdaptationInitArgs`; by default the data that the model was created with.
            num_samples: Number of samples; by default that of the config, or 2000.
            method: Name of the estimator (a choice of `batchnorm_adaptation.method`); by default that of the config.

        Raises:
            DataError: There are no usable batches; the statistics are unchanged.
        """

        def run() -> AdaptationReport:
            self._inspected  # noqa: B018 - refuses a model that was stripped in place
            return self._batch_norm.adapt(loader, num_samples, method)

        return self._transaction.run(run, call="adapt_batchnorm()")
