"""What tests of torch internals share."""

import functools

import pytest
import torch
import torch._dynamo

covered: set[str] = set()


def canary(*names: str, breaks: str):
    """Makes a test fail with a sentence that says what has happened, whatever it was."""
    covered.update(names)

    def decorate(test):
        @functools.wraps(test)
        def run(*args, **kwargs):
            try:
                test(*args, **kwargs)
            except pytest.skip.Exception:
                raise
            except BaseException as error:
                raise AssertionError(
                    f"torch {torch.__version__} changed what {', '.join(names)} stands for: {breaks} breaks; see there "
                    "in compress_core/torch_internals.py"
                ) from error

        return run

    return decorate
