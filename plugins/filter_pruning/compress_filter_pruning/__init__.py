"""Filter pruning: removes whole channels, first with masks during training, finally physically."""
