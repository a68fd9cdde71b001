"""Quantization: weights and activations on a grid of a few bits, learned while training."""
