"""What runs once for all algorithms after they have changed the model, and the data that it runs on."""

from compress_core.initializers.base import Initializer
from compress_core.initializers.data import (
    BNAdaptationInitArgs,
    InitArgs,
    ModelEvaluationArgs,
    QuantizationRangeInitArgs,
)

__all__ = ["BNAdaptationInitArgs", "InitArgs", "Initializer", "ModelEvaluationArgs", "QuantizationRangeInitArgs"]
