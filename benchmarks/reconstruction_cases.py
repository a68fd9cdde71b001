"""What the benchmark of weight reconstruction compresses: networks, compressions, and what is done about them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.bn_adaptation import NETWORKS as CONVOLUTIONAL
from benchmarks.bn_adaptation import Network
from benchmarks.trained_vit import vit_fashion

Section = dict[str, Any]

NETWORKS: Mapping[str, Network] = {**CONVOLUTIONAL, "vit": Network("fashion-mnist", vit_fashion)}

# What is done to a compressed network: nothing, correction without data, adaptation or reconstruction, both, and both
# with data choosing what goes as well.
VARIANTS = ("none", "data-free", "adaptation", "reconstruction", "both", "chosen")


def sparsity(level: float) -> Callable[[bool], list[Section]]:
    """Returns what makes the sections of magnitude sparsity."""

    def sections(chosen: bool) -> list[Section]:
        params: Section = {"sparsity_target": level}
        if chosen:
            params["weight_importance"] = "reconstruction"
        return [{"algorithm": "magnitude_sparsity", "sparsity_init": level, "params": params}]

    return sections


def two_of_four(chosen: bool) -> list[Section]:
    """Returns the section of the example package compress-nm-sparsity."""
    return [{"algorithm": "nm_sparsity", "n": 2, "m": 4}]


def filters(level: float, *, of_operations: bool) -> Callable[[bool], list[Section]]:
    """Returns what makes the sections of filter pruning; a level is a share of filters or of operations."""

    def sections(chosen: bool) -> list[Section]:
        params: Section = {
            "schedule": "baseline",
            "pruning_flops_target" if of_operations else "pruning_target": level,
            "prune_downsample_convs": True,
            "multiple_of": 1,
        }
        if chosen:
            params |= {"filter_importance": "reconstruction", "all_weights": True}
        return [{"algorithm": "filter_pruning", "pruning_init": level, "params": params}]

    return sections


def bits(number: int, *, activations: bool) -> Callable[[bool], list[Section]]:
    """Returns what makes the section of quantization: weights of so many bits, and activations of 8 or unquantized."""
    quantized: Section = {"bits": 8} if activations else {"ignored_scopes": ["{re}.*"]}
    return lambda chosen: [{"algorithm": "quantization", "weights": {"bits": number}, "activations": quantized}]


def combined(chosen: bool) -> list[Section]:
    """Returns 2.1 times fewer operations, 80 % sparsity and 8 bits in one config."""
    return [
        *filters(1 - 1 / 2.1, of_operations=True)(chosen),
        *sparsity(0.8)(chosen),
        *bits(8, activations=True)(chosen),
    ]


@dataclass(frozen=True)
class Case:
    """A compression.

    Attributes:
        name: As in the tables.
        sections: Makes the sections of the config; the argument says whether data chooses what goes.
        can_choose: Whether the algorithm offers that.
    """

    name: str
    sections: Callable[[bool], list[Section]]
    can_choose: bool = True

    def document(self, variant: str, samples: int, size: list[int], *, has_norms: bool = True) -> dict[str, Any]:
        """Returns the config.

        Args:
            variant: One of `VARIANTS`.
            samples: Number of samples of every initializer.
            size: Shape of one sample.
            has_norms: Whether the network has batch norms, which can be adapted.
        """
        adapts, solves = variant in ("adaptation", "both", "chosen"), variant in ("reconstruction", "both", "chosen")
        initializer: Section = {}
        if has_norms:
            initializer["batchnorm_adaptation"] = {"num_bn_adaptation_samples": samples if adapts else 0}
        if solves:
            initializer["weight_reconstruction"] = {"num_samples": samples}
        if variant == "data-free":
            initializer["data_free_correction"] = {}
        made = [{**section, "initializer": dict(initializer)} for section in self.sections(variant == "chosen")]
        for section in made:
            if section["algorithm"] == "quantization":
                section["initializer"]["range"] = {"num_init_samples": samples}
        # TRIAL allows weights of any number of bits.
        return {"target_device": "TRIAL", "input_info": {"sample_size": [1, *size]}, "compression": made}


_RATIOS = [Case(f"{ratio}x fewer operations", filters(1 - 1 / ratio, of_operations=True)) for ratio in (1.5, 2.1, 2.6)]
CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        *(Case(f"{100 * level:.0f} % sparse", sparsity(level)) for level in (0.5, 0.8, 0.9, 0.95)),
        Case("2:4 sparse", two_of_four, can_choose=False),
        *_RATIOS,
        Case("40 % of filters", filters(0.4, of_operations=False)),
        *(Case(f"{n}-bit weights", bits(n, activations=False), can_choose=False) for n in (8, 4, 3, 2)),
        *(Case(f"{n}-bit weights, 8-bit activations", bits(n, activations=True), can_choose=False) for n in (8, 4)),
        Case("2.1x, 80 % sparse, 8 bits", combined),
    )
}


def trained(name: str) -> nn.Module:
    """Returns a trained network in eval mode; each is made once."""
    return _trained(name)


@functools.cache
def _trained(name: str) -> nn.Module:
    return NETWORKS[name].make().eval()
