"""`const_sparsity`, `rb_sparsity` and `movement_sparsity` in NNCF 2.16 and here: masks, losses, levels, gradients.

Usage, in an environment of its own: pip install nncf==2.16.0 torch==2.13.0 transformers==4.46.3, then
    pip install -e .; python -m benchmarks.sparsity_against_nncf

Both start from the same weights and scores, and see the same batches. The noise of NNCF's gates is given to ours in
each step, since the two draw it from different generators. NNCF finds no groups of
channels in BERT of later versions of transformers, nor if transformers was imported before it.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import report
from compress_core.contract.statistics import Table
from compress_core.nncf import NNCFConfig, create_compressed_model, load_state
from compress_core.transforms import get_weight_transform

STEPS, EPOCHS, BATCH = 5, 8, 16
SCHEDULES: dict[str, dict[str, Any]] = {
    "exponential (default)": {"sparsity_target": 0.7, "sparsity_target_epoch": 5, "sparsity_freeze_epoch": 7},
    "polynomial": {"schedule": "polynomial", "sparsity_target": 0.7, "sparsity_target_epoch": 5},
    "multistep": {"schedule": "multistep", "multistep_steps": [2, 4], "multistep_sparsity_levels": [0.1, 0.4, 0.6]},
    "adaptive": {"schedule": "adaptive", "sparsity_target": 0.6},
}
WARMUP = {"warmup_start_epoch": 1, "warmup_end_epoch": 4, "importance_regularization_factor": 0.02}
STRUCTURES: dict[str, list[dict[str, Any]]] = {
    "fine": [],
    "block": [{"mode": "block", "sparse_factors": [4, 2], "target_scopes": "{re}.*BertLayer.*"}],
    "per_dim, rows": [{"mode": "per_dim", "axis": 0, "target_scopes": "{re}.*BertLayer.*"}],
    "per_dim, columns": [{"mode": "per_dim", "axis": 1, "target_scopes": "{re}.*BertLayer.*"}],
    "per_dim, columns, with biases": [{"mode": "per_dim", "axis": 1, "target_scopes": "{re}.*BertLayer.*"}],
    "mixed, structured": [
        {"mode": "block", "sparse_factors": [8, 8], "target_scopes": "{re}.*attention.*"},
        {"mode": "per_dim", "axis": 0, "target_scopes": "{re}.*BertIntermediate.*"},
        {"mode": "per_dim", "axis": 1, "target_scopes": "{re}.*BertOutput.*"},
    ],
}
TEXT = {"ignored_scopes": ["{re}.*classifier.*", "{re}.*pooler.*"]}
Rows = list[dict[str, Any]]


class Network(nn.Module):
    """Two convolutions, an embedding of the place, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2)
        self.hidden, self.fc = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(x).relu()).relu().mean((2, 3))
        return self.fc(self.hidden(x).relu())


def in_nncf(model: nn.Module, document: Mapping[str, Any]) -> tuple[Any, nn.Module]:
    """Compresses a copy of a model with NNCF."""
    import nncf  # noqa: PLC0415
    from nncf.torch import create_compressed_model as create  # noqa: PLC0415

    document = {**copy.deepcopy(dict(document)), "log_dir": tempfile.gettempdir()}  # it writes a CSV file there
    return create(copy.deepcopy(model), nncf.NNCFConfig.from_dict(document), dump_graphs=False)


def ours(model: nn.Module, document: Mapping[str, Any]) -> tuple[Any, nn.Module]:
    """Compresses a copy of a model here."""
    return create_compressed_model(copy.deepcopy(model), NNCFConfig.from_dict(copy.deepcopy(dict(document))))


def layers(controller: Any) -> dict[str, Any]:
    """Returns what NNCF added to each weight, by the layer's dotted name."""
    return {
        ".".join(re.findall(r"\[(\w+)\]", info.module_node_name)): info.operand
        for info in controller.sparsified_module_info
    }


def pairs(theirs: Any, model: nn.Module, algorithm: str) -> dict[str, tuple[Any, Any]]:
    """Returns what NNCF and we added to each weight, by the layer's dotted name."""
    return {
        name: (operand, get_weight_transform(model, f"{name}.weight", algorithm))
        for name, operand in layers(theirs).items()
    }


