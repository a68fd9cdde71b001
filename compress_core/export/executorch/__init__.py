"""Writes programs for ExecuTorch's XNNPACK, and runs them."""
