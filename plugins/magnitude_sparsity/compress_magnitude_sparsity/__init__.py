"""Magnitude sparsity: the least important weights become zero, more of them as training proceeds."""
