"""Starts processes for tests of several ranks, from one that has imported torch and the plugins already."""

from __future__ import annotations

import contextlib
import multiprocessing
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What takes most of a second or more to import in each process.
_IMPORTED = [
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.fx",
    "pytest",
    "compress_core",
    "compress_core.testing",
    "compress_filter_pruning.plugin",
    "compress_learned_sparsity.plugin",
    "compress_magnitude_sparsity.plugin",
    "compress_quantization.plugin",
    "compress_weight_reconstruction.plugin",
]


def run_in_processes(work, arguments, number):
    """Calls `work(rank, *arguments)` in so many processes, and waits for all of them."""
    multiprocessing.set_forkserver_preload(_IMPORTED)
    mp.start_processes(work, arguments, nprocs=number, start_method="forkserver")


@contextlib.contextmanager
def as_rank(rank, folder, number=2):
    """Context manager in which a worker is a rank with one thread and the built-in plugins; at its end it leaves.

    Nothing may hold the process group any more then, as the reducer of DistributedDataParallel does.
    """
    from compress_core.registry import use_registry
    from tests.conftest import with_built_in_plugins

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=number)
    with use_registry(with_built_in_plugins()):
        yield
    dist.barrier()
    dist.destroy_process_group()
    leave()


def leave():
    """Ends a worker.

    gloo's threads can abort a process that is being torn down ("terminate called without an active exception"), or wait
    for the GIL while their destructor, which has it, waits for them. What is tested has been written; an error before
    still fails the test.
    """
    os._exit(0)
