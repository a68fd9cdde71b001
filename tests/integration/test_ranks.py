"""Several processes compress one model: as one process would, whatever part of the data each has, or all fail."""

from __future__ import annotations

import json
import random
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from compress_core import ModelError, create_compressed_model
from compress_core.data.ranks import alone
from compress_core.registry import use_registry
from tests.integration.processes import leave, run_in_processes
from tests.soak import count

ADAPTING = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 32}}
CONFIGS = {
    "sparsity": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5, "initializer": ADAPTING},
    "quantization": {"algorithm": "quantization", "initializer": {**ADAPTING, "range": {"num_init_samples": 32}}},
    "pruning": {
        "algorithm": "filter_pruning",
        "pruning_init": 0.4,
        "params": {"multiple_of": 1},
        "initializer": ADAPTING,
    },
    "reconstruction": {
        "algorithm": "magnitude_sparsity",
        "sparsity_init": 0.6,
        "params": {"weight_importance": "reconstruction"},
        "initializer": {**ADAPTING, "weight_reconstruction": {"num_samples": 24}},
    },
}
# Which of eight batches each process reads; with one more process than there are parts, one has none.
SHARDS = {
    "halves": [[0, 2, 4, 6], [1, 3, 5, 7]],
    "one is empty": [[0, 1, 2, 3, 4, 5, 6, 7], []],
    "unequal": [[0, 3, 5, 6, 7], [1, 4], [2]],
    "not sharded": [[0, 1, 2, 3, 4, 5, 6, 7]] * 2,
}


def dealt(seed):
    """Returns what each of two to four processes gets when the batches are dealt out by chance."""
    rng = random.Random(seed)
    shards = [[] for _ in range(rng.randint(2, 4))]
    for number in rng.sample(range(8), 8):
        rng.choice(shards).append(number)
    return shards


SHARDS |= {f"dealt {seed}": dealt(seed) for seed in range(count(0, 100))}
# Those of one group of processes, which starts slowly.
TOGETHER = [("unequal",), ("halves", "one is empty", "not sharded"), *[(name,) for name in SHARDS if "dealt" in name]]


def net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 2, 6, 6, generator=generator) * (1 + n) for n in range(8)]


def document(name):
    return {"input_info": {"sample_size": [1, 2, 6, 6]}, "compression": [CONFIGS[name]]}


def create(name, loader, seed=0):
    model = net(seed)
    if dist.is_initialized() and dist.get_rank():
        # As behind the last step of DistributedDataParallel: buffers of other processes are not those of rank 0.
        model[1].running_mean += 1
    if dist.is_initialized() and name in ("pruning", "quantization"):
        # Adapts as one process with plain batch norm does.
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return create_compressed_model(model, document(name), init_loader=loader)


def again(controller, name):
    """What measures again, later."""
    controller.adapt_batchnorm(num_samples=32)
    if name == "quantization":
        controller.init_range()
    if name == "pruning":
        controller.set_pruning_level(0.5, run_batchnorm_adaptation=True)


def in_group(rank, folder, work, *arguments):
    """A process of the group: does its work, and writes what came of it."""
    from tests.conftest import with_built_in_plugins

    torch.set_num_threads(1)
    size = arguments[0]
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    with use_registry(with_built_in_plugins()):
        result = work(rank, *arguments[1:])
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.barrier()
    leave()


def results(tmp_path, work, size, *arguments):
    run_in_processes(in_group, (str(tmp_path), work, size, *arguments), size)
    return [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(size)]


def compress_each(rank, name, several):
    return [compress(rank, name, shards) for shards in several]


def compress(rank, name, shards):
    everything = batches()
    controller, model = create(name, [everything[n] for n in shards[rank]])
    first = {key: value.clone() for key, value in model.state_dict().items()}
    state = json.dumps(controller.get_compression_state()["algorithms"])
    again(controller, name)
    if rank == 0:
        controller.strip()  # what one process does alone
        controller.context.example("export")
    return first, model.state_dict(), state


@pytest.mark.soak("ranks")
@pytest.mark.parametrize(
    "shards", [pytest.param(s, marks=[] if s == ("unequal",) else pytest.mark.slow) for s in TOGETHER]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_any_sharding_is_like_one_process(tmp_path, name, shards):
    parts = [SHARDS[each] for each in shards]
    found = results(tmp_path, compress_each, len(parts[0]), name, parts)
    for number, each in enumerate(parts):
        check_like_one_process(name, each, [of_rank[number] for of_rank in found])


def check_like_one_process(name, parts, found):
    # One process reads the batches in the order in which processes take turns.
    turns = [part[n] for n in range(8) for part in parts if n < len(part)]
    order = list(dict.fromkeys(turns))
    controller, model = create(name, [batches()[n] for n in order])
    expected = [{k: v.clone() for k, v in model.state_dict().items()}]
    state = json.dumps(controller.get_compression_state()["algorithms"])
    again(controller, name)
    expected.append(model.state_dict())
    for rank, (first, last, states) in enumerate(found):
        for got, wanted, reference in zip((first, last), expected, (found[0][0], found[0][1]), strict=True):
            for key, value in wanted.items():
                torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-6, msg=f"{rank} {key}")
                assert torch.equal(got[key], reference[key])
        assert states == state


