"""Programs of ExecuTorch (XNNPACK) for `benchmarks.runtimes`: FP32, ours, and those of torch's own quantization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.runtime_networks import CASES, network
from compress_core.export.agreement import compared
from compress_core.export.executorch.program import lowered
from compress_core.export.executorch.runtime import Loaded, label
from compress_core.export.executorch.silence import import_executorch, quiet
from compress_core.export.executorch.work import work_of
from compress_core.export.inputs import Inputs
from compress_core.export.report import integer_share
from compress_core.export.side_by_side import Measured, interleaved, quartiles

PEER = "PT2E"


def quantized_by_torch(
    model: nn.Module, calibration: Sequence[torch.Tensor], example: torch.Tensor
) -> tuple[bytes, float | None]:
    """Returns the program of a network that torch has quantized after training, with ExecuTorch's XNNPACKQuantizer.

    Args:
        model: The FP32 network.
        calibration: Batches of inputs.
        example: An input of the size that the program takes.

    Returns:
        The program, and its share of multiplications in integers.
    """
    quantizers = import_module("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    pt2e = import_module("torchao.quantization.pt2e.quantize_pt2e")
    quantizer = quantizers.XNNPACKQuantizer()
    quantizer.set_global(quantizers.get_symmetric_quantization_config(is_per_channel=True))
    prepared = pt2e.prepare_pt2e(torch.export.export(model.eval(), (example,)).module(), quantizer)
    for batch in calibration:
        prepared(batch)
    converted = pt2e.convert_pt2e(prepared)
    shares: list[float | None] = []

    def look(edge: Any) -> None:
        shares.append(integer_share(work_of(edge)))

    program = lowered(converted, Inputs((example,), {}, 1), largest_batch=None, metadata={}, look=look)
    return program, shares[0]


def measured_programs(
    name: str, rounds: int, folder: Path, exported: Callable[[str, str | None, Path], Any]
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Measures all programs of a network, one after the other in each round, with one thread.

    Args:
        name: Name of the network.
        rounds: Number of rounds that count.
        folder: Where programs are written.
        exported: Writes the program of a network (FP32 without a device) and returns its report.

    Returns:
        An entry for each program, and what went wrong for those that there is none of.
    """
    case = CASES[name]
    import_executorch()
    files = {"FP32": folder / "fp32.pte", "FP32 again": folder / "fp32.pte", "ours": folder / "ours.pte"}
    shares: dict[str, float | None] = {
        "FP32": exported(name, None, files["FP32"]).integer_share,
        "ours": exported(name, "xnnpack", files["ours"]).integer_share,
    }
    failures = {}
    try:
        with quiet():
            program, shares[PEER] = quantized_by_torch(
                network(name), torch.split(case.batch(16, 2), 1), case.batch(1, 4)
            )
    except Exception as error:
        failures[PEER] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    else:
        files[PEER] = folder / "pt2e.pte"
        files[PEER].write_bytes(program)
    import_module("executorch.extension.pybindings.portable_lib")._unsafe_reset_threadpool(1)
    sample = case.batch(1, 4)
    loaded = {key: Loaded(path.read_bytes()) for key, path in files.items()}
    expected = [output.clone() for output in loaded["FP32"].run([sample], 1)]
    names = [f"output_{number}" for number in range(len(expected))]
    found_times = interleaved([partial(program.run, [sample], 1) for program in loaded.values()], rounds)
    times = dict(zip(loaded, found_times, strict=True))
    found = {}
    for key, path in files.items():
        outputs = [output.numpy() for output in loaded[key].run([sample], 1)]
        found[key] = Measured(
            file=path.name,
            runtime=label(),
            size=path.stat().st_size,
            milliseconds={1: quartiles([1000 * t for t in times[key]])},
            ratios={1: quartiles([t / first for t, first in zip(times[key], times["FP32"], strict=True)])},
            integer_share=shares.get(key, shares["FP32"]),
            agreements=tuple(compared(names, outputs, expected, 1, True)),
        )
    return found, failures
