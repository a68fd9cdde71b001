"""Closed-form solvers of one layer, on moments of its inputs and wanted outputs. They know tensors only, no modules."""

from compress_weight_reconstruction.solvers.freedom import Freedom, Grid, Solution
from compress_weight_reconstruction.solvers.moments import Moments, Normal
from compress_weight_reconstruction.solvers.scores import Score, channel_errors, column_importance
from compress_weight_reconstruction.solvers.selection import RankedLayer, select_in_steps
from compress_weight_reconstruction.solvers.solve import solve

__all__ = [
    "Freedom",
    "Grid",
    "Moments",
    "Normal",
    "RankedLayer",
    "Score",
    "Solution",
    "channel_errors",
    "column_importance",
    "select_in_steps",
    "solve",
]
