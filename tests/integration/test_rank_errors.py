"""Several processes: an error on one ends the call on all, in each method that waits; and who does not come is named."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from compress_core import create_compressed_model, hookimpl, load_checkpoint, save_checkpoint
from compress_core.data import roll_call
from compress_core.data.ranks import alone
from compress_core.registry import use_registry
from tests.integration.processes import leave, run_in_processes
from tests.integration.test_ranks import batches, net

SPARSE = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.5,
    "params": {"schedule": "polynomial", "sparsity_target": 0.7, "sparsity_target_epoch": 4},
    "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 8}},
}
DOCUMENT = {
    "input_info": {"sample_size": [1, 2, 6, 6]},
    "compression": [
        SPARSE,
        {
            "algorithm": "filter_pruning",
            "pruning_init": 0.3,
            "params": {"multiple_of": 1},
        },
        {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8}}},
    ],
}


def worker(rank, folder):
    from tests.conftest import with_built_in_plugins

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    with use_registry(with_built_in_plugins()):
        found = {work.__name__: work(rank, folder) for work in (fail_in_each_method, interrupt, call_alone)}
        torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    leave()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came of each function on each rank; one start of processes for all."""
    folder = tmp_path_factory.mktemp("ranks")
    run_in_processes(worker, (str(folder),), 2)
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return lambda name: [entry[name] for entry in found]


class Unreadable:
    """A loader that cannot even be asked for its first batch, while it has an error."""

    def __init__(self, error=None):
        self.error = error

    def __iter__(self):
        if self.error is not None:
            raise self.error
        return iter(batches()[:1])


LOADER = Unreadable()


# What rank 1 alone does wrong before any batch is exchanged, while rank 0 does it right.
METHODS = {
    "adapt_batchnorm, loader": (
        lambda c, bad: c.adapt_batchnorm(Unreadable(OSError("disk is gone")) if bad else batches()[:1]),
        "OSError: disk is gone",
    ),
    "adapt_batchnorm, interrupt": (
        lambda c, bad: c.adapt_batchnorm(Unreadable(KeyboardInterrupt()) if bad else batches()[:1]),
        "KeyboardInterrupt",
    ),
    "adapt_batchnorm, number": (lambda c, bad: c.adapt_batchnorm(num_samples=-1 if bad else 8), "num_samples must be"),
    "adapt_batchnorm, method": (lambda c, bad: c.adapt_batchnorm(method="x" if bad else "exact"), "method must be one"),
    "initialize": (lambda c, bad: c.initialize("batchnorm_adaptation", **({"x": 1} if bad else {})), "UsageError"),
    "initialize, name": (lambda c, bad: c.initialize("nothing" if bad else "range"), "the ranks do different things"),
    "init_range": (lambda c, bad: c.init_range(**({"x": 1} if bad else {})), "quantization.init_range(x=1)"),
    "init_range, data": (lambda c, bad: init_range(c, bad), "OSError: no"),
    "set_sparsity_level": (
        lambda c, bad: c.set_sparsity_level(7 if bad else 0.6, run_batchnorm_adaptation=True),
        "magnitude_sparsity.set_sparsity_level(7",
    ),
    "set_pruning_level": (
        lambda c, bad: c.set_pruning_level(0.4, run_batchnorm_adaptation="no" if bad else True),
        "the ranks do different things",
    ),
    "epoch_step": (lambda c, bad: c.scheduler.epoch_step("one" if bad else 0), "scheduler.epoch_step('one')"),
    "epoch_step, hook": (lambda c, bad: epoch_step(c, bad), "RuntimeError: out of luck"),
    "pickle": (
        lambda c, bad: c.adapt_batchnorm([(batches()[0], threading.Lock() if bad else 0)]),
        "cannot pickle",
    ),
}


def init_range(controller, bad):
    """One rank can no longer read the data that the model was created with."""
    LOADER.error = OSError("no") if bad else None
    try:
        controller.init_range()
    finally:
        LOADER.error = None


def epoch_step(controller, bad):
    if bad:
        controller._lifecycle._manager.register(Unlucky(), "unlucky")
    try:
        controller.scheduler.epoch_step()
    finally:
        if bad:
            controller._lifecycle._manager.unregister(name="unlucky")


class Unlucky:
    @hookimpl
    def compress_epoch_step(self):
        raise RuntimeError("out of luck")


def attempt(call):
    start, message = time.monotonic(), ""
    try:
        call()
    except (Exception, KeyboardInterrupt) as error:
        message = f"{type(error).__name__}: {error}"
    return message, time.monotonic() - start


