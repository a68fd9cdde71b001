"""What the hooks of one model are told besides the model itself."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from compress_core.channels.shrinking import Shrinkage
from compress_core.config import AlgorithmConfig, CompressionConfig, InitializerConfig, Section
from compress_core.config.scopes import ScopeFilter
from compress_core.contract.algorithm import Algorithm, Plan
from compress_core.contract.ledger import Ledger
from compress_core.contract.services import BatchNormService, UncompressedService
from compress_core.contract.stages import Stage
from compress_core.data.calibration import (
    CalibrationData,
    InitArgs,
    QuantizationRangeInitArgs,
)
from compress_core.data.rng import generators_of, preserved_rng
from compress_core.errors import ConfigError, DataError, ModelError, Problem
from compress_core.torch_internals import AnyBatchNorm
from compress_core.trace import Example, Trace, TraceError, trace
from compress_core.transforms import transformed_weight
from compress_core.transforms.layers import WeightTensor, weight_tensors

logger = logging.getLogger(__name__)

# Parts of a section that the core reads, later than `compress_configure`.
_READ_BY_THE_CORE = ("initializer.", "ignored_scopes", "target_scopes")


class Context:
    """Shared by all hooks of one model.

    Attributes:
        config: The whole document.
        sections: The sections of the config in its order, those of other algorithms included: for cross-checks.
        ledger: Where it is written down what each value of the config did.
        resuming: Whether a compression state is being resumed: no data, no initialization.
        bypassable: Whether bypassing the weight transforms gives the uncompressed model back.
        batch_norm: The running statistics of the model, for algorithms that change or measure it.
        uncompressed_model: Where `uncompressed` and `teacher` come from.
        announce_shrinkage: What `shrunk` calls.
        saved_plans: When a compression state is resumed, the plans in it by algorithm: what had to be traced or
            measured for a plan is there and need not be done again.
    """

    batch_norm: BatchNormService
    uncompressed_model: UncompressedService
    announce_shrinkage: Callable[[nn.Module, Shrinkage], None]

    def __init__(self, config: CompressionConfig, *, init_loader: Any = None, resuming: bool = False) -> None:
        self.config = config
        self.ledger = Ledger()
        self.resuming = resuming
        self.bypassable = True
        self.saved_plans: Mapping[str, Plan] = {}
        # Copies: that this model's algorithms read a value must not be mixed up with others who have read it.
        self.sections = tuple(s.unread() if isinstance(s, AlgorithmConfig) else s for s in config.sections)
        self._init_loader = init_loader
        self._requests: dict[str, InitializerConfig] = {}

    def weight(self, model: nn.Module, name: str, before: Stage = Stage.PRECISION) -> torch.Tensor:
        """Returns a weight as earlier stages of the pipeline have left it: masked, pruned.

        Args:
            model: The model.
            name: Dotted name of the parameter.
            before: The stage that asks; transforms of this and of later stages are left out.

        Returns:
            Shape and dtype of the parameter, without a graph; not to be written to.
        """
        return transformed_weight(model, name, before)

    @contextlib.contextmanager
    def uncompressed(self) -> Iterator[nn.Module]:
        """Within the context there is the uncompressed model, while the compressed one is being created.

        Only for algorithms and initializers that declare `needs_uncompressed`. Where nothing changes the model in place
        it is the model itself with its transforms bypassed, elsewhere a copy.

        Raises:
            PluginError: Nobody has declared that it is needed, or creation is over.
        """
        with self.uncompressed_model.view() as model:
            yield model

    @property
    def teacher(self) -> nn.Module:
        """The uncompressed model for training: a frozen copy in eval mode, where the compressed model is.

        Only for algorithms that declare `needs_uncompressed = "training"`. It belongs to no `state_dict` and to no
        checkpoint; whoever resumes gives it (`uncompressed_model=`).

        Raises:
            PluginError: Nobody has declared that it is needed.
        """
        return self.uncompressed_model.teacher()

    def lr_multiplier(self, algorithm: Algorithm) -> float:
        """Returns the factor on gradients that the config asks for: the section's, else the document's, else 1."""
        own = getattr(algorithm.config, "compression_lr_multiplier", None)
        return float(own or self.config.root.compression_lr_multiplier or 1.0)

    def shrunk(self, model: nn.Module, shrinkage: Shrinkage) -> None:
        """Tells every algorithm that tensors of a model have become smaller; for whoever has removed channels.

        Args:
            model: The smaller model.
            shrinkage: Which indices of which tensors stay.
        """
        self.announce_shrinkage(model, shrinkage)

    def section(self, algorithm: Algorithm) -> tuple[str, AlgorithmConfig]:
        """Returns the path and the content of an algorithm's section."""
        for index, section in enumerate(self.sections):
            if section is algorithm.config:
                return self.config.algorithm_path(index), algorithm.config
        raise KeyError(algorithm.name)

    def requests(self, initializer: str) -> dict[str, InitializerConfig]:
        """Returns who asked for a shared initializer: path -> section."""
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
        """Returns the section that stands at a path of `requests`."""
        return self._requests[path]

    def generators(self) -> list[torch.Generator]:
        """Returns the random generators of all data loaders that were given."""
        structs = [s for s in self.config.extra_structs() if isinstance(s, InitArgs)]
        loaders = [self._init_loader, *(struct.data_loader for struct in structs)]
        return [generator for loader in loaders for generator in generators_of(loader)]

    def refuse_unread(self, algorithm: Algorithm) -> None:
        """For the end of `compress_configure`: refuses values that the algorithm has not read and never will.

        An algorithm that reads its whole section before this lets `compress-core check` find such values.

        Raises:
            ConfigError: There are some, and the config does not say `"unused_values": "warn"`.
        """
        path, config = self.section(algorithm)
        strict = self.config.root.unused_values == "error"
        shared = [leaf for leaf, _, _ in config.given_leaves() if leaf.startswith(_READ_BY_THE_CORE)]
        self.ledger.refuse_unread(path, config, read_later=[*algorithm.reads_later, *shared], strict=strict)

    def calibration_data(self, path: str, kind: type[InitArgs] = InitArgs, loader: Any = None) -> CalibrationData:
        """Returns the batches for an initializer or a calibration.

        Args:
            path: Path of the section that asks, for messages.
            kind: Type of the object of `register_extra_structs` that holds the loader; where there is none of it,
                data of any other kind is used.
            loader: A loader (or `InitArgs`) that takes precedence.

        Raises:
            DataError: There is no loader, or it is none.
        """
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
        """Tells whether `calibration_data` would find a loader."""
        return self._init_loader is not None or self._registered_data(kind) is not None

    @contextlib.contextmanager
    def reading(self, loader: Any) -> Iterator[None]:
        """Within the context, `loader` (unless it is None) takes precedence over the data that was given before."""
        before, self._init_loader = self._init_loader, self._init_loader if loader is None else loader
        try:
            yield
        finally:
            self._init_loader = before

    def _registered_data(self, kind: type[InitArgs]) -> InitArgs | None:
        """Returns the registered data of a kind; any other does as well, for a batch is a batch."""
        exact = self.config.get_extra_struct(kind)
        if exact is not None:
            return exact
        return next((struct for struct in self.config.extra_structs() if isinstance(struct, InitArgs)), None)

    def trace(self, model: nn.Module, path: str) -> Trace:
        """Records what the model computes on an example: `input_info`, or a batch of the data that was given.

        Args:
            model: The model; it is left as it is.
            path: Path of the section that needs the trace, for messages.

        Raises:
            DataError: There is neither `input_info` nor data.
            TraceError: The model fails on the example.
        """
        infos = [info for info in self.config.root.input_info if info.sample_size is not None]
        batch = self._example_batch(path)
        if not infos and batch is None:
            raise DataError(
                f"{path}: has to see a forward of the model, and there is no example input. Add input_info to the "
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
        """Returns an example to run the model on: a batch of the data that was given, else `input_info`.

        Args:
            path: Who asks, for messages.
            device: Where tensors of `input_info` are made.

        Raises:
            DataError: There is neither data nor `input_info`.
        """
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
        source = self._registered_data(QuantizationRangeInitArgs) if self._init_loader is None else self._init_loader
        if source is None:
            return None
        data = self.calibration_data(path, loader=source)
        with preserved_rng(data.loader):
            if isinstance(data.loader, Iterator):
                return None  # it can be read once: its batches are for those who need the values
            return Example.from_batch(data, next(iter(data.batches(1)))[0])

    def scope_filter(self, model: nn.Module, algorithm: Algorithm) -> ScopeFilter:
        """Returns what the scopes of the document and of the algorithm's section leave of a model.

        Raises:
            ConfigError: A list of target scopes was given and is empty, or an entry cannot be understood.
        """
        path, config = self.section(algorithm)
        root = self.config.root
        sections: list[tuple[str, Section]] = [("", root), (f"{path}.", config)]
        empty = [f"{prefix}target_scopes" for prefix, section in sections if _has_empty_targets(section)]
        if empty:
            message = "is empty, so nothing is a target; name something, or remove it"
            raise ConfigError([Problem(at, message) for at in empty])

        def entries(prefix: str, scopes: Iterable[str]) -> dict[str, str]:
            return {f"{prefix}.{index}": scope for index, scope in enumerate(scopes)}

        return ScopeFilter(
            model,
            entries("ignored_scopes", root.ignored_scopes) | entries(f"{path}.ignored_scopes", config.ignored_scopes),
            [entries("target_scopes", root.target_scopes), entries(f"{path}.target_scopes", config.target_scopes)],
        )

    def weight_targets(self, model: nn.Module, algorithm: Algorithm) -> tuple[list[WeightTensor], dict[str, str]]:
        """Returns the weights that an algorithm may change, and name -> reason for the others.

        Raises:
            ConfigError: A scope matches nothing, or nothing is left to compress.
            ModelError: A weight is computed by somebody else's hook or parametrization.
        """
        path, config = self.section(algorithm)
        tensors = weight_tensors(model, algorithm.name)
        scopes = self.scope_filter(model, algorithm)
        candidates = [name for tensor in tensors for name in tensor.module_names]
        if config.validate_scopes:
            # A scope for everybody may also mean a batch norm, which adaptation then leaves alone.
            norms = [name for name, module in model.named_modules() if isinstance(module, AnyBatchNorm)]
            scopes.check(candidates, [*candidates, *norms], own_prefix=path)
        targets, skipped = [], {}
        for tensor in tensors:
            reason = scopes.reason_to_skip(tensor.module_names) or tensor.untouchable or None
            if reason is None and tensor.parameter is None:
                raise ModelError(
                    f"{path}: the weight '{tensor.name}' is computed by a parametrization or a hook (weight_norm, "
                    "spectral_norm, prune); remove that first, or name the layer in ignored_scopes"
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

    def plan_weights(self, model: nn.Module, algorithm: Algorithm) -> Plan:
        """Returns the plan to change every weight that the scopes leave; see `weight_targets`."""
        targets, skipped = self.weight_targets(model, algorithm)
        return Plan(tuple(tensor.name for tensor in targets), skipped)


def _has_empty_targets(section: Section) -> bool:
    return "target_scopes" in section.model_fields_set and not section.__dict__["target_scopes"]