def gap(left: torch.Tensor | float, right: torch.Tensor | float) -> float:
    """Returns the largest difference as a share of the largest value."""
    left, right = (torch.as_tensor(value).detach().double() for value in (left, right))
    if torch.equal(left, right):
        return 0.0
    return float((left - right).abs().max() / torch.maximum(left.abs().max(), right.abs().max()))


def images(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 3, 9, 9, generator=generator), torch.arange(BATCH) % 4


def optimizer(model: nn.Module, scores: Callable[[str], bool], rate: float) -> torch.optim.Optimizer:
    """Returns SGD with a learning rate of its own for the scores."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if not scores(name)], "lr": 0.05},
        {"params": [p for name, p in named if scores(name)], "lr": rate},
    ]
    return torch.optim.SGD(groups)


# const_sparsity


def const() -> Rows:
    """Masks of a sparse checkpoint, and the zeros of a stripped model, after training."""
    torch.manual_seed(0)
    plain, rows = Network(), []
    document = {"input_info": {"sample_size": [BATCH, 3, 9, 9]}, "compression": {"algorithm": "const_sparsity"}}
    sparse = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.7}
    made = in_nncf(plain, {**document, "compression": sparse})
    checkpoint = dict(made[1].state_dict())
    stripped = copy.deepcopy(plain)
    with torch.no_grad():
        for name, operand in layers(made[0]).items():
            stripped.get_submodule(name).weight.mul_(operand.binary_mask)
    for source in ("NNCF's sparse checkpoint", "a model with zeros, without masks"):
        start = stripped if source.startswith("a model") else Network()
        theirs, mine = in_nncf(start, document), ours(start, document)
        if start is not stripped:
            from nncf.torch.checkpoint_loading import load_state as load_in_nncf  # noqa: PLC0415

            load_in_nncf(theirs[1], checkpoint, is_resume=False)
            load_state(mine[1], checkpoint)
        found = pairs(theirs[0], mine[1], "const_sparsity")
        differ = sum(int((a.binary_mask != b.mask).sum()) for a, b in found.values())
        for step in range(STEPS):
            for controller, model in (theirs, mine):
                train(controller, model, torch.optim.SGD(model.parameters(), 0.05), *images(step))
        weights = [level(weights_of(controller.strip(), found)) for controller, _ in (theirs, mine)]
        rows.append({"start": source, "masks that differ": differ, "zeros after training, NNCF": weights[0],
                     "zeros after training, here": weights[1]})  # fmt: skip
    return rows


def weights_of(model: nn.Module, names: Mapping[str, Any]) -> list[torch.Tensor]:
    """Returns the weights of layers."""
    return [model.get_submodule(name).weight.detach() for name in names]


def level(weights: list[torch.Tensor]) -> float:
    """Returns the share of zeros."""
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def train(controller: Any, model: nn.Module, steps: torch.optim.Optimizer, x: Any, y: torch.Tensor) -> None:
    """Takes a training step."""
    controller.scheduler.step()
    steps.zero_grad()
    outputs = model.train()(x)
    loss = F.cross_entropy(outputs, y) + controller.loss()
    loss.backward()
    steps.step()


# rb_sparsity


def rb() -> tuple[Rows, dict[str, list[float]]]:
    """Gates trained side by side under each schedule; also the requested level by epoch."""
    torch.manual_seed(0)
    plain, rows, levels = Network(), [], {}
    for name, params in SCHEDULES.items():
        section = {"algorithm": "rb_sparsity", "sparsity_init": 0.05, "params": params}
        document = {"input_info": {"sample_size": [BATCH, 3, 9, 9]}, "compression": section}
        row, levels[name] = gates_side_by_side(plain, document)
        rows.append({"schedule": name, **row})
    return rows, levels


def gates_side_by_side(plain: nn.Module, document: Mapping[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """Trains both with the same noise; returns the largest differences, and NNCF's requested level by epoch."""
    theirs, mine = in_nncf(plain, document), ours(plain, document)
    found = pairs(theirs[0], mine[1], "rb_sparsity")
    spread(found)
    steps = [optimizer(theirs[1], lambda n: n.endswith("._mask"), 20.0), optimizer(mine[1], is_score, 20.0)]
    worst = dict.fromkeys(("requested level", "measured level", "loss", "gradients of scores", "outputs"), 0.0)
    worst["masks that differ"] = 0
    requested = []
    theirs[0].loss()  # until NNCF has computed a loss, its adaptive schedule takes the level for 0
    for epoch in range(EPOCHS):
        theirs[0].scheduler.epoch_step()
        mine[0].scheduler.epoch_step()
        requested.append(theirs[0].scheduler.current_sparsity_level)
        worst["requested level"] = max(worst["requested level"], gap(requested[-1], mine[0].requested_level))
        for step in range(STEPS):
            gaps = step_of_gates(theirs, mine, found, steps, images(STEPS * epoch + step))
            worst = {key: max(worst[key], value) for key, value in gaps.items()} | {
                "requested level": worst["requested level"]
            }
    return {**worst, "level at the end": mine[0].sparsity_level, "frozen at the end": mine[0].frozen}, requested


