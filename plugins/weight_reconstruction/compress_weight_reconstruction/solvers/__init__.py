"""Closed-form solvers of one layer, on moments of its inputs and wanted outputs. They know tensors only, no modules."""

from compress_weight_reconstruction.solvers.freedom import Freedom, Grid, Solution
from compress_weight_reconstruction.solvers.moments import Moments, Normal
from compress_weight_reconstruction.solvers.solve import solve

__all__ = ["Freedom", "Grid", "Moments", "Normal", "Solution", "solve"]
