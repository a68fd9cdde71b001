"""Knowledge distillation: the compressed model learns from the outputs, and the features, of a frozen teacher."""
