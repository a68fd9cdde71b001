"""NNCF's names for training-time compression: `from nncf...` becomes `from compress_core.nncf import ...`.

`docs/from_nncf.md` has a row for each name, argument and key. What is not here raises a sentence that says what to use.
"""

from typing import Any

from compress_core.accuracy_aware import (
    AdaptiveCompressionTrainingLoop,
    EarlyExitCompressionTrainingLoop,
)
from compress_core.contract.stages import CompressionStage
from compress_core.data.calibration import (
    BNAdaptationInitArgs,
    LeGRInitArgs,
    ModelEvaluationArgs,
    QuantizationRangeInitArgs,
)
from compress_core.errors import UsageError
from compress_core.nncf.config import NNCFConfig, register_default_init_args
from compress_core.nncf.controller import NNCFController
from compress_core.nncf.creating import create_accuracy_aware_training_loop, create_compressed_model
from compress_core.nncf.loading import load_state
from compress_core.nncf.marks import (
    disable_tracing,
    nncf_model_input,
    nncf_model_output,
    no_nncf_trace,
    register_operator,
)
from compress_core.nncf.structures import (
    AutoQPrecisionInitArgs,
    DefaultInitializingDataLoader,
    DistributedCallbacksArgs,
    ExecutionParameters,
    PTInitializingDataLoader,
    QuantizationPrecisionInitArgs,
)
from compress_core.transforms.layers import register_module

CompressionAlgorithmController = NNCFController

__all__ = [
    "AdaptiveCompressionTrainingLoop",
    "AutoQPrecisionInitArgs",
    "BNAdaptationInitArgs",
    "CompressionAlgorithmController",
    "CompressionStage",
    "DefaultInitializingDataLoader",
    "DistributedCallbacksArgs",
    "EarlyExitCompressionTrainingLoop",
    "ExecutionParameters",
    "LeGRInitArgs",
    "ModelEvaluationArgs",
    "NNCFConfig",
    "NNCFController",
    "PTInitializingDataLoader",
    "QuantizationPrecisionInitArgs",
    "QuantizationRangeInitArgs",
    "create_accuracy_aware_training_loop",
    "create_compressed_model",
    "disable_tracing",
    "load_state",
    "nncf_model_input",
    "nncf_model_output",
    "no_nncf_trace",
    "register_default_init_args",
    "register_module",
    "register_operator",
]

_POST_TRAINING = "is post-training quantization of NNCF; here a config with the algorithm 'quantization' and a loader"

# Names of NNCF that users import and that are not here -> what to use instead.
_ELSEWHERE = {
    "quantize": f"{_POST_TRAINING} calibrates at creation: create_compressed_model(model, config)",
    "quantize_with_accuracy_control": f"{_POST_TRAINING}, and accuracy_aware_training",
    "Dataset": "wraps calibration data; here any loader: register_default_init_args(config, loader)",
    "compress_weights": "is weight-only compression of language models, which is not part of compress-core",
    "strip": "is a method here: controller.strip()",
    "NNCFNetwork": "does not exist here: the model stays of its own class, and isinstance(model, YourModel) holds",
    "patch_torch_operators": "is not needed: no function of torch is replaced",
    "create_nncf_network": "is not needed: the model stays as it is; create_compressed_model(model, config)",
    "CompositeCompressionAlgorithmController": "is the controller itself, with child_ctrls",
    "EpochBasedTrainingAlgorithm": "NAS is not part of compress-core",
    "training_strategy": "NAS is not part of compress-core",
    "load_from_config": "loads a model without weights from NNCF 3; here create_compressed_model(model, config, state)",
    "get_config": "belongs to NNCF 3; here controller.get_compression_state()",
}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        raise UsageError(f"compress_core.nncf has no '{name}': it {_ELSEWHERE[name]}")
    raise AttributeError(f"compress_core.nncf has no '{name}'; it has {', '.join(__all__)}. See docs/from_nncf.md")
