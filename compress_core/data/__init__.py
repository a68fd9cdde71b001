"""Data for a model during compression: calibration batches, example inputs, and random generators."""
