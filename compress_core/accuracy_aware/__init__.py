"""Accuracy-aware training: train until the accuracy holds, or find the highest level at which it does."""

from compress_core.accuracy_aware.base import AccuracyAwareTrainingLoop
from compress_core.accuracy_aware.levels import check_accuracy_aware
from compress_core.accuracy_aware.loops import (
    AdaptiveCompressionTrainingLoop,
    EarlyExitCompressionTrainingLoop,
    create_accuracy_aware_training_loop,
)
from compress_core.accuracy_aware.picture import draw_accuracy_aware
from compress_core.accuracy_aware.records import AccuracyAwareStatistics, EpochRecord

__all__ = [
    "AccuracyAwareStatistics",
    "AccuracyAwareTrainingLoop",
    "AdaptiveCompressionTrainingLoop",
    "EarlyExitCompressionTrainingLoop",
    "EpochRecord",
    "check_accuracy_aware",
    "create_accuracy_aware_training_loop",
    "draw_accuracy_aware",
]
