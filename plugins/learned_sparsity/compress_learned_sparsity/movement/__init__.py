"""Movement sparsity: a score for each block of weights, learned from where the weights move."""
