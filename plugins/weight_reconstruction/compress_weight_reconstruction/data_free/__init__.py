"""Correction of means and variances without data, from what batch norms remember of the training data."""
