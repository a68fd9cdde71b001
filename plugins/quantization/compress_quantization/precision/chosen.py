"""Chooses numbers of bits when a model is created, and keeps the choice with the state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from torch import nn

from compress_core import ConfigError, PluginError, QuantizationPrecisionInitArgs, choice
from compress_core.contract.context import Context
from compress_core.saved import STRICT, damaged, shown
from compress_quantization.config import PRECISION, PrecisionConfig
from compress_quantization.fake_quantize import FakeQuantize
from compress_quantization.plan import BitsChoice, PlannedQuantizer
from compress_quantization.precision.dumps import agreed
from compress_quantization.precision.method import ChosenBits, PrecisionMethod
from compress_quantization.precision.report import PrecisionReport
from compress_quantization.precision.search import PrecisionSearch, set_spec
from compress_quantization.quantizer_config import QuantizerSpec

logger = logging.getLogger(__name__)

_PATH = "initializer.precision"


class SavedBits(BaseModel):
    """The settings of a quantizer whose number of bits was chosen."""

    model_config = STRICT
    bits: Annotated[int, Field(ge=2, le=8)]
    narrow_range: bool
    half_range: bool
    smallest_scale: Annotated[float, Field(ge=0, le=1)]


class SavedPrecision(BaseModel):
    """The part of the state of quantization that is about chosen bits."""

    model_config = STRICT
    kind: Literal["chosen"]
    quantizers: dict[str, SavedBits]
    report: dict[str, Any] | None


def refuse_frozen(
    model: nn.Module, precision: PrecisionConfig, planned: Sequence[PlannedQuantizer], choices: Sequence[BitsChoice]
) -> None:
    """Refuses frozen weights that would get, or could get, less than 8 bits: nobody could train them to it.

    Raises:
        ConfigError: There are such weights; the message names them.
    """
    open_names = {entry.name for entry in choices if len(entry.options) > 1}
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    found = [q.parameter for q in planned if q.parameter in frozen and (q.spec.bits < 8 or q.name in open_names)]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ConfigError(
            f"the type '{precision.type}' gives less than 8 bits to weights that are frozen (requires_grad is False), "
            f"which training cannot make up for: {', '.join(found[:5])}{more}. Name their layers in ignored_scopes, "
            "give them 8 bits in scope_overrides.weights, or let them require gradients",
            path=_PATH,
        )


class ChosenPrecision:
    """The bits that a method has chosen.

    Attributes:
        choices: What each quantizer can be; while a model is created.
        report: What the method has measured.
    """

    def __init__(self) -> None:
        self.choices: list[BitsChoice] = []
        self.report: PrecisionReport | None = None
        self._specs: dict[str, QuantizerSpec] | None = None

    def choose(
        self,
        model: nn.Module,
        context: Context,
        path: str,
        config: PrecisionConfig,
        modules: Mapping[str, FakeQuantize],
        unreached: Collection[str] = (),
    ) -> bool:
        """Chooses bits and gives them to the quantizers; returns whether there was anything to choose.

        Args:
            model: The model, calibrated.
            context: The context.
            path: Path of the section of quantization.
            config: The section `initializer.precision`.
            modules: The quantizers by name.
            unreached: Names of those that no sample has reached.

        Raises:
            ConfigError, DataError, ModelError: The method cannot choose.
            PluginError: The method has chosen what cannot be.
        """
        method: PrecisionMethod = choice(config.unread().type, PRECISION)
        if method.choose is None:
            return False
        where = f"{path}.{_PATH}"
        if not method.needs_choice and all(len(c.options) == 1 for c in self.choices if c.group == "weights"):
            self._say_that_nothing_is_chosen(context, where, config)
            return False
        search = PrecisionSearch(
            config,
            where,
            model,
            context.config.root.target_device,
            choices=self.choices,
            modules=modules,
            unreached=unreached,
            find_data=lambda: context.calibration_data(where, QuantizationPrecisionInitArgs),
            extra=context.config.get_extra_struct,
        )
        result = method.choose(search)
        bits = agreed(result.bits)
        self._refuse_strange(bits, config.type)
        self._specs = {name: search.choice(name).options[number] for name, number in bits.items()}
        self.report = result.report
        for name, spec in self._specs.items():
            set_spec(modules[name], spec)
        self._record(context, where, config, result)
        self.choices = []
        return True

    def _say_that_nothing_is_chosen(self, context: Context, where: str, config: PrecisionConfig) -> None:
        device = context.config.root.target_device
        why = f"no effect: target_device {device} and these settings leave one number of bits for each weight"
        for leaf, value, _ in config.given_leaves():
            context.ledger.record(f"{where}.{leaf}", value, why, ())
        logger.warning(
            "%s: %s has nothing to choose: target_device %s and these settings leave one number of bits for each "
            'weight. Remove the section, or set a target_device that offers several, such as "TRIAL" or "NPU"',
            where,
            config.type,
            device,
        )

    def _refuse_strange(self, bits: Mapping[str, int], kind: str) -> None:
        offered = {entry.name: entry.options for entry in self.choices}
        strange = [name for name, number in bits.items() if number not in offered.get(name, ())]
        if strange:
            raise PluginError(
                f"the method '{kind}' has chosen {bits[strange[0]]} bits for '{strange[0]}', which can have "
                f"{sorted(offered.get(strange[0], ()))}; choose among search.choice(name).options"
            )

    def _record(self, context: Context, where: str, config: PrecisionConfig, result: ChosenBits) -> None:
        effects = {"type": f"the method {config.type} has chosen the bits", "bits": "to choose from", **result.effects}
        names = [name for name in result.bits if len({*self._offered(name)}) > 1]
        for leaf, value, was_read in config.given_leaves():
            if leaf in effects or was_read:
                effect = effects.get(leaf, f"used by {config.type}")
                context.ledger.record(f"{where}.{leaf}", value, effect, names if leaf in ("type", "bits") else ())

    def _offered(self, name: str) -> Mapping[int, QuantizerSpec]:
        return next(entry.options for entry in self.choices if entry.name == name)

    def planned(self, quantizers: Sequence[PlannedQuantizer]) -> list[PlannedQuantizer]:
        """Returns the plan of the quantizers with the bits that were chosen."""
        specs = self._specs or {}
        return [replace(q, spec=specs[q.name]) if q.name in specs else q for q in quantizers]

    def get_state(self) -> dict[str, Any] | None:
        """Returns the choice, JSON-able; None if there was none."""
        if self._specs is None:
            return None
        fields = SavedBits.model_fields
        return {
            "kind": "chosen",
            "quantizers": {name: {key: getattr(s, key) for key in fields} for name, s in self._specs.items()},
            "report": None if self.report is None else self.report.to_dict(),
        }

    def load_state(
        self,
        saved: SavedPrecision | None,
        quantizers: Sequence[PlannedQuantizer],
        find: Callable[[], Mapping[str, FakeQuantize]],
        path: str,
    ) -> list[PlannedQuantizer]:
        """Restores a choice, gives the bits to the quantizers, and returns their plan.

        Args:
            saved: What `get_state` returned.
            quantizers: The plan as it was before the choice.
            find: Returns the quantizers by name.
            path: Where the state is, for messages.

        Raises:
            StateError: `saved` does not fit the plan.
        """
        if saved is None:
            return list(quantizers)
        by_name = {quantizer.name: quantizer.spec for quantizer in quantizers}
        specs = {}
        for name, entry in saved.quantizers.items():
            if name not in by_name:
                raise damaged(f"{path}.quantizers", f"must name quantizers of the plan, got {shown(name)}")
            if (entry.half_range and entry.bits < 3) or (entry.narrow_range and by_name[name].mode == "asymmetric"):
                raise damaged(f"{path}.quantizers.{name}", "has settings that no quantizer can have")
            specs[name] = replace(by_name[name], **entry.model_dump())
        self._specs = specs
        self.report = None if saved.report is None else PrecisionReport.from_dict(saved.report, f"{path}.report")
        for name, module in find().items():
            if name in specs:
                set_spec(module, specs[name])
        return self.planned(quantizers)