def spread(found: Mapping[str, tuple[Any, Any]]) -> None:
    """Gives both the same random scores, some of them closed."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for operand, gate in found.values():
            gate.scores.copy_(1.0 + 2 * torch.randn(gate.scores.shape, generator=generator))
            operand._mask.copy_(gate.scores)


def is_score(name: str) -> bool:
    """Says whether a parameter of ours is a score."""
    return name.endswith(".scores")


def step_of_gates(
    theirs: tuple[Any, nn.Module], mine: tuple[Any, nn.Module], found: Mapping[str, tuple[Any, Any]],
    steps: list[torch.optim.Optimizer], batch: tuple[torch.Tensor, torch.Tensor],
) -> dict[str, float]:  # fmt: skip
    """Takes the same step in both; NNCF draws the noise in its forward, and ours gets it."""
    for controller, stepper in zip((theirs[0], mine[0]), steps, strict=True):
        controller.scheduler.step()
        stepper.zero_grad()
    outputs = [theirs[1].train()(batch[0])]
    with torch.no_grad():
        for operand, gate in found.values():
            gate.noise.copy_(torch.special.logit(operand.uniform, 1e-6))
    outputs.append(mine[1].train()(batch[0]))
    losses = [controller.loss() for controller, _ in (theirs, mine)]
    for value, loss in zip(outputs, losses, strict=True):
        (F.cross_entropy(value, batch[1]) + loss).backward()
    if mine[0].frozen:  # NNCF still moves frozen scores, which changes none of its outputs before it is saved
        grads = 0.0
    else:
        grads = max(gap(operand._mask.grad, gate.scores.grad) for operand, gate in found.values())
    for stepper in steps:
        stepper.step()
    masks = [(operand._mask > 0, gate.is_open()) for operand, gate in found.values()]
    share = 1 - sum(int(a.sum()) for a, _ in masks) / sum(a.numel() for a, _ in masks)
    return {
        "measured level": abs(share - mine[0].sparsity_level),
        "loss": gap(losses[0], losses[1]),
        "gradients of scores": grads,
        "outputs": gap(outputs[0], outputs[1]),
        "masks that differ": sum(int((a != b).sum()) for a, b in masks),
    }


# movement_sparsity


def bert(*, biases: bool) -> nn.Module:
    """A BERT of two small layers with random weights; without biases where scores are."""
    from transformers import BertConfig, BertForSequenceClassification  # noqa: PLC0415

    torch.manual_seed(1)
    small: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 128,
        "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "num_labels": 4, "return_dict": False, "attn_implementation": "eager", "initializer_range": 0.2,
    }  # fmt: skip
    model = BertForSequenceClassification(BertConfig(**small))
    for layer in model.bert.encoder.modules():
        if isinstance(layer, nn.Linear) and not biases:
            layer.bias = None
    return model


def words(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 50, (BATCH, 8), generator=generator), torch.arange(BATCH) % 4


def movement() -> tuple[Rows, dict[str, list[list[float]]]]:
    """Scores trained side by side for each structure; also NNCF's threshold and factor by step."""
    rows, courses = [], {}
    for name, structure in STRUCTURES.items():
        params = {**WARMUP, "enable_structured_masking": name.endswith("structured")}
        plain = bert(biases="biases" in name)
        row, courses[name] = scores_side_by_side(plain, movement_document(params, structure))
        rows.append({"structure": name, **row})
    return rows, courses


