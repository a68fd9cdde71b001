"""Regularization-based sparsity: a gate at each weight, learned with a loss that asks for a level."""
