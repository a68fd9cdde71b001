"""`Context`: config, data and services that the hooks of one model share."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from compress_core.channels.shrinking import Shrinkage
from compress_core.config import AlgorithmConfig, CompressionConfig, InitializerConfig, Section
from compress_core.config.scopes import ScopedModule, ScopeFilter
from compress_core.contract.algorithm import Algorithm, Plan
from compress_core.contract.kept_trace import KeptTrace
from compress_core.contract.ledger import Ledger
from compress_core.contract.own_weights import as_tensors, own_weights, resumed_uses
from compress_core.contract.services import BatchNormService, Directly, TransactionService, UncompressedService
from compress_core.contract.stages import Stage
from compress_core.data.calibration import (
    CalibrationData,
    InitArgs,
    QuantizationRangeInitArgs,
)
from compress_core.data.progress import progress
from compress_core.data.ranks import alone
from compress_core.data.rng import generators_of, preserved_rng
from compress_core.data.structures import moved
from compress_core.errors import ConfigError, DataError, DecidedFromDataError, ModelError, PluginError, Problem
from compress_core.torch_internals import AnyBatchNorm
from compress_core.trace import Example, Trace, TraceError, trace
from compress_core.trace.weights import WeightUse
from compress_core.transforms import bypass_transforms, transformed_weight
from compress_core.transforms.folding import FOLD_REMEDY
from compress_core.transforms.layers import WeightTensor, weight_tensors

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Parts of a section that the core reads, later than `compress_configure`.
_READ_BY_THE_CORE = ("initializer.", "ignored_scopes", "target_scopes")


class Context:
    """Config, data and services that the hooks of one model share.

    Attributes:
        config: The whole config.
        sections: The sections of the config in its order, those of other algorithms included: for cross-checks.
        ledger: Records what each value of the config did.
        resuming: Whether a compression state is being resumed; then there is no data and no initialization.
        planning: Whether the model is a copy that shows what would be done (`plan_compression`). Then
            `calibration_data` raises `DecidedFromDataError`, and calibration and initializers do not run.
        bypassable: Whether the model without its weight transforms is the uncompressed model.
        kept_trace: Keeps the last trace during the creation.
        batch_norm: Adapts the running statistics, for algorithms that change the model or measure activations.
        transaction: Runs changes of the model after its creation, all or nothing.
        uncompressed_model: Provides `uncompressed` and `teacher`.
        announce_shrinkage: The function that `shrunk` calls.
        recorded_modules: Names of the modules whose outputs losses need, see `record_outputs`.
        removed_so_far: In `compress_strip` and `compress_export`: what algorithms before have removed from this model,
            so that names and indices of channels can be brought up to date (`compress_core.channels.smaller_group`).
        saved_plans: The plans in the compression state that is being resumed, by algorithm. They hold what was traced
            or measured at planning time, so that it need not be repeated.
    """

    batch_norm: BatchNormService
    transaction: TransactionService
    uncompressed_model: UncompressedService
    announce_shrinkage: Callable[[nn.Module, Shrinkage], None]

    def __init__(
        self,
        config: CompressionConfig,
        *,
        init_loader: Any = None,
        resuming: bool = False,
        planning: bool = False,
        example: Example | None = None,
    ) -> None:
        self.config = config
        self.planning = planning
        self._given_example = example
        self.ledger = Ledger()
        self.resuming = resuming
        self.bypassable = True
        self.recorded_modules: tuple[str, ...] = ()
        self.saved_plans: Mapping[str, Plan] = {}
        self.removed_so_far = Shrinkage()
        # Copies, because each section records which values were read, and another model may share the config.
        self.sections = tuple(s.unread() if isinstance(s, AlgorithmConfig) else s for s in config.sections)
        self._init_loader = init_loader
        # The batch that `_example_batch` read last, and its source; kept for the time of the creation.
        self._read: tuple[Any, Example] | None = None
        self._is_creating = not resuming
        self.transaction = Directly()
        self.kept_trace = KeptTrace(is_closed=resuming)
        self._requests: dict[str, InitializerConfig] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        memo |= {id(given): given for given in (self.config, self._init_loader)}  # the user's data is not copied
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # For pickle: loaders and functions of the user's often cannot be pickled, and data does not belong there.
        return {**self.__dict__, "config": self.config.without_extra_structs(), "_init_loader": None}

    def progress(self, items: Iterable[T], what: str, *, total: float | None = None, unit: str = "step") -> Iterator[T]:
        """Yields items with a progress bar, for loops that take long; `CalibrationData.batches` has one already.

        Args:
            items: The items.
            what: What is running, such as "search for ranks".
            total: Their number; by default their length, if they have one.
            unit: What one of them is.
        """
        return progress(items, what, total=total, unit=unit)

    def weight(self, model: nn.Module, name: str, before: Stage = Stage.PRECISION) -> torch.Tensor:
        """Returns a weight with the transforms of earlier stages applied, for example masked and pruned.

        Args:
            model: The model.
            name: Dotted name of the parameter.
            before: The stage of the caller; transforms of this and of later stages are not applied.

        Returns:
            A tensor with shape and dtype of the parameter, detached. Do not write to it.
        """
        return transformed_weight(model, name, before)

    @contextlib.contextmanager
    def uncompressed(self) -> Iterator[nn.Module]:
        """Context manager that gives the uncompressed model while the compressed one is being created.

        Only for algorithms and initializers that declare `needs_uncompressed`. If no algorithm changes the model in
        place, it is the model itself with its transforms bypassed, otherwise a copy.

        Raises:
            PluginError: No algorithm declares `needs_uncompressed`, or the model has been created already.
        """
        with self.uncompressed_model.view() as model:
            yield model

    @property
    def teacher(self) -> nn.Module:
        """The frozen model to learn from, in eval mode and on the device of the compressed model.

        It is the model that the user has registered as `TeacherArgs`, else the uncompressed model; a copy, unless
        `TeacherArgs(copy=False)` says otherwise. Only for algorithms that declare `needs_uncompressed = "training"`. It
        is in no `state_dict` and no checkpoint; to resume, the user gives it again (`TeacherArgs`, or
        `uncompressed_model=`).

        Raises:
            PluginError: Nobody has declared that it is needed.
            UsageError: A teacher that is not copied is not frozen any more.
        """
        return self.uncompressed_model.teacher()

    def record_outputs(self, model: nn.Module, names: Iterable[str]) -> None:
        """Asks for what modules return in each forward in training mode, as `Batch.module_outputs`.

        For `compress_commit` of algorithms that declare `needs_batch = True`. The modules are looked up at the end of
        the creation, when all algorithms have replaced what they replace.

        Args:
            model: The model.
            names: Dotted names of modules.

        Raises:
            PluginError: The model has no module of this name.
        """
        wanted = tuple(names)
        modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
        missing = [name for name in wanted if name not in modules]
        if missing:
            raise PluginError(f"record_outputs(): the model has no module '{missing[0]}'")
        self.recorded_modules = tuple(dict.fromkeys((*self.recorded_modules, *wanted)))

    def lr_multiplier(self, algorithm: Algorithm) -> float:
        """Returns the configured factor on what the algorithm learns: that of the section, of the config, or else 1.

        Transforms are told by their attribute `lr_multiplier`, see `Algorithm.applies_lr_multiplier`.
        """
        own = getattr(algorithm.config, "compression_lr_multiplier", None)
        return float(own or self.config.root.compression_lr_multiplier or 1.0)

    def shrunk(self, model: nn.Module, shrinkage: Shrinkage) -> None:
        """Tells every algorithm that channels were removed; to be called by the code that removed them.

        Args:
            model: The smaller model.
            shrinkage: Which indices of which tensors stay.
        """
        self.announce_shrinkage(model, shrinkage)

    def section(self, algorithm: Algorithm) -> tuple[str, AlgorithmConfig]:
        """Returns the config path of an algorithm's section, and the section."""
        for index, section in enumerate(self.sections):
            if section is algorithm.config:
                return self.config.algorithm_path(index), algorithm.config
        raise KeyError(algorithm.name)

    def requests(self, initializer: str) -> dict[str, InitializerConfig]:
        """Returns the sections that ask for a shared initializer, by config path."""
        found = {}
        for index, section in enumerate(self.sections):
            if (
                isinstance(section, AlgorithmConfig)
                and (request := section.initializer.shared(initializer)) is not None
            ):
                found[f"{self.config.algorithm_path(index)}.initializer.{initializer}"] = request
        self._requests |= found
        return found

    def request(self, path: str) -> InitializerConfig:
        """Returns the section at a path that `requests` returned."""
        return self._requests[path]

    def generators(self) -> list[torch.Generator]:
        """Returns the random generators of all data loaders that the user gave."""
        structs = [s for s in self.config.extra_structs() if isinstance(s, InitArgs)]
        loaders = [self._init_loader, *(struct.data_loader for struct in structs)]
        return [generator for loader in loaders for generator in generators_of(loader)]

    def refuse_unread(self, algorithm: Algorithm) -> None:
        """Refuses values of the section that the algorithm has not read; for the end of `compress_configure`.

        With this, `compress-core check` finds unused values. Only for algorithms that have read their whole section by
        then.

        Raises:
            ConfigError: There are unread values, and the config does not set `"unused_values": "warn"`.
        """
        path, config = self.section(algorithm)
        strict = self.config.root.unused_values == "error"
        shared = [leaf for leaf, _, _ in config.given_leaves() if leaf.startswith(_READ_BY_THE_CORE)]
        self.ledger.refuse_unread(path, config, read_later=[*algorithm.reads_later, *shared], strict=strict)

    def calibration_data(self, path: str, kind: type[InitArgs] = InitArgs, loader: Any = None) -> CalibrationData:
        """Returns the batches for an initializer or a calibration.

        Args:
            path: Config path of the caller's section, for messages.
            kind: Type of the object of `register_extra_structs` that holds the loader; if none of this type was
                registered, data of any other type is used.
            loader: A loader (or `InitArgs`) that takes precedence.

        Raises:
            DataError: There is no loader, or the object given is not a loader.
            DecidedFromDataError: This is a plan (`planning`), with or without data.
        """
        if self.planning:
            raise DecidedFromDataError(f"{path}: is decided from data when the model is created")
        return self._calibration_data(path, kind, loader)

    def _calibration_data(self, path: str, kind: type[InitArgs] = InitArgs, loader: Any = None) -> CalibrationData:
        source = loader if loader is not None else self._init_loader
        if source is None:
            source = self._registered_data(kind)
        if source is None:
            raise DataError(
                f"{path}: needs calibration data, and there is none. Call register_default_init_args(config, loader), "
                f"pass init_loader= to create_compressed_model, or register {kind.__name__}(loader); or remove this"
            )
        return CalibrationData(source if isinstance(source, InitArgs) else InitArgs(source), path)

    def has_data(self, kind: type[InitArgs] = InitArgs) -> bool:
        """Returns whether `calibration_data` would find a loader."""
        return self._init_loader is not None or self._registered_data(kind) is not None

    @contextlib.contextmanager
    def reading(self, loader: Any) -> Iterator[None]:
        """Context manager in which `loader`, unless it is None, takes precedence over the data given before."""
        before, self._init_loader = self._init_loader, self._init_loader if loader is None else loader
        try:
            yield
        finally:
            self._init_loader = before

    def report_data(self, path: str, kind: type[InitArgs] = InitArgs) -> CalibrationData | None:
        """Returns batches for `compress_report`; None if there are none, or only an iterator, which can be read once.

        Args:
            path: The caller, for messages.
            kind: As for `calibration_data`.
        """
        if not self.has_data(kind):
            return None
        data = self.calibration_data(path, kind)
        return None if isinstance(data.loader, Iterator) else data

    def _registered_data(self, kind: type[InitArgs]) -> InitArgs | None:
        """Returns the registered data of a kind, else registered data of any kind: all of them hold batches."""
        exact = self.config.get_extra_struct(kind)
        if exact is not None:
            return exact
        return next((struct for struct in self.config.extra_structs() if isinstance(struct, InitArgs)), None)

    def trace(self, model: nn.Module, path: str) -> Trace:
        """Traces the model on an example input: `input_info`, else a batch of the user's data.

        Transforms that the model has already are left out: their calls are not the model's. Algorithms get the same
        trace as long as nothing else changes; do not write to it.

        Args:
            model: The model; it is not changed.
            path: Config path of the section that needs the trace, for messages.

        Raises:
            DataError: There is neither `input_info` nor data.
            TraceError: The model fails on the example.
        """
        kept = self.kept_trace.trace_of(model)
        if kept is not None:
            return kept
        with bypass_transforms(model):
            found = self._trace(model, path)
        self.kept_trace.keep_trace(model, found)
        return found

    def _trace(self, model: nn.Module, path: str) -> Trace:
        if self._given_example is not None:
            return trace(model, self._given_example, training=True)
        infos = [info for info in self.config.root.input_info if info.sample_size is not None]
        batch = self._example_batch(path)
        if not infos and batch is None:
            raise DataError(
                f"{path}: needs to trace the model, and there is no example input. Add input_info to the "
                'config, such as "input_info": {"sample_size": [1, 3, 224, 224]}, or give a data loader: '
                "register_default_init_args(config, loader)"
            )
        if not infos:
            return trace(model, batch, training=True)
        device = next((parameter.device for parameter in model.parameters()), None)
        try:
            return trace(model, Example.from_input_info(infos, device), training=True)
        except TraceError as error:
            if batch is None:
                raise
            logger.warning("input_info does not fit the model, a batch of the data loader is used instead: %s", error)
            return trace(model, batch, training=True)

    def example(self, path: str, device: torch.device | None = None) -> Example:
        """Returns an example to run the model on: the one that was given, else a batch of data, else `input_info`.

        Args:
            path: The caller, for messages.
            device: Device for tensors that were given, or are made from `input_info`.

        Raises:
            DataError: There is neither data nor `input_info`.
        """
        given = self._given_example
        if given is not None:
            return given if device is None else replace(given, batch=moved(given.batch, device))
        batch = self._example_batch(path)
        if batch is not None:
            return batch
        infos = [info for info in self.config.root.input_info if info.sample_size is not None]
        if not infos:
            raise DataError(
                f"{path}: needs an example input, and there is none. Pass args=, add input_info to the config, such as "
                '"input_info": {"sample_size": [1, 3, 224, 224]}, or give a data loader: '
                "register_default_init_args(config, loader)"
            )
        return Example.from_input_info(infos, device)

    def _example_batch(self, path: str) -> Example | None:
        """Returns a batch of the user's data; None if there is none, or only an iterator.

        During the creation a loader is read once for all callers: it may start processes.

        Args:
            path: The caller, for messages.
        """
        source = self._registered_data(QuantizationRangeInitArgs) if self._init_loader is None else self._init_loader
        if source is None:
            return None
        if self._read is not None and self._read[0] is source:
            return self._read[1]
        data = self._calibration_data(path, loader=source)
        with preserved_rng(data.loader):
            if isinstance(data.loader, Iterator):
                return None  # an iterator can be read only once, and calibration needs its batches
            # After the creation one process may export alone.
            with contextlib.nullcontext() if self._is_creating else alone():
                example = Example.from_batch(data, next(iter(data.batches(1, None)))[0])
        if self._is_creating:
            self._read = source, example
        return example

    def take_example(self) -> Example | None:
        """Returns the batch that `_example_batch` has read, if it has, and forgets it: the creation is over."""
        read, self._read, self._is_creating = self._read, None, False
        return None if read is None else read[1]

    def scope_filter(self, model: nn.Module, algorithm: Algorithm) -> ScopeFilter:
        """Returns the filter for a model's modules, from the scopes of the config and of the algorithm's section.

        Raises:
            ConfigError: A list of target scopes is given but empty, or an entry is not a valid scope.
        """
        path, config = self.section(algorithm)
        root = self.config.root
        sections: list[tuple[str, Section]] = [("", root), (f"{path}.", config)]
        empty = [f"{prefix}target_scopes" for prefix, section in sections if _has_empty_targets(section)]
        if empty:
            message = "is empty, so nothing is a target; add a scope, or remove it"
            raise ConfigError([Problem(at, message) for at in empty])

        def entries(prefix: str, scopes: Iterable[str]) -> dict[str, str]:
            return {f"{prefix}.{index}": scope for index, scope in enumerate(scopes)}

        return ScopeFilter(
            model,
            entries("ignored_scopes", root.ignored_scopes) | entries(f"{path}.ignored_scopes", config.ignored_scopes),
            [entries("target_scopes", root.target_scopes), entries(f"{path}.target_scopes", config.target_scopes)],
        )

    def weight_targets(
        self, model: nn.Module, algorithm: Algorithm, *, traces: bool = False
    ) -> tuple[list[WeightTensor], dict[str, str]]:
        """Returns the weights that an algorithm may change, and name -> reason for the others.

        Args:
            model: The model; it is not changed.
            algorithm: The caller.
            traces: Whether the caller asks for `trace` as well; one trace is then often enough for both.

        Raises:
            ConfigError: A scope matches nothing, or nothing is left to compress.
            ModelError: A weight is computed by a hook or parametrization that is not ours.
        """
        path, config = self.section(algorithm)
        own = as_tensors(model, self.own_weights(model, algorithm, traces=traces))
        tensors = [*weight_tensors(model, algorithm.name), *own]
        scopes = self.scope_filter(model, algorithm)
        scopes.add({tensor.name: ScopedModule(tensor.name) for tensor in own})
        candidates = [name for tensor in tensors for name in tensor.module_names] + [tensor.name for tensor in own]
        if config.validate_scopes:
            # A scope for all algorithms may also name a batch norm, which adaptation then skips.
            norms = [name for name, module in model.named_modules() if isinstance(module, AnyBatchNorm)]
            scopes.check(candidates, [*candidates, *norms], own_prefix=path)
        targets, skipped = [], {}
        for tensor in tensors:
            names = (tensor.name, *tensor.module_names)
            reason = scopes.reason_to_skip(names) or tensor.untouchable or None
            if reason is None and tensor.parameter is None:
                raise ModelError(
                    f"{path}: the weight '{tensor.name}' is computed by a parametrization or a hook (weight_norm, "
                    f"spectral_norm, prune); {FOLD_REMEDY}, or name the layer in ignored_scopes"
                )
            if reason is None:
                targets.append(tensor)
            else:
                skipped[tensor.name] = reason
        for scope_path, entry in scopes.entries():
            self.ledger.record(scope_path, entry, "matches these modules", scopes.matches(entry))
        if not targets:
            why = "every weight is excluded by a scope" if tensors else "the model has no layer with weights"
            raise ConfigError(f"finds nothing to compress: {why}. Change the scopes, or remove this section", path=path)
        return targets, skipped

    def own_weights(self, model: nn.Module, algorithm: Algorithm, *, traces: bool = False) -> dict[str, WeightUse]:
        """Returns the weights of layers of a user's own, by name: other modules' parameters that enter a product.

        If the model has parameters that may be such weights, it is traced. Those with an `obstacle` cannot be changed.
        For the arguments see `weight_targets`.
        """
        if self.resuming:
            saved = self.saved_plans.get(algorithm.name)
            return {} if saved is None else resumed_uses(model, saved)
        path, _ = self.section(algorithm)
        plain = (lambda: self.trace(model, path)) if traces else (lambda: self.kept_trace.trace_of(model))
        # `trace` would leave out the transforms that show what reaches the model's products.
        return own_weights(model, lambda: self._trace(model, path), plain, self.kept_trace)

    def plan_weights(self, model: nn.Module, algorithm: Algorithm) -> Plan:
        """Returns the plan to change every weight that the scopes allow; see `weight_targets`."""
        targets, skipped = self.weight_targets(model, algorithm)
        return Plan(tuple(tensor.name for tensor in targets), skipped)


def _has_empty_targets(section: Section) -> bool:
    return "target_scopes" in section.model_fields_set and not section.__dict__["target_scopes"]