def movement_document(params: Mapping[str, Any], structure: list[dict[str, Any]]) -> dict[str, Any]:
    """A document that both understand."""
    inputs = {"sample_size": [BATCH, 8], "type": "long", "keyword": "input_ids"}
    section = {"algorithm": "movement_sparsity", "params": dict(params), **TEXT}
    if structure:
        section["sparse_structure_by_scopes"] = structure
    return {"input_info": [inputs], "compression": section}


def scores_side_by_side(plain: nn.Module, document: Mapping[str, Any]) -> tuple[dict[str, Any], list[list[float]]]:
    """Trains both; returns the largest differences until the warm-up is over, and NNCF's course by step."""
    theirs, mine = in_nncf(plain, document), ours(plain, document)
    tensors = scored(theirs[0], mine[1])
    steps = [optimizer(theirs[1], lambda n: n.endswith("_importance"), 5.0), optimizer(mine[1], is_score, 5.0)]
    worst = dict.fromkeys(("threshold", "factor", "loss", "gradients of scores", "scores", "outputs"), 0.0)
    worst["masks that differ"] = 0
    course = []
    for step in range(STEPS * WARMUP["warmup_end_epoch"]):
        if step % STEPS == 0:
            theirs[0].scheduler.epoch_step()
            mine[0].scheduler.epoch_step()
        gaps = step_of_scores(theirs, mine, tensors, steps, words(step))
        worst = {key: max(value, gaps[key]) for key, value in worst.items()}
        schedule = theirs[0].scheduler
        threshold = schedule.current_importance_threshold
        course.append(
            [threshold if math.isfinite(threshold) else None, schedule.current_importance_regularization_factor]
        )
    kept = masks(tensors)
    before = [share(mask for mask, _ in kept), share(mask for _, mask in kept)]
    whole = [sum(not bool(mask.any()) for mask in side) for side in zip(*kept, strict=True)]
    for controller, _ in (theirs, mine):
        controller.scheduler.epoch_step()
        controller.scheduler.step()
    final = masks(tensors)
    return {
        **worst,
        "level before the end": before,
        "level at the end": [share(mask for mask, _ in final), share(mask for _, mask in final)],
        "tensors masked whole": "{} / {}".format(*whole),
        "feed-forward units that go": f"{units(a for a, _ in final)} / {units(b for _, b in final)}",
        "final masks that differ": sum(int((a != b).sum()) for a, b in final),
        "elements": sum(a.numel() for a, _ in final),
    }, course  # fmt: skip


def scored(theirs: Any, model: nn.Module) -> list[tuple[Any, bool, Any]]:
    """Returns NNCF's operand, whether the bias is meant, and our mask, for each tensor with scores."""
    found = []
    for name, operand in layers(theirs).items():
        found.append((operand, False, get_weight_transform(model, f"{name}.weight", "movement_sparsity")))
        if operand.prune_bias:
            found.append((operand, True, get_weight_transform(model, f"{name}.bias", "movement_sparsity")))
    return found


