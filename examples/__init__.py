"""Examples, run from the checkout: `python -m examples.demo`."""
