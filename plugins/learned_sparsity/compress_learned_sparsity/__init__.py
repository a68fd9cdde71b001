"""Sparsity whose masks are learned, or given: `const_sparsity`, `rb_sparsity` and `movement_sparsity`."""
