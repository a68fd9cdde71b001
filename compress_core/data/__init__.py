"""What a model runs on while it is compressed: calibration batches, example inputs, random generators."""
