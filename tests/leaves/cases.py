"""For each leaf of the config a document in which it matters; leaves that are not named here matter in the base ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tests.leaves.observe import Linears, Net, Normalized, Routed, Several, Wide
from tests.leaves.schema import ABSENT

EVERY_OTHER_VALUE = object()


@dataclass(frozen=True)
class Case:
    """What to set a leaf to, and where.

    Attributes:
        values: Its values, two or more; by default those that `Leaf.guess` finds. Each has to make another model.
        context: Keys of the section that the base document gets besides; of the document for leaves of the root.
        without: Keys of the section that the base document loses.
        root: Keys of the document.
        section: For leaves of the root, the algorithm that it is tried with.
        refused: Values that are an error instead, or EVERY_OTHER_VALUE than the first.
        refused_at: Path that the error names, below the section or in the document; by default that of the leaf.
        warned: Whether the other values than the first change nothing, and a warning that names the key says so.
        same: Pairs of values that mean the same on purpose.
        model: The model.
        data: Whether there is a loader.
    """

    values: tuple[Any, ...] = ()
    context: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    root: Mapping[str, Any] = field(default_factory=dict)
    section: str = "magnitude_sparsity"
    refused: Any = ()
    refused_at: str = ""
    warned: bool = False
    same: tuple[tuple[Any, Any], ...] = ()
    model: type[nn.Module] = Net
    data: bool = True


# What the sections are without their leaf: short schedules, all of whose epochs are observed.
BASES: dict[str, dict[str, Any]] = {
    "magnitude_sparsity": {
        "algorithm": "magnitude_sparsity",
        "sparsity_init": 0.2,
        "params": {"sparsity_target": 0.7, "sparsity_target_epoch": 4},
    },
    "filter_pruning": {
        "algorithm": "filter_pruning",
        "pruning_init": 0.25,
        "params": {
            "pruning_target": 0.6,
            "pruning_steps": 5,
            "prune_first_conv": True,
            "prune_downsample_convs": True,
            "multiple_of": 1,
        },
    },
    "quantization": {"algorithm": "quantization"},
    "knowledge_distillation": {"algorithm": "knowledge_distillation", "type": "mse"},
    "const_sparsity": {"algorithm": "const_sparsity"},
    "rb_sparsity": {
        "algorithm": "rb_sparsity",
        "sparsity_init": 0.2,
        "params": {"sparsity_target": 0.7, "sparsity_target_epoch": 4},
    },
    "movement_sparsity": {
        "algorithm": "movement_sparsity",
        "params": {
            "warmup_start_epoch": 1,
            "warmup_end_epoch": 3,
            "importance_regularization_factor": 0.1,
            "init_importance_threshold": -0.5,
        },
    },
}

ADAPTED = {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 16}}}
RECONSTRUCTED = {"initializer": {"weight_reconstruction": {"num_samples": 24}}}
NOWHERE = {"ignored_scopes": ["nowhere"]}
TRIAL = {"target_device": "TRIAL"}
FOUR_BITS = {"initializer": {"precision": {"bitwidth_per_scope": [[4, "conv1|WEIGHT"]]}}}


_KEYS = {
    "sensitivity": {"budget": {"average_bits": 4}, "frontier_points": 2, "bits": [2, 4, 8]},
    "hawq": {"iter_number": 2},
    "autoq": {},
}


def _chosen(kind: str = "sensitivity", **changes: Any) -> dict[str, Any]:
    """Returns the keys of a section whose bits a method chooses; a change to None takes a key away."""
    keys = {key: value for key, value in {**_KEYS[kind], **changes}.items() if value is not None}
    return {"initializer": {"precision": {"type": kind, **keys}}}


def better_when_untouched(model: nn.Module) -> float:
    """A metric by which every adaptation makes the model worse."""
    better_when_untouched.calls += 1
    return -float(better_when_untouched.calls)


better_when_untouched.calls = 0  # type: ignore[attr-defined]


def _example(**entry: Any) -> dict[str, Any]:
    return {"input_info": [{"sample_size": [1, 3, 8, 8], "filler": "zeros", **entry}]}


def _input(*values: Any, **more: Any) -> Case:
    # Without a loader: otherwise its batches would stand in for an example that does not fit.
    return Case(values, model=Routed, data=False, section="quantization", **more)


def _aware(*values: Any, **more: Any) -> Case:
    params = {"initial_training_phase_epochs": 2, "patience_epochs": 1, "maximal_total_epochs": 40}
    section = {"mode": "adaptive_compression_level", "params": params}
    return Case(values, context={"accuracy_aware_training": section}, **more)


TARGETS = Case((ABSENT, ["conv2"], []), refused=([],))

ROOT = {
    "accuracy_aware_training": Case((ABSENT, {"mode": "early_exit"})),
    "accuracy_aware_training.mode": Case(("early_exit", "adaptive_compression_level")),
    "accuracy_aware_training.params.maximal_relative_accuracy_degradation": _aware(ABSENT, 30.0),
    "accuracy_aware_training.params.maximal_absolute_accuracy_degradation": _aware(ABSENT, 0.3),
    "accuracy_aware_training.params.maximal_total_epochs": _aware(3, 40),
    "accuracy_aware_training.params.algorithm": _aware(
        *(ABSENT, "magnitude_sparsity", "quantization"),
        refused=("quantization",),
        same=((ABSENT, "magnitude_sparsity"),),
    ),
    "accuracy_aware_training.params.initial_training_phase_epochs": _aware(0, 2),
    "accuracy_aware_training.params.patience_epochs": _aware(1, 2),
    "accuracy_aware_training.params.initial_compression_rate_step": _aware(0.1, 0.2),
    "accuracy_aware_training.params.compression_rate_step_reduction_factor": _aware(0.5, 0.25),
    "accuracy_aware_training.params.lr_reduction_factor": _aware(0.5, 1.0),
    "accuracy_aware_training.params.minimal_compression_rate_step": _aware(0.025, 0.05),
    "input_info.[].sample_size": _input([1, 3, 8, 8], [1, 3, 16, 16], context=_example()),
    "input_info.[].type": _input("float", "long", context=_example()),
    "input_info.[].filler": _input("zeros", "ones", "random", context=_example()),
    "input_info.[].keyword": _input(
        *("left", "right"),
        context={"input_info": [{"sample_size": [1, 3, 8, 8]}, {"sample_size": [1, 3, 8, 8]}]},
    ),
    "target_device": Case(
        (
            *("ANY", "CPU", "GPU", "NPU", "TRIAL", "CPU_SPR"),
            *("onnxruntime-cpu", "openvino-cpu", "tensorrt", "xnnpack"),
        ),
        section="quantization",
        model=Normalized,
        context={"compression": {"preset": "performance"}},
        # There is no profile for the one, and the others have no presets.
        refused=("CPU_SPR", "NPU", "tensorrt"),
        refused_at="compression.quantization",
        same=(("ANY", "CPU"),),
    ),
    "compression_lr_multiplier": Case(section="quantization"),
    "unused_values": Case(
        ("warn", "error"),
        context={"compression": {"params": {"patience": 2}}},
        refused=("error",),
        refused_at="compression.magnitude_sparsity.params.patience",
    ),
    "target_scopes": TARGETS,
    "log_dir": Case(warned=True),
    "scopes_without_shape_matching": Case((ABSENT, ["conv1"], []), warned=True),
    "disable_shape_matching": Case((ABSENT, True, False), warned=True),
}

SHARED = {
    "target_scopes": TARGETS,
    "initializer.batchnorm_adaptation.num_bn_adaptation_samples": Case((0, 4, 16)),
    "initializer.batchnorm_adaptation.guard": Case(
        (False, better_when_untouched, True), context=ADAPTED, refused=(True,)
    ),
    "initializer.batchnorm_adaptation.method": Case(context=ADAPTED),
    "initializer.batchnorm_adaptation.ignored_scopes": Case(([], ["bn1"]), context=ADAPTED),
    "initializer.weight_reconstruction.num_samples": Case((0, 16, 24)),
    "initializer.weight_reconstruction.guard": Case(
        (False, better_when_untouched, True), context=RECONSTRUCTED, refused=(True,)
    ),
    "initializer.weight_reconstruction.ignored_scopes": Case(([], ["conv2"], ["bn1"]), context=RECONSTRUCTED),
    "initializer.weight_reconstruction.memory": Case((4.0, 1e-6), context=RECONSTRUCTED),
    "validate_scopes": Case((False, True), context=NOWHERE, refused=(True,), refused_at="ignored_scopes.0"),
}


def _schedule(name: str, **params: Any) -> dict[str, Any]:
    return {"params": {"schedule": name, **params}}


ADAPTIVE = _schedule("adaptive", step=0.1)
MULTISTEP = _schedule("multistep", multistep_steps=[2], multistep_sparsity_levels=[0.3, 0.6])
# Each schedule has keys of its own, so the values that are compared are given as a whole.
MAGNITUDE = {
    "params.schedule": Case(
        ("polynomial", "exponential", "adaptive", "multistep", "baseline", "exponential_with_bias"), without=("params",)
    ),
    "params.sparsity_target": Case((0.5, 0.7)),
    "params.sparsity_target_epoch": Case((2, 4)),
    "params.sparsity_freeze_epoch": Case((ABSENT, 2)),
    "params.steps_per_epoch": Case((2, 4), context=_schedule("polynomial", update_per_optimizer_step=True)),
    "params.multistep_steps": Case(([2], [3]), context=MULTISTEP, without=("params",)),
    "params.multistep_sparsity_levels": Case(
        ([0.3, 0.6], [0.4, 0.6], [0.3, 0.7]), context=MULTISTEP, without=("params",)
    ),
    "params.patience": Case(context=ADAPTIVE, without=("params",)),
    "params.step": Case((0.05, 0.1), context=ADAPTIVE, without=("params",)),
    "params.eps": Case((0.03, 0.0), context=ADAPTIVE, without=("params",)),
    "params.importance_steps": Case((1, 4), context={"params": {"weight_importance": "reconstruction"}}),
}

# Without training the level stays 0: the adaptive schedule waits for it, as far as `eps` lets it.
RB_ADAPTIVE: dict[str, Any] = {"sparsity_init": 0.0, "params": {"schedule": "adaptive", "step": 0.1}}
RB = {
    "params.schedule": Case(
        ("polynomial", "exponential", "adaptive", "multistep", "baseline", "exponential_with_bias"), without=("params",)
    ),
    **{name: MAGNITUDE[name] for name in MAGNITUDE if "epoch" in name or "target" in name or "multistep" in name},
    "params.power": Case((0.9, 2.0), context=_schedule("polynomial")),
    "params.concave": Case((True, False), context=_schedule("polynomial")),
    "params.update_per_optimizer_step": Case((False, True), context=_schedule("polynomial")),
    "params.patience": Case((1, 2), context=RB_ADAPTIVE, without=("params",)),
    "params.step": Case((0.05, 0.1), context=RB_ADAPTIVE, without=("params",)),
    "params.eps": Case((0.03, 0.2), context=RB_ADAPTIVE, without=("params",)),
    "compression_lr_multiplier": Case((ABSENT, 0.5)),
}


def _structure(**entry: Any) -> dict[str, Any]:
    return {"sparse_structure_by_scopes": [{"target_scopes": ["fc"], **entry}]}


_STRUCTURE = "sparse_structure_by_scopes.[]"
MOVEMENT = {
    "target_scopes": Case((ABSENT, ["first"], []), refused=([],), model=Linears),
    "ignored_scopes": Case(([], ["first"]), model=Linears),
    "initializer.weight_reconstruction.ignored_scopes": Case(([], ["fc"]), context=RECONSTRUCTED),
    "validate_scopes": SHARED["validate_scopes"],
    "params.warmup_start_epoch": Case((1, 2)),
    "params.warmup_end_epoch": Case((3, 4)),
    "params.importance_regularization_factor": Case((0.1, 0.2)),
    "params.power": Case((1.0, 3.0)),
    "params.init_importance_threshold": Case((-0.5, -0.25)),
    "params.final_importance_threshold": Case((0.0, -0.1)),
    "params.steps_per_epoch": Case((2, 4)),
    "params.enable_structured_masking": Case((True, False), data=False, refused=(True,)),
    f"{_STRUCTURE}.mode": Case(
        ("fine", "block", "per_dim"), context=_structure(), refused=("block", "per_dim"), refused_at=_STRUCTURE[:-3]
    ),
    f"{_STRUCTURE}.sparse_factors": Case(([2, 4], [4, 4]), context=_structure(mode="block")),
    f"{_STRUCTURE}.axis": Case((0, 1), context=_structure(mode="per_dim")),
    f"{_STRUCTURE}.target_scopes": Case(
        (["first"], ["second"], []), context=_structure(mode="per_dim", axis=0), refused=([],), model=Linears
    ),
    "compression_lr_multiplier": Case((ABSENT, 0.5)),
}

_LEARNED = {
    "params": {
        "interlayer_ranking_type": "learned_ranking",
        "legr_params": {"generations": 30, "train_steps": 1, "population_size": 4, "num_samples": 3, "random_seed": 2},
    }
}
_ADAPTED = {
    "params": {
        "interlayer_ranking_type": "adapted_ranking",
        "adapted_params": {"candidates": 32, "population_size": 6, "calibration_samples": 8, "max_pruning": 0.5},
    }
}
PRUNING = {
    "params.schedule": Case(context={"pruning_init": 0.0, "params": {"pruning_target": 0.9, "pruning_steps": ABSENT}}),
    "params.multiple_of": Case((1, 4, 8), refused=(8,)),
    "params.pruning_flops_target": Case((0.3, 0.6), context={"params": {"pruning_target": ABSENT}}),
    "params.pruning_parameters_target": Case((0.3, 0.6), context={"params": {"pruning_target": ABSENT}}),
    # Next to nothing of the time of a narrow network can go.
    "params.pruning_latency_target": Case((0.3, 0.5), context={"params": {"pruning_target": ABSENT}}, model=Wide),
    "params.pruning_target": Case((0.3, 0.6)),
    # Functions are registered only where there are `legr_params`.
    "params.interlayer_ranking_type": Case(refused=("learned_ranking",)),
    "params.legr_params": Case(refused=EVERY_OTHER_VALUE),
    "params.adapted_params": Case(refused=EVERY_OTHER_VALUE),
    **{
        f"params.legr_params.{name}": Case(values, context=_LEARNED)
        for name, values in {
            "generations": (5, 8),
            "train_steps": (1, 2),
            "max_pruning": (ABSENT, 0.5),
            "random_seed": (1, 2),
            "population_size": (4, 12),
            "num_samples": (2, 16),
            "mutate_percent": (0.1, 1.0),
            "scale_sigma": (1.0, 2.0),
        }.items()
    },
    **{
        f"params.adapted_params.{name}": Case(values, context=_ADAPTED)
        for name, values in {
            "candidates": (5, 8),
            "population_size": (3, 16),
            "calibration_samples": (8, 16),
            "max_pruning": (ABSENT, 0.5),
            "random_seed": (1, 2),
        }.items()
    },
    **{
        f"params.{name}": Case((ABSENT, value), refused=EVERY_OTHER_VALUE)
        for name, value in {
            "save_ranking_coeffs_path": "a.json",
            "load_ranking_coeffs_path": "a.json",
        }.items()
    },
}

EXAMPLE_SCRIPTS = (
    *("batch_multiplier", "lr_poly_drop_start_epoch", "lr_poly_drop_duration_epochs"),
    *("disable_wd_start_epoch", "base_lr", "base_wd"),
)


def _quantizer(path: str, *, overrides: str = "", root: Mapping[str, Any] = TRIAL) -> dict[str, Case]:
    """Settings of a quantizer, in a group or in `scope_overrides`, on the device that offers everything."""
    context: dict[str, Any] = {"scope_overrides": {overrides: {"conv1": {}}}} if overrides else {}
    return {
        f"{path}.mode": Case(("symmetric", "asymmetric"), context=context, root=root),
        f"{path}.bits": Case(
            (ABSENT, 4, 8) if not overrides else (8, 4), context=context, root=root, same=((ABSENT, 8),)
        ),
        f"{path}.signed": Case((False, True), context=context, root=root),
        f"{path}.per_channel": Case((False, True), context=context, root=root),
    }


_STATISTICS = ("min_max", "mixed_min_max", "mean_min_max", "threesigma", "percentile", "mean_percentile")
# A weight is a single batch: means over batches are what they are means of, and one sample is as good as many.
_SAME_FOR_WEIGHTS = (*itertools.combinations(_STATISTICS[:3], 2), _STATISTICS[4:])


def _range(path: str, *, entry: Mapping[str, Any], place: tuple[str, ...], of_weights: bool = False) -> dict[str, Case]:
    def context(**more: Any) -> dict[str, Any]:
        value: Any = {**entry, **more}
        for key in reversed(place):
            value = [value] if key == "[]" else {key: value}
        if "scope_overrides" in place:
            value["scope_overrides"][place[1]][place[2]]["mode"] = "asymmetric"  # otherwise one end decides
        return value

    return {
        f"{path}.type": Case(context=context(), same=_SAME_FOR_WEIGHTS if of_weights else ()),
        f"{path}.num_init_samples": Case((24, 0) if of_weights else (24, 4, 0), context=context()),
        f"{path}.params.min_percentile": Case((0.1, 10), context=context(type="percentile")),
        f"{path}.params.max_percentile": Case((99.9, 90), context=context(type="percentile")),
    }


def _override_of_range(group: str, scope: str) -> dict[str, Case]:
    path = f"scope_overrides.{group}.{{}}.initializer.range"
    place = ("scope_overrides", group, scope, "initializer", "range")
    # That there is one is told from one with other settings for everything.
    others = {
        "initializer": {"range": {"type": "threesigma"}},
        "scope_overrides": {group: {scope: {"initializer": {}}}},
    }
    return {
        path: Case(context=others),
        **_range(path, entry={}, place=place, of_weights=group == "weights"),
    }


def _only_range(**entry: Any) -> dict[str, Any]:
    return {"initializer": {"range": [{"type": "min_max", **entry}]}}


QUANTIZATION = {
    **_range("initializer.range", entry={}, place=("initializer", "range")),
    **_range("initializer.range.[]", entry={"ignored_scopes": []}, place=("initializer", "range", "[]")),
    **_override_of_range("weights", "conv1"),
    **_override_of_range("activations", "conv0"),
    # Each quantizer has to match one entry, so an entry that leaves one out is an error where there is no other.
    "initializer.range.[].target_scopes": Case(
        (["{re}."], ["conv1"], []), context=_only_range(), refused=(["conv1"], []), refused_at="initializer.range"
    ),
    "initializer.range.[].ignored_scopes": Case(
        ([], ["conv1"]), context=_only_range(), refused=(["conv1"],), refused_at="initializer.range"
    ),
    "initializer.range.[].target_quantizer_group": Case(
        (ABSENT, "weights", "activations"),
        context=_only_range(ignored_scopes=[]),
        refused=EVERY_OTHER_VALUE,
        refused_at="initializer.range",
    ),
    "initializer.range.[].validate_scopes": Case(
        (False, True),
        context=_only_range(**NOWHERE),
        refused=(True,),
        refused_at="initializer.range.0.ignored_scopes.0",
    ),
    "initializer.range": Case(data=False, root=_example(), refused=({},)),
    "initializer.precision": Case(refused=EVERY_OTHER_VALUE),
    # Each method reads other keys, so a type alone is refused or finds nothing.
    "initializer.precision.type": Case(
        ("manual", "hawq", "autoq", "sensitivity"),
        context=FOUR_BITS,
        root=TRIAL,
        refused=("hawq", "autoq", "sensitivity"),
        refused_at="initializer.precision",
    ),
    "initializer.precision.bits": Case(
        ([2, 4, 8], [8]),
        context=FOUR_BITS,
        root=TRIAL,
        refused=([8],),
        refused_at="initializer.precision.bitwidth_per_scope.0",
    ),
    "initializer.precision.bitwidth_per_scope": Case(
        ([[4, "conv1|WEIGHT"]], [[3, "conv1|WEIGHT"]], [[4, "conv2|WEIGHT"]]), root=TRIAL
    ),
    "initializer.precision.bitwidth_assignment_mode": Case(
        ("liberal", "strict"), context=FOUR_BITS, root=TRIAL, refused=("strict",)
    ),
    "initializer.precision.num_data_points": Case((4, 24), context=_chosen("sensitivity"), root=TRIAL),
    "initializer.precision.iter_number": Case((1, 2), context=_chosen("hawq", iter_number=None), root=TRIAL),
    "initializer.precision.tolerance": Case((1e-9, 10.0), context=_chosen("hawq", iter_number=14), root=TRIAL),
    "initializer.precision.compression_ratio": Case((1.1, 3.5), context=_chosen("hawq"), root=TRIAL),
    "initializer.precision.budget": Case(({"average_bits": 3}, {"average_bits": 6}), context=_chosen(), root=TRIAL),
    **{
        f"initializer.precision.budget.{name}": Case(values, context=_chosen(budget=None), root=TRIAL)
        for name, values in {
            "average_bits": (3.0, 6.0),
            "bit_operations": (0.4, 0.8),
            "file_size": (0.0015, 0.0018),
        }.items()
    },
    "initializer.precision.output_error": Case(
        ("kl", "squared", "auto"), context=_chosen(), root=TRIAL, same=(("squared", "auto"),)
    ),
    "initializer.precision.frontier_points": Case((0, 3), context=_chosen(frontier_points=None), root=TRIAL),
    "initializer.precision.eval_subset_ratio": Case((ABSENT, 0.5), context=_chosen("autoq"), root=TRIAL, warned=True),
    "initializer.precision.warmup_iter_number": Case((ABSENT, 5), context=_chosen("autoq"), root=TRIAL, warned=True),
    "initializer.precision.dump_init_precision_data": Case(
        (ABSENT, True), context=_chosen("autoq"), root=TRIAL, warned=True
    ),
    **{
        f"initializer.precision.{name}": Case(
            (ABSENT, "nowhere.json"), context=context, root=TRIAL, refused=EVERY_OTHER_VALUE
        )
        for name, context in {
            "traces_per_layer_path": _chosen("hawq", iter_number=None),
            "sensitivities_path": _chosen(),
            "dump_path": _chosen(),
        }.items()
    },
    "initializer.precision.params": Case((ABSENT, {"a": 1}), context=FOUR_BITS, root=TRIAL, refused=EVERY_OTHER_VALUE),
    "preset": Case(("performance", "mixed")),
    **_quantizer("weights"),
    **_quantizer("activations"),
    **_quantizer("scope_overrides.weights.{}", overrides="weights"),
    **_quantizer("scope_overrides.activations.{}", overrides="activations"),
    "weights.target_scopes": TARGETS,
    "activations.target_scopes": TARGETS,
    "weights.validate_scopes": Case(
        (False, True), context={"weights": NOWHERE}, refused=(True,), refused_at="weights.ignored_scopes.0"
    ),
    "activations.validate_scopes": Case(
        (False, True), context={"activations": NOWHERE}, refused=(True,), refused_at="activations.ignored_scopes.0"
    ),
    "activations.unified_scale_ops": Case(([], [["conv2", "fc"]])),
    "export_to_onnx_standard_ops": Case((ABSENT, True, False), refused=(False,), same=((ABSENT, True),)),
    "compression_lr_multiplier": Case((ABSENT, 0.5)),
    "params.activations_quant_start_epoch": Case((0, 2)),
    "params.weights_quant_start_epoch": Case((0, 2)),
    **{
        f"params.{name}": Case((ABSENT, 3.0), context={"params": {"weights_quant_start_epoch": 2}}, warned=True)
        for name in EXAMPLE_SCRIPTS
    },
}

FEATURES = {"features": [{"student": "bn1"}]}
FADING = {"weight_schedule": {"type": "linear", "end_epoch": 4}}
# It changes nothing, so that it has no scopes and no initializers.
OF_OTHERS = {
    "ignored_scopes": ["conv1"],
    "target_scopes": ["conv1"],
    "validate_scopes": False,
    **{f"initializer.{name}": {} for name in ("batchnorm_adaptation", "data_free_correction", "weight_reconstruction")},
    "initializer.batchnorm_adaptation.num_bn_adaptation_samples": 4,
    "initializer.batchnorm_adaptation.guard": True,
    "initializer.batchnorm_adaptation.ignored_scopes": ["bn1"],
    "initializer.data_free_correction.ignored_scopes": ["conv1"],
    "initializer.weight_reconstruction.num_samples": 4,
    "initializer.weight_reconstruction.guard": True,
    "initializer.weight_reconstruction.ignored_scopes": ["conv1"],
    "initializer.weight_reconstruction.damping": 0.5,
    "initializer.weight_reconstruction.positions": 1,
    "initializer.weight_reconstruction.memory": 0.5,
}


def _of_others(path: str, *values: Any) -> Case:
    at = path.partition(".")[0]
    return Case((ABSENT, *values), refused=EVERY_OTHER_VALUE, refused_at=at)


def _feature(*values: Any, **entry: Any) -> Case:
    return Case(values, context={"features": [{"student": "bn1", **entry}]})


DISTILLATION = {
    **{path: _of_others(path, value) for path, value in OF_OTHERS.items()},
    "initializer.batchnorm_adaptation.method": _of_others("initializer.", "exact", "momentum", "paired"),
    "temperature": Case((1.0, 3.0), context={"type": "softmax"}),
    "class_dim": Case((ABSENT, 2), context={"type": "softmax", "outputs": {"first": ""}}, model=Several),
    "outputs": Case(({"first": ""}, {"second": ""}), model=Several),
    "features.[].student": Case((["bn1"], ["bn2"]), context=FEATURES),
    "features.[].teacher": Case((ABSENT, ["bn0"]), context=FEATURES),
    "features.[].type": Case(context=FEATURES),
    "features.[].scale": Case(context=FEATURES),
    "features.[].channel_dim": _feature(ABSENT, 2, type="attention"),
    "features.[].output": Case(
        ("0", "1"), context={"features": [{"student": "two"}], "outputs": {"first": ""}}, model=Several
    ),
    "weight_schedule.type": Case(
        ("linear", "cosine", "constant"), context=FADING, refused=("constant",), refused_at="weight_schedule.end_epoch"
    ),
    "weight_schedule.initial": Case(context=FADING),
    "weight_schedule.target": Case(context=FADING),
    "weight_schedule.start_epoch": Case(context=FADING),
    "weight_schedule.end_epoch": Case((2, 4), context=FADING),
}


def _idle(name: str, *values: Any, **more: Any) -> Case:
    """A setting of an initializer of an algorithm that changes nothing before training: there is nothing to make up."""
    given = values or SHARED[name].values
    compared = [value for value in given if value not in more.get("refused", ())]
    context = {} if name.count(".") == 1 else {"initializer": {name.split(".")[1]: {}}}
    return Case(given, context=context, same=tuple(itertools.combinations(compared, 2)), **more)


def _idle_initializers(*names: str) -> dict[str, Case]:
    """For each initializer, it itself and its settings."""
    found: dict[str, Case] = {}
    for name in names:
        path = f"initializer.{name}"
        found[path] = _idle(path, ABSENT, {})
        for shared, case in SHARED.items():
            if shared.startswith(f"{path}."):
                found[shared] = _idle(shared, refused=case.refused)
    return found


# What is zero is zero in the uncompressed model too, and all gates are open: the model computes what it did.
CONST = {
    **_idle_initializers("batchnorm_adaptation", "data_free_correction"),
    "initializer.data_free_correction.ignored_scopes": _idle(
        "initializer.data_free_correction.ignored_scopes", [], ["conv2"]
    ),
}
GATES = {
    **CONST,
    **_idle_initializers("weight_reconstruction"),
    "initializer.weight_reconstruction.damping": _idle("initializer.weight_reconstruction.damping", 0.1, 0.5),
    "initializer.weight_reconstruction.positions": _idle("initializer.weight_reconstruction.positions", 16, 1),
}

# A linear layer has one position.
MOVED = CONST | {"initializer.weight_reconstruction.positions": GATES["initializer.weight_reconstruction.positions"]}

CASES: dict[str, Case] = {
    **ROOT,
    **{f"{section}:{path}": case for section in BASES for path, case in SHARED.items()},
    **{
        f"{section}:algorithm": Case(
            (section, "no_such_sparsity"), refused=EVERY_OTHER_VALUE, refused_at="compression.algorithm"
        )
        for section in BASES
    },
    **{f"magnitude_sparsity:{path}": case for path, case in MAGNITUDE.items()},
    **{f"filter_pruning:{path}": case for path, case in PRUNING.items()},
    **{f"const_sparsity:{path}": case for path, case in CONST.items()},
    **{f"rb_sparsity:{path}": case for path, case in (GATES | RB).items()},
    **{f"movement_sparsity:{path}": case for path, case in (MOVED | MOVEMENT).items()},
    **{f"quantization:{path}": case for path, case in QUANTIZATION.items()},
    **{f"knowledge_distillation:{path}": case for path, case in DISTILLATION.items()},
}
