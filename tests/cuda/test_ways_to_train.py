"""Mixed precision, torch.compile, channels_last, checkpoints, files and several processes on a device."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from compress_core import load_checkpoint, read_checkpoint, save_checkpoint
from compress_core.registry import use_registry
from tests.cuda.runs import CPU, Run, assert_close, assert_on, batches, network
from tests.host_reads import host_reads
from tests.sections import SECTIONS, pruning, quantization, quantized_as_without_compiler, sparsity

pytestmark = pytest.mark.cuda
ALL = [pruning(), sparsity(), quantization()]
SETS = {"sparsity": [sparsity()], "pruning": [pruning()], "quantization": [quantization(per_channel=True)], "all": ALL}


def step_in_half_precision(run, scaler, dtype):
    losses = []
    for inputs, labels in batches() * 3:
        run.controller.scheduler.step()
        run.optimizer.zero_grad()
        with torch.autocast(run.device.type, dtype=dtype):
            loss = run.loss(inputs, labels)
        scaler.scale(loss).backward()
        scaler.step(run.optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_mixed_precision(name, dtype, device):
    run = Run(SETS[name], device)
    dtypes = {key: tensor.dtype for key, tensor in run.model.state_dict().items()}
    full = run.outputs()
    with torch.autocast(device.type, dtype=dtype):
        half = run.outputs().float()
    # A value near the middle of two grid values may be rounded to the other: 8 bits over a range of about 10.
    assert (half - full).abs().mean() < 0.1
    run.model.train()
    run.controller.scheduler.epoch_step()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16, init_scale=2.0**10)
    losses = step_in_half_precision(run, scaler, dtype)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert {key: tensor.dtype for key, tensor in run.model.state_dict().items()} == dtypes
    for key, parameter in run.model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), key
    stripped = run.controller.strip()
    torch.testing.assert_close(run.outputs(stripped), run.outputs(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SETS)
def test_compiled(name, device):
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    expected, found = (Run(SETS[name], device, torch.float64) for _ in range(2))
    torch.compiler.reset()
    compiled = torch.compile(found.model, fullgraph=True, backend=backend)
    losses = found.train(1, compiled)
    with quantized_as_without_compiler():
        assert losses == pytest.approx(expected.train(1), rel=1e-3)
    torch.compiler.reset()


@pytest.mark.parametrize("name", SETS)
def test_channels_last(name, device):
    with quantized_as_without_compiler():
        expected = Run(SETS[name], device, torch.float64)
        model = network(device, torch.float64).to(memory_format=torch.channels_last)
        found = Run(SETS[name], device, torch.float64, model=model)
        inputs = batches(1)[0][0].to(device, torch.float64).contiguous(memory_format=torch.channels_last)
        assert found.train(run=lambda x: found.model(x.to(memory_format=torch.channels_last))) == pytest.approx(
            expected.train(), rel=1e-6
        )
    assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=1e-6, atol=1e-8)
    assert found.model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert found.model.conv2(found.model.conv1(inputs)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("direction", ["from the device", "to the device", "on the device"])
def test_checkpoints(name, direction, device, tmp_path):
    saved_on = CPU if direction == "to the device" else device
    resumed_on = CPU if direction == "from the device" else device
    path = tmp_path / "checkpoint.pt"
    with quantized_as_without_compiler():
        first = Run(SETS[name], saved_on, torch.float64)
        first.train(1)
        save_checkpoint(path, first.controller, optimizer=first.optimizer)
        state = read_checkpoint(path, map_location="cpu").compression_state
        second = Run(SETS[name], resumed_on, torch.float64, state=state)
        load_checkpoint(path, second.controller, optimizer=second.optimizer, map_location=resumed_on)
        assert_on(second.model, resumed_on)
        for key, value in first.model.state_dict().items():
            assert torch.equal(second.model.state_dict()[key].cpu(), value.cpu()), key
        assert second.train(1) == pytest.approx(first.train(1), rel=1e-6)
        assert_close(second.model.state_dict(), first.model.state_dict(), rtol=1e-6, atol=1e-8)


def test_file(device, tmp_path):
    run = Run([sparsity()], device)
    run.controller.export_onnx(tmp_path / "model.onnx", batches(1)[0][0].to(device))
    assert (tmp_path / "model.onnx").stat().st_size > 0
    assert_on(run.model, device)


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "quantization, all off"])
@pytest.mark.parametrize("way", ["eager", "compiled kernels"])
def test_no_step_waits_for_the_host(name, way, device):
    if way == "compiled kernels" and device.type == "cpu":
        pytest.skip("on the CPU, small weights are not compiled, and compare ends of ranges: nothing waits for it")
    run = Run(SECTIONS[name], device)
    inputs, labels = (tensor.to(device) for tensor in batches(1)[0])
    run.model.train()
    run.controller.scheduler.epoch_step()

    def step():
        run.controller.scheduler.step()
        run.optimizer.zero_grad()
        loss = F.cross_entropy(run.model(inputs), labels) + run.controller.loss()
        loss.backward()
        run.optimizer.step()

    if way == "compiled kernels":
        assert_never_waits(step)
        return
    with quantized_as_without_compiler():
        if device.type == "cuda":
            assert_never_waits(step)
        else:
            step()
            with host_reads() as found:
                step()
            assert found == []


def assert_never_waits(step):
    step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()  # torch raises where it would wait
    finally:
        torch.cuda.set_sync_debug_mode(before)


def worker(rank, folder, kind):
    from tests.conftest import with_built_in_plugins

    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    registry = with_built_in_plugins()
    # Compilers of CPUs take a minute.
    kernels = contextlib.nullcontext() if kind == "cuda" else quantized_as_without_compiler()
    with use_registry(registry), kernels:
        run = Run(ALL, device)
        parallel = DistributedDataParallel(run.model)
        run.train(1, parallel)
        torch.save({key: value.cpu() for key, value in run.model.state_dict().items()}, f"{folder}/rank{rank}.pt")
    del parallel
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def test_two_processes_end_with_one_model(device, tmp_path):
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("nccl needs a GPU for each of two processes, and there is one")
    mp.spawn(worker, (str(tmp_path), device.type), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for key, value in first.items():
        if "running" not in key:  # DistributedDataParallel leaves these to each process until the next step
            assert torch.equal(second[key], value), key


def test_another_gpu_than_the_current_one(device):
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    other = torch.device("cuda", 1) if device.type == "cuda" else device
    expected, found = (Run(ALL, where) for where in (device, other))
    found.train(1)
    expected.train(1)
    assert_on(found.model, other)
    assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=1e-4, atol=1e-5)
