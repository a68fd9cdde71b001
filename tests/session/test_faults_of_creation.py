"""Whatever line of ours fails or is interrupted while a model is compressed: all is as before, or all is done."""

from __future__ import annotations

import pytest
import torch

from compress_core import create_compressed_model
from compress_core.testing.fingerprint import fingerprint
from tests import ctrl_c
from tests.instants import Instants
from tests.sections import ADAPTATION, pruning, quantization, sparsity
from tests.soak import count
from tests.zoo import images, trained_model

CASES = {
    "sparsity": [sparsity()],
    "pruning": [pruning()],
    "quantization": [quantization(params={"activations_quant_start_epoch": 1})],
    "all": [{**pruning(), "initializer": ADAPTATION}, sparsity(), quantization()],
}
# Lines at which creation fails, evenly spread over the several hundred thousand that it runs.
LINES = count(5, 2000)
# The last lines only leave contexts: everything is done by then, and stays.
BEHIND = 5


def fail():
    raise RuntimeError("injected")


@pytest.fixture(autouse=True)
def handled():
    with ctrl_c.python_handles_it():
        yield


def create(model, name):
    config = {"input_info": {"sample_size": [4, 3, 8, 8]}, "compression": CASES[name]}
    return create_compressed_model(model, config, init_loader=[(images(), 0)])


@pytest.mark.soak("faults")
@pytest.mark.parametrize("action", [fail, ctrl_c.press])
@pytest.mark.parametrize("name", CASES if count(0, 100) else ["all"])
def test_a_creation_that_fails_at_any_line(name, action, tried):
    error = Exception if action is fail else KeyboardInterrupt
    whole = trained_model("resnet")
    create(whole, name)
    with Instants(True) as lines:
        create(trained_model("resnet"), name)
    model, complaints, undone = trained_model("resnet"), [], 0
    before, generator = fingerprint(model), torch.get_rng_state()
    for line in sorted({1 + round(i * (lines.count - 1) / (LINES - 1)) for i in range(LINES)}):
        tried.cases += 1
        came = False
        try:
            with Instants(True, line, action):
                create(model, name)
        except error:  # some errors are explained by ours
            came = True
        if came and fingerprint(model) == before:
            undone += 1
        elif came and not (line > lines.count - BEHIND and same(model, whole)):
            complaints.append(f"line {line}: the model was changed")
        elif not came and not same(model, whole):
            complaints.append(f"line {line}: the error was swallowed, and the model is another one")
        if not torch.equal(torch.get_rng_state(), generator):
            complaints.append(f"line {line}: random numbers were drawn")
            torch.set_rng_state(generator)
        if fingerprint(model) != before:
            model = trained_model("resnet")
            before = fingerprint(model)
    tried.failed = len(complaints)
    assert not complaints, f"{len(complaints)}\n" + "\n".join(complaints)
    assert undone


def same(model, whole):
    left, right = model.state_dict(), whole.state_dict()
    return list(left) == list(right) and all(torch.equal(value, right[key]) for key, value in left.items())