def failing_each(rank, kinds):
    return [failing(rank, kind) for kind in kinds]


def failing(rank, kind):
    """Every process has to end with an error, in seconds; the next call goes well again."""
    start = time.monotonic()
    loader, config, seed = batches()[:2], "sparsity", 0
    if kind == "loader" and rank == 1:

        def loader_of_rank():
            yield batches()[0]
            raise OSError("disk is gone")

        loader = loader_of_rank()
    elif kind == "interrupt" and rank == 1:

        def loader_of_rank():
            raise KeyboardInterrupt
            yield

        loader = loader_of_rank()
    elif kind == "weights" and rank == 1:
        seed = 1
    elif kind == "buffers":
        loader = []
    elif kind == "config" and rank == 1:
        config = "quantization"
    model = net(seed)
    if kind == "buffers":
        model[1].running_mean += rank
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = ""
    try:
        create_compressed_model(model, document(config), init_loader=loader)
    except (Exception, KeyboardInterrupt) as error:
        message = f"{type(error).__name__}: {error}"
    same = all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    return message, same, time.monotonic() - start


EXPECTED = {
    "loader": ("rank 1 of 2 failed, so all have stopped: OSError: disk is gone", "OSError: disk is gone"),
    "interrupt": ("rank 1 of 2 failed, so all have stopped: KeyboardInterrupt", "KeyboardInterrupt"),
    "weights": ("weights differ: '0.weight' of rank 1", "weights differ: '0.weight' of rank 1"),
    "buffers": ("the data loader gave no sample", "the data loader gave no sample"),
    "config": ("configs differ: 'magnitude_sparsity' of rank 1", "configs differ: 'magnitude_sparsity' of rank 1"),
}


@pytest.mark.soak("ranks")
def test_what_fails_on_one_fails_on_all(tmp_path):
    found = results(tmp_path, failing_each, 2, list(EXPECTED))
    for number, kind in enumerate(EXPECTED):
        for of_rank, expected in zip(found, EXPECTED[kind], strict=True):
            message, same, seconds = of_rank[number]
            assert expected in message, kind
            assert same, kind
            assert seconds < 60, kind


STAGED = {
    "algorithm": "quantization",
    "params": {"weights_quant_start_epoch": 1, "activations_quant_start_epoch": 2},
    "initializer": {"range": {"num_init_samples": 32}},
}


def train_staged(rank, world):
    """Two processes with half of each batch, or one with the whole; each stage once, then switched off and on."""
    # Without batch norm: two halves have other batch statistics than the whole.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    parts = [batch[rank::world] / 10 for batch in batches()]
    controller, model = create_compressed_model(
        model, {"input_info": {"sample_size": [1, 2, 6, 6]}, "compression": [STAGED]}, init_loader=parts
    )
    parallel = model if world == 1 else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.05, momentum=0.9)
    controller.scheduler.step()  # nothing is read
    for epoch in range(5):
        controller.scheduler.epoch_step()
        if epoch == 3:
            controller.disable_activation_quantization()
        if epoch == 4:
            controller.enable_activation_quantization()
        for part in parts:
            optimizer.zero_grad()
            (parallel(part).square().mean() + controller.loss()).backward()
            optimizer.step()
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return state, [entry.enabled for entry in controller.all_quantizations.values()]


def test_staged_quantizers_train_in_ddp_like_in_one_process(tmp_path):
    found = results(tmp_path, train_staged, 2, 2)
    expected, enabled = train_staged(0, 1)
    assert all(enabled)
    for state, _ in found:
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4)
            assert torch.equal(state[key], found[0][0][key])


def shard(rank):
    from torch.distributed.fsdp import fully_shard

    messages = []
    controller, model = create("quantization", batches())
    steps = (
        lambda: fully_shard(model, mesh=mesh()),
        lambda: model(batches()[0]),
        lambda: model[0].weight,
        controller.scheduler.epoch_step,
    )
    for step in steps:
        try:
            step()
        except ModelError as error:
            messages.append(str(error))
    try:
        create_compressed_model(fully_shard(net(), mesh=mesh()), document("sparsity"), init_loader=batches())
    except ModelError as error:
        messages.append(str(error))
    return messages


def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def test_sharded_parameters_are_refused_before_and_after(tmp_path):
    for messages in results(tmp_path, shard, 1):
        assert len(messages) == 4
        assert all("is sharded over processes (fully_shard" in message for message in messages)


def own_model(rank):
    with alone():
        controller, model = create_compressed_model(
            net(rank), document("sparsity"), init_loader=batches()[rank : rank + 4]
        )
    if rank == 0:
        controller.adapt_batchnorm(num_samples=8)  # the other process does not wait, and is not waited for
    return model.state_dict()


def test_processes_may_have_models_of_their_own(tmp_path):
    first, second = results(tmp_path, own_model, 2)
    assert not torch.equal(first["0.weight"], second["0.weight"])
    _, expected = create_compressed_model(net(1), document("sparsity"), init_loader=batches()[1:5])
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(second[key], value)
