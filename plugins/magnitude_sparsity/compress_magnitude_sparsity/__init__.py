"""Magnitude sparsity: the weights that matter least become zero, more of them as training goes on."""
