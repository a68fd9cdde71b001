"""Quantization: rounds weights and activations to grids of a few bits, whose scales are learned in training."""