def masks(tensors: list[tuple[Any, bool, Any]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns which elements stay in NNCF and here."""
    return [((op.bias_ctx if bias else op.weight_ctx).binary_mask != 0, mask.mask) for op, bias, mask in tensors]


def share(found: Any) -> float:
    """Returns the masked share."""
    found = list(found)
    return 1 - sum(int(mask.sum()) for mask in found) / sum(mask.numel() for mask in found)


def units(found: Iterable[torch.Tensor]) -> int:
    """Returns how many rows of the first layers of feed-forward blocks, the only ones of their shape, are masked."""
    return sum(int((~mask.any(1)).sum()) for mask in found if mask.shape == (128, 64))


def step_of_scores(
    theirs: tuple[Any, nn.Module], mine: tuple[Any, nn.Module], tensors: list[tuple[Any, bool, Any]],
    steps: list[torch.optim.Optimizer], batch: tuple[torch.Tensor, torch.Tensor],
) -> dict[str, float]:  # fmt: skip
    """Takes the same step in both."""
    outputs, losses = [], []
    for (controller, model), stepper in zip((theirs, mine), steps, strict=True):
        controller.scheduler.step()
        stepper.zero_grad()
        outputs.append(model.train()(batch[0])[0])
        losses.append(controller.loss())
        (F.cross_entropy(outputs[-1], batch[1]) + losses[-1]).backward()
    scores = [(op.bias_importance if bias else op.weight_importance, mask.scores) for op, bias, mask in tensors]
    grads = max(gap(a.grad.flatten(), b.grad.flatten()) for a, b in scores)
    schedule = theirs[0].scheduler
    wanted, own = schedule.current_importance_threshold, mine[0].importance_threshold
    gaps = {
        "threshold": 0.0 if own == wanted else abs(own - wanted),
        "factor": abs(schedule.current_importance_regularization_factor - mine[0].importance_regularization_factor),
        "loss": gap(losses[0], losses[1]),
        "gradients of scores": grads,
        "outputs": gap(outputs[0], outputs[1]),
        "masks that differ": sum(int((a != b).sum()) for a, b in masks(tensors)),
    }  # fmt: skip
    for stepper in steps:
        stepper.step()
    return gaps | {"scores": max(gap(a.flatten(), b.flatten()) for a, b in scores)}


def from_the_start() -> Rows:
    """A warm-up from epoch 0: NNCF's threshold is the score of 0 that all elements have."""
    params = {**WARMUP, "warmup_start_epoch": 0, "steps_per_epoch": STEPS, "enable_structured_masking": False}
    rows = []
    for name, package in (("NNCF", in_nncf), ("here", ours)):
        controller, model = package(bert(biases=True), movement_document(params, []))
        steps, levels = torch.optim.SGD(model.parameters(), 0.05), []
        for step in range(2):
            controller.scheduler.epoch_step() if not step else None
            controller.scheduler.step()
            (output,) = model.train()(words(step)[0])
            levels.append(masked(controller, model))
            (F.cross_entropy(output, words(step)[1]) + controller.loss()).backward()
            steps.step()
            steps.zero_grad()
        rows.append({"warm-up from epoch 0": name, "level in step 1": levels[0], "level in step 2": levels[1]})
    return rows


def masked(controller: Any, model: nn.Module) -> float:
    """Returns the masked share in NNCF or here."""
    if hasattr(controller, "sparsity_level"):
        return controller.sparsity_level
    operands = layers(controller).values()
    return share(ctx.binary_mask != 0 for op in operands for ctx in (op.weight_ctx, op.bias_ctx))


def table(title: str, rows: Rows) -> Table:
    """Returns rows as a table."""
    return Table(title, list(rows[0]), [[shown(value) for value in row.values()] for row in rows])


def shown(value: Any) -> Any:
    """Writes small figures so that they can be told from 0."""
    if isinstance(value, list):
        return " / ".join(f"{entry:.4f}" for entry in value)
    if not isinstance(value, float):
        return value
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.4g}"


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Returns what was found as it is printed."""
    return [
        table("const_sparsity", found["const"]),
        table(f"rb_sparsity, largest differences in {EPOCHS} epochs of {STEPS} steps", found["rb"]),
        table("movement_sparsity, largest differences until the warm-up is over (NNCF / here)", found["movement"]),
        table("movement_sparsity without an initial threshold", found["from_the_start"]),
    ]


def main() -> None:
    """Compares, prints, and writes results/sparsity_against_nncf.json."""
    try:
        import nncf.torch  # noqa: PLC0415 - before transformers
    except ImportError:
        sys.exit("NNCF is not installed here: pip install nncf==2.16.0 in an environment of its own")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {"nncf": nncf.__version__, "const": const()}
    found["rb"], found["requested_levels"] = rb()
    found["movement"], found["courses"] = movement()
    found["from_the_start"] = from_the_start()
    report.show(*tables(found))
    report.write("sparsity_against_nncf", found)


if __name__ == "__main__":
    main()
