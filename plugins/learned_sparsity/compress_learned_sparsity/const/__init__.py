"""Constant sparsity: what is zero stays zero."""
