"""The same model and config in NNCF 2.16 and here: levels, masks, and what a training step costs.

Usage, in an environment of its own: pip install nncf==2.16.0 torch==2.13.0, then
    PYTHONPATH=.:plugins/magnitude_sparsity python -m benchmarks.against_nncf

NNCF's levels follow its rule of a threshold (everything not above it goes), ours are exact; the difference is listed.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from benchmarks import report
from benchmarks.clock import compare
from benchmarks.sparsity_cost import BATCH, SIZE, TrainingStep
from compress_core import CompressionController, create_compressed_model
from compress_core.contract.statistics import Table
from compress_core.registry import Registry, use_registry
from compress_core.transforms import get_weight_transform
from examples.common.networks import mobilenet_v2, resnet18

SCHEDULES: dict[str, dict[str, Any]] = {
    "polynomial": {"schedule": "polynomial", "sparsity_target": 0.7, "sparsity_target_epoch": 5},
    "polynomial, convex": {
        "schedule": "polynomial", "sparsity_target": 0.7, "sparsity_target_epoch": 5, "concave": False, "power": 3,
    },
    "exponential": {"schedule": "exponential", "sparsity_target": 0.8, "sparsity_target_epoch": 6},
    "multistep": {"schedule": "multistep", "multistep_steps": [2, 4], "multistep_sparsity_levels": [0.1, 0.4, 0.6]},
    "adaptive": {"schedule": "adaptive", "sparsity_target": 0.3},
    "frozen early": {"sparsity_target": 0.8, "sparsity_target_epoch": 10, "sparsity_freeze_epoch": 3},
}  # fmt: skip
EPOCHS = 9


def config(params: dict[str, Any], level: float = 0.0) -> dict[str, Any]:
    """A document that both understand."""
    section = {"algorithm": "magnitude_sparsity", "sparsity_init": level, "params": params}
    return {"input_info": {"sample_size": [BATCH, 3, SIZE, SIZE]}, "compression": section}


def in_nncf(model: nn.Module, document: dict[str, Any]) -> tuple[Any, nn.Module]:
    """Compresses a model with NNCF."""
    from nncf import NNCFConfig  # noqa: PLC0415
    from nncf.torch import create_compressed_model as create  # noqa: PLC0415

    return create(model, NNCFConfig.from_dict(document), dump_graphs=False)


def ours(model: nn.Module, document: dict[str, Any]) -> tuple[Any, nn.Module]:
    """Compresses a model here."""
    return create_compressed_model(model, document)


def zeros(controller: Any) -> dict[str, torch.Tensor]:
    """Returns where each weight is masked, by the layer's dotted name."""
    if isinstance(controller, CompressionController):
        return {
            name.removesuffix(".weight"): get_weight_transform(controller.model, name, "magnitude_sparsity").mask == 0
            for name in controller.sparsified_module_info
        }
    return {
        ".".join(re.findall(r"\[(\w+)\]", info.module_node_name)): info.operand.binary_mask == 0
        for info in controller.sparsified_module_info
    }


def schedules(base: nn.Module) -> tuple[Table, list[dict[str, Any]]]:
    """Levels and masks epoch by epoch."""
    rows = []
    for name, params in SCHEDULES.items():
        theirs, _ = in_nncf(copy.deepcopy(base), config(params))
        mine, _ = ours(copy.deepcopy(base), config(params))
        level_gap = mask_gap = 0.0
        for _ in range(EPOCHS):
            theirs.scheduler.epoch_step()
            mine.scheduler.epoch_step()
            left, right = zeros(theirs), zeros(mine)
            total = sum(mask.numel() for mask in right.values())
            reached = [sum(int(mask.sum()) for mask in side.values()) / total for side in (left, right)]
            level_gap = max(level_gap, abs(reached[0] - reached[1]))
            mask_gap = max(mask_gap, sum(int((left[k] != right[k]).sum()) for k in right) / total)
        rows.append(
            {
                "schedule": name,
                "level": mine.sparsity_level,
                "NNCF reports": theirs.scheduler.current_sparsity_level,
                "largest difference in level": level_gap,
                "largest share of masks that differ": mask_gap,
            }
        )
    return Table(
        "Magnitude sparsity over 9 epochs, ResNet-18-like", list(rows[0]), [list(r.values()) for r in rows]
    ), rows


def training_steps() -> tuple[Table, dict[str, Any]]:
    """Training steps with masks, ours and NNCF's, against the plain model."""
    rows, results = [], {}
    for name, make in (("resnet18", resnet18), ("mobilenet_v2", mobilenet_v2)):
        torch.manual_seed(0)
        plain = make()
        document = config({"sparsity_target": 0.5}, 0.5)
        theirs, mine = in_nncf(copy.deepcopy(plain), document)[1], ours(copy.deepcopy(plain), document)[1]
        found = compare(TrainingStep(plain), {"ours": TrainingStep(mine), "NNCF": TrainingStep(theirs)}, 9)
        rows.append((name, *(str(ratio) for ratio in found.values())))
        results[name] = {key: asdict(ratio) for key, ratio in found.items()}
    return Table(
        "Training step / plain, CPU time, median [quartiles]", ("model", "baseline", "ours", "NNCF"), rows
    ), results


def our_registry() -> Registry:
    """The plugin, whether or not this project is installed in the peer's environment."""
    from compress_core.batchnorm import plugin as initializers  # noqa: PLC0415
    from compress_magnitude_sparsity import plugin as sparsity  # noqa: PLC0415

    registry = Registry()
    registry.register(initializers, "initializers")
    registry.register(sparsity, "magnitude_sparsity")
    return registry


def main() -> None:
    """Compares, prints, and writes results/against_nncf.json."""
    try:
        import nncf  # noqa: PLC0415
    except ImportError:
        sys.exit("NNCF is not installed here: pip install nncf==2.16.0 in an environment of its own")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with use_registry(our_registry()):
        level_table, levels = schedules(resnet18())
        report.show(level_table)
        step_table, steps = training_steps()
        report.show(step_table)
    report.write("against_nncf", {"nncf": nncf.__version__, "schedules": levels, "training_steps": steps})


if __name__ == "__main__":
    main()
