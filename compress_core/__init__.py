"""compress-core: model compression for PyTorch training loops, with every algorithm a plugin."""

from compress_core.accuracy_aware import (
    AccuracyAwareStatistics,
    AdaptiveCompressionTrainingLoop,
    EarlyExitCompressionTrainingLoop,
    EpochRecord,
    create_accuracy_aware_training_loop,
    draw_accuracy_aware,
)
from compress_core.api import check_config, create_compressed_model, plan_compression, register_default_init_args
from compress_core.channels import load_compressed_model
from compress_core.config import AlgorithmConfig, CompressionConfig, Count, InitializerConfig, Scopes, Section
from compress_core.contract.algorithm import Algorithm, Plan, all_or_nothing, for_one_process
from compress_core.contract.batch import Batch
from compress_core.contract.choices import Choice, ChoiceOf, ChoicePoint, callable_choice, choice, find_choice
from compress_core.contract.clock import Clock
from compress_core.contract.context import Context
from compress_core.contract.footprint import Footprint, TensorFootprint
from compress_core.contract.hookspecs import hookimpl
from compress_core.contract.initializer import Initializer, Phase
from compress_core.contract.levels import LevelAlgorithm
from compress_core.contract.stages import CompressionStage, Stage
from compress_core.contract.statistics import ByLayer, Statistics, Table, TableStatistics
from compress_core.data.calibration import (
    AutoQPrecisionInitArgs,
    BNAdaptationInitArgs,
    CalibrationData,
    InitArgs,
    LeGRInitArgs,
    ModelEvaluationArgs,
    QuantizationPrecisionInitArgs,
    QuantizationRangeInitArgs,
    TeacherArgs,
)
from compress_core.data.progress import show_progress
from compress_core.errors import (
    CompressionError,
    ConfigError,
    DataError,
    ExportError,
    ExportFileError,
    FileError,
    ModelError,
    PluginError,
    RankError,
    StateError,
    TransformError,
    UsageError,
)
from compress_core.session.checkpoints import Checkpoint, load_checkpoint, read_checkpoint, save_checkpoint
from compress_core.session.compression_plan import CompressionPlan, PlannedAlgorithm, PlannedTarget
from compress_core.session.controller import CompressionController
from compress_core.session.history import EpochFigures
from compress_core.transforms import mask_weight
from compress_core.transforms.folding import fold_computed_weights
from compress_core.transforms.layers import WeightTensor, register_module

__all__ = [
    "AccuracyAwareStatistics",
    "AdaptiveCompressionTrainingLoop",
    "Algorithm",
    "AlgorithmConfig",
    "AutoQPrecisionInitArgs",
    "BNAdaptationInitArgs",
    "Batch",
    "ByLayer",
    "CalibrationData",
    "Checkpoint",
    "Choice",
    "ChoiceOf",
    "ChoicePoint",
    "Clock",
    "CompressionConfig",
    "CompressionController",
    "CompressionError",
    "CompressionPlan",
    "CompressionStage",
    "ConfigError",
    "Context",
    "Count",
    "DataError",
    "EarlyExitCompressionTrainingLoop",
    "EpochFigures",
    "EpochRecord",
    "ExportError",
    "ExportFileError",
    "FileError",
    "Footprint",
    "InitArgs",
    "Initializer",
    "InitializerConfig",
    "LeGRInitArgs",
    "LevelAlgorithm",
    "ModelError",
    "ModelEvaluationArgs",
    "Phase",
    "Plan",
    "PlannedAlgorithm",
    "PlannedTarget",
    "PluginError",
    "QuantizationPrecisionInitArgs",
    "QuantizationRangeInitArgs",
    "RankError",
    "Scopes",
    "Section",
    "Stage",
    "StateError",
    "Statistics",
    "Table",
    "TableStatistics",
    "TeacherArgs",
    "TensorFootprint",
    "TransformError",
    "UsageError",
    "WeightTensor",
    "all_or_nothing",
    "callable_choice",
    "check_config",
    "choice",
    "create_accuracy_aware_training_loop",
    "create_compressed_model",
    "draw_accuracy_aware",
    "find_choice",
    "fold_computed_weights",
    "for_one_process",
    "hookimpl",
    "load_checkpoint",
    "load_compressed_model",
    "mask_weight",
    "plan_compression",
    "read_checkpoint",
    "register_default_init_args",
    "register_module",
    "save_checkpoint",
    "show_progress",
]
