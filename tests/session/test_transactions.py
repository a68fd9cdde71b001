"""Whatever fails or interrupts a method of the controller, model and controller are as before, or all is done."""

from __future__ import annotations

import copy
import json
import re
import signal

import pytest
import torch
from torch import nn

from compress_core import CompressionError, create_compressed_model
from compress_core.testing.fingerprint import fingerprint
from tests import ctrl_c
from tests.instants import Instants
from tests.soak import count

# Instants at which each method is interrupted, the first and the last among them: in all lines, and in those that do
# not save or restore, which are few.
INSTANTS = (count(4, 400), count(10, 1000))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )


SPARSITY = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.2,
    "params": {"schedule": "polynomial", "sparsity_target": 0.7, "sparsity_target_epoch": 3},
}
PRUNING = {
    "algorithm": "filter_pruning",
    "pruning_init": 0.4,
    "params": {"schedule": "exponential", "pruning_target": 0.5, "pruning_steps": 2, "multiple_of": 1},
}
QUANTIZATION = {
    "algorithm": "quantization",
    "params": {"weights_quant_start_epoch": 1, "activations_quant_start_epoch": 1},
}
BY_STEP = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.1,
    "params": {
        "schedule": "polynomial",
        "sparsity_target": 0.7,
        "sparsity_target_epoch": 2,
        "update_per_optimizer_step": True,
        "steps_per_epoch": 4,
    },
}


def data():
    torch.manual_seed(1)
    return [torch.randn(4, 2, 6, 6) for _ in range(2)]


def compressed(*sections):
    adapting = {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 8}}}
    document = {"input_info": {"sample_size": [1, 2, 6, 6]}, "compression": [{**adapting, **s} for s in sections]}
    controller, model = create_compressed_model(net(), document, init_loader=data())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(data()[0]).sum().backward()
    optimizer.step()
    return controller, model, optimizer, copy.deepcopy(model)


def shrunk(controller, optimizer, ema):
    controller.shrink(optimizer, ema=ema)


METHODS = {
    "set_sparsity_level": ([SPARSITY], lambda c, o, e: c.set_sparsity_level(0.6)),
    "set_sparsity_level of one layer": ([SPARSITY], lambda c, o, e: c.set_sparsity_level(0.9, "0")),
    "set_sparsity_level and adaptation": (
        [SPARSITY],
        lambda c, o, e: c.set_sparsity_level(0.6, run_batchnorm_adaptation=True),
    ),
    "set_pruning_level": ([PRUNING], lambda c, o, e: c.set_pruning_level(0.5)),
    "set_pruning_level of a group": ([PRUNING], lambda c, o, e: c.set_pruning_level({0: 0.5})),
    "set_pruning_level and adaptation": (
        [PRUNING],
        lambda c, o, e: c.set_pruning_level(0.5, run_batchnorm_adaptation=True),
    ),
    "compression_rate": ([SPARSITY], lambda c, o, e: setattr(c, "compression_rate", 0.6)),
    "freeze": ([SPARSITY], lambda c, o, e: c.freeze()),
    "shrink": ([PRUNING], shrunk),
    "adapt_batchnorm": ([PRUNING], lambda c, o, e: c.adapt_batchnorm(data())),
    "initialize": ([PRUNING], lambda c, o, e: c.initialize("batchnorm_adaptation", data())),
    "init_range": ([{"algorithm": "quantization"}], lambda c, o, e: c.init_range()),
    "disable_weight_quantization": ([{"algorithm": "quantization"}], lambda c, o, e: c.disable_weight_quantization()),
    "freeze_quantizers": ([{"algorithm": "quantization"}], lambda c, o, e: c.freeze_quantizers()),
    "epoch_step": ([PRUNING, SPARSITY, QUANTIZATION], lambda c, o, e: c.scheduler.epoch_step(2)),
    "step": ([BY_STEP], lambda c, o, e: c.scheduler.step(3)),
    "strip in place": (
        [PRUNING, SPARSITY, {"algorithm": "quantization"}],
        lambda c, o, e: c.strip(do_copy=False),
    ),
}


def of_optimizer(optimizer):
    state = {
        id(p): {k: (id(v), v.tolist()) if torch.is_tensor(v) else v for k, v in s.items()}
        for p, s in optimizer.state.items()
    }
    return state, [
        {k: [id(p) for p in v] if k == "params" else v for k, v in group.items()} for group in optimizer.param_groups
    ]


def everything(controller, model, optimizer, ema):
    """All that a user can see, and the attributes of the algorithms."""
    if controller._stripped:
        return "stripped", fingerprint(model)
    state = json.dumps(controller.get_compression_state())
    return (
        fingerprint(model),
        fingerprint(ema),
        of_optimizer(optimizer),
        state,
        {name: str(part) for name, part in controller.statistics().parts.items() if name in controller.algorithms},
        [sorted(vars(algorithm)) for algorithm in controller.algorithms.values()],
        controller.scheduler.clock,
    )


def instants_of(sections, method):
    """Yields whether lines that save are counted, and the number of a line."""
    for saving, number in zip((True, False), INSTANTS, strict=True):
        controller, _, optimizer, ema = compressed(*sections)
        with Instants(saving) as found:
            method(controller, optimizer, ema)
        yield from (
            (saving, n) for n in sorted({1 + round(i * (found.count - 1) / (number - 1)) for i in range(number)})
        )


@pytest.fixture(autouse=True)
def handled():
    with ctrl_c.python_handles_it():
        yield


def fail():
    raise RuntimeError("injected")


@pytest.mark.soak("signals")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_method_changes_nothing_or_all(name, error, tried):
    sections, method = METHODS[name]
    action = fail if error is RuntimeError else ctrl_c.press
    outcomes = set()
    parts = compressed(*sections)
    for saving, instant in instants_of(sections, method):
        tried.cases += 1
        before = everything(*parts)
        handler = signal.getsignal(signal.SIGINT)
        try:
            with Instants(saving, instant, action):
                method(parts[0], *parts[2:])
        except (error, CompressionError):  # an error in a forward is explained by one of ours
            pass
        assert signal.getsignal(signal.SIGINT) is handler
        after = everything(*parts)
        outcomes.add("undone" if after == before else "done")
        if after != before:
            # Complete: just what the method leaves that nobody interrupts.
            fresh = compressed(*sections)
            method(fresh[0], *fresh[2:])
            assert str(parts[0]) == str(fresh[0])
            assert comparable(parts) == comparable(fresh)
            parts = compressed(*sections)
    assert "undone" in outcomes


def comparable(parts):
    """What two models have in common after the same method: values, without identities and what was measured."""
    controller, model, optimizer, ema = parts
    values = [{k: v.tolist() for k, v in m.state_dict().items()} for m in (model, ema)]
    state = "" if controller._stripped else json.dumps(controller.get_compression_state())
    return (
        json.dumps(values),
        re.sub(r'"(seconds|\w*difference)": [^,]*', "", state),
        json.dumps(of_optimizer(optimizer)[1][0]["lr"]),
    )