def fail_in_each_method(rank, folder):
    found = {}
    path = f"{folder}/none.json"
    # At the creation, before anything is compared.
    found["config"] = attempt(lambda: create_compressed_model(net(), path if rank else DOCUMENT, init_loader=LOADER))
    found["model"] = attempt(lambda: create_compressed_model(None if rank else net(), DOCUMENT))
    controller, model = create_compressed_model(net(), DOCUMENT, init_loader=LOADER)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name, (method, _) in METHODS.items():
        found[name] = attempt(lambda method=method: method(controller, rank == 1))
        assert controller.scheduler.current_epoch == -1
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), (name, key)
    # When resuming: after the states have been compared.
    # That of one process, as all read the same file: measured times differ.
    state = [controller.get_compression_state()]
    dist.broadcast_object_list(state)
    state = state[0]
    bad = nn.Sequential(*list(net())[:-1]) if rank else net()
    found["resume"] = attempt(lambda: create_compressed_model(bad, DOCUMENT, compression_state=state))
    # All are in step still, and what fails on all alike is each one's own error.
    found["all"] = attempt(lambda: controller.set_sparsity_level(2))
    for call in (controller.adapt_batchnorm, controller.scheduler.epoch_step, controller.init_range):
        assert attempt(call)[0] == ""
    return found, {key: value.clone() for key, value in model.state_dict().items()}


def test_an_error_before_the_first_batch_ends_each_method_on_all_ranks(results):
    (first, one), (second, other) = results("fail_in_each_method")
    expected = {name: text for name, (_, text) in METHODS.items()}
    expected |= {"config": "none.json", "model": "must be a torch.nn.Module", "resume": "", "all": "in [0, 1)"}
    assert first.keys() == second.keys() == expected.keys()
    for name, text in expected.items():
        assert text in first[name][0], name
        assert text in second[name][0], name
        assert first[name][1] < 10, name
        if name != "all" and "different things" not in first[name][0]:
            assert first[name][0].startswith("RankError: rank 1 of 2 failed, so all have stopped: "), first[name]
            assert not second[name][0].startswith("RankError"), second[name]
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def call_alone(rank, folder):
    """Rank 0 calls what rank 1 does not: it is named, and both can go on."""
    roll_call.PATIENCE, roll_call.RollCall.time_limit = 0.2, timedelta(seconds=1)
    logged = []
    roll_call.logger.warning = lambda text, *arguments: logged.append(text % arguments)
    controller, _ = create_compressed_model(net(), DOCUMENT, init_loader=batches()[:1])
    found = []
    # What changes nothing that others need.
    if rank == 0:
        controller.measure_latency(1)
        controller.statistics()
        controller.strip()
        save_checkpoint(f"{folder}/model.pt", controller)
        load_checkpoint(f"{folder}/model.pt", controller)
        with alone():
            controller.adapt_batchnorm()
        # What has to be called by all.
        found.append(attempt(controller.adapt_batchnorm))
        found.append(attempt(lambda: controller.set_sparsity_level(0.6)))
    else:
        time.sleep(2.5)
        # The first two calls of rank 0 had an outcome, which rank 1 learns of now.
        found += [attempt(lambda: controller.set_sparsity_level(0.6))]
        found += [attempt(lambda: controller.set_sparsity_level(0.6))]
    dist.barrier()
    found.append(attempt(lambda: controller.set_sparsity_level(0.6)))
    return found, logged


def test_a_call_of_one_rank_alone_names_who_has_not_come(results):
    (first, logged), (second, _) = results("call_alone")
    for (message, seconds), name in zip(first[:2], ("adapt_batchnorm()", "set_sparsity_level(0.6)"), strict=True):
        assert "rank 0 has waited" in message
        assert f"{name} for rank 1, which has not called it" in message
        assert 1 <= seconds < 3
    assert all("RankError: rank 0 of 2 gave up: rank 0 has waited 1 s in" in message for message, _ in second[:2])
    assert first[2][0] == second[2][0] == ""
    assert "rank 0 has waited 0 s in adapt_batchnorm()" in logged[0]


def interrupt(rank, folder):
    """Ctrl-C while a rank waits for one that comes later, and in a step that changes nothing on the others."""
    controller, _ = create_compressed_model(net(), DOCUMENT, init_loader=batches()[:1])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if rank == 0:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
    else:
        time.sleep(1)
    found = [attempt(controller.adapt_batchnorm)]
    found.append(attempt(lambda: controller.scheduler.step(-3 if rank else None)))
    found.append(attempt(controller.adapt_batchnorm))
    if rank == 0:  # one call of rank 1 was its failed step
        found.append(attempt(controller.adapt_batchnorm))
    return found


def test_ctrl_c_ends_the_wait(results):
    first, second = results("interrupt")
    assert first[0][0].startswith("KeyboardInterrupt")
    assert first[0][1] < 0.9
    assert "rank 0 of 2 failed, so all have stopped: KeyboardInterrupt" in second[0][0]
    assert second[1][0].startswith("UsageError: the index of a step")
    # Rank 0 has begun its step, which changes nothing, and learns of it where they meet next.
    assert first[1][0] == ""
    assert "rank 1 of 2 failed in scheduler.step(-3), so all have stopped: UsageError" in first[2][0]
    assert first[3][0] == second[2][0] == ""
