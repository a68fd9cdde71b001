"""Starts processes for tests of several ranks, from one that has imported torch and the plugins already."""

from __future__ import annotations

import multiprocessing

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
