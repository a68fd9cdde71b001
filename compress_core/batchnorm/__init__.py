"""Batch-norm adaptation: the shared initializer that corrects running statistics."""
