"""Claims, measured: one script each, run from the checkout as `python -m benchmarks.NAME`."""
