"""Channel groups of public networks: half of every group removed, and the proof that what is left computes the same.

Usage: python -m benchmarks.zoo.channels [--only torchvision|pytorchcv|transformers] [--name PART] [--timeout 600]

For each network: groups found, the least channels that can go removed (every second one of each group), parameters
and operations before and after, agreement of masked and shrunk model, a training step of the shrunk one, and why
groups were left whole. Every network runs in a process of its own, so that one that crashes is a row and not the end.
Times are CPU seconds of one thread, of a second run; the input is small where the network takes that.
"""

from __future__ import annotations

import argparse
import collections
import copy
import gc
import json
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks import report
from benchmarks.networks import SOURCES, Network
from benchmarks.torchvision_operators import define_missing_operators
from compress_core.channels import (
    ChannelGroup,
    ChannelGroups,
    Role,
    Shrinkage,
    batch_size,
    channel_groups,
    input_specs,
    operation_costs,
    parameter_costs,
    prove,
    shrinkage,
)
from compress_core.contract.statistics import Table
from compress_core.trace import Example, Trace, trace
from compress_core.trace.graph import tensors_with_paths

# Attention on a CPU, which torch's counter leaves out.
_COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}

Pairs = list[tuple[ChannelGroup, set[int]]]


@dataclass
class Result:
    """What became of one network."""

    network: str
    error: str = ""
    input: str = ""
    trace_seconds: float = 0.0
    group_seconds: float = 0.0
    prove_seconds: float = 0.0
    groups: int = 0
    prunable: int = 0
    channels: int = 0
    removed: int = 0
    parameters: int = 0
    parameters_left: int = 0
    operations: int = 0
    operations_left: int = 0
    operations_counted: int = 0
    eval_difference: float | None = None
    train_difference: float | None = None
    dtype: str = ""
    left_whole: dict[str, int] = field(default_factory=dict)

    @property
    def built(self) -> bool:
        """Whether all that the network needs is installed."""
        return not self.error.startswith("not built")

    @property
    def certified(self) -> bool:
        """Whether the shrunk model was shown to compute the same; a model with nothing to remove counts."""
        return not self.error


def measure(network: Network) -> Result:
    """Removes half of the channels of a network."""
    result = Result(network.name)
    torch.manual_seed(0)
    try:
        model = network.make().eval()
    except ImportError as error:
        result.error = f"not built: {error}"
        return result
    randomize_batch_norm(model)
    try:
        _measure(network, model, result)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        result.error = f"{type(error).__name__}: {error}"[:600] + f" ({where.filename}:{where.lineno})"
    return result


def _measure(network: Network, model: nn.Module, result: Result) -> None:
    example, found_trace = _first_traced(network, model)
    result.input = str([list(tensor.shape) for _, tensor in tensors_with_paths(example.batch)])
    result.trace_seconds, _ = _timed(lambda: trace(model, example))
    result.group_seconds, found = _timed(lambda: channel_groups(found_trace))
    made = [group for group in found.groups if any(member.role == Role.MAKES for member in group.members)]
    chosen = [group for group in made if group.obstacle is None and group.size > 1]
    result.groups, result.prunable = len(made), len(chosen)
    result.left_whole = left_whole(made)
    pairs: Pairs = [(group, set(range(0, group.size, 2))) for group in chosen]
    result.channels, result.removed = sum(g.size for g, _ in pairs), sum(len(c) for _, c in pairs)
    specs = input_specs(found_trace.forwards[0])
    _count(model, found, pairs, batch_size(specs), result)
    plan = shrinkage(model, pairs)
    mask(model, pairs)
    result.prove_seconds, certificate = _timed(lambda: prove(model, plan, specs))
    result.eval_difference, result.train_difference = certificate.eval_difference, certificate.train_difference
    result.dtype = certificate.dtype
    _check_shrunk(model, plan, example, result)


def _first_traced(network: Network, model: nn.Module) -> tuple[Example, Trace]:
    """Returns the smallest example that the network takes, in training mode as well where that reaches more of it."""
    errors: list[Exception] = []
    for example in network.small_examples(model):
        try:
            found = trace(model, example)
            if found.unreached:  # such as classifiers that help in training
                both = trace(model, example, training=True)
                if None in both.training:
                    raise ValueError("fails in training mode")
                found = both
            return example, found
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _count(model: nn.Module, found: ChannelGroups, pairs: Pairs, samples: int, result: Result) -> None:
    chosen = [group for group, _ in pairs]
    whole, left = [g.size for g in chosen], [g.size - len(c) for g, c in pairs]
    parameters, operations = parameter_costs(model, chosen), operation_costs(found, chosen, samples)
    result.parameters, result.parameters_left = parameters.of(whole), parameters.of(left)
    result.operations, result.operations_left = samples * operations.of(whole), samples * operations.of(left)


def _check_shrunk(model: nn.Module, plan: Shrinkage, example: Example, result: Result) -> None:
    """Counts what is left, and takes a training step with it."""
    plan.apply(model)
    gc.collect()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != result.parameters_left:
        raise ValueError(f"{parameters} parameters are left, counted were {result.parameters_left}")
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_COUNTED) as counter:
        example.run(model.eval(), copy.deepcopy(example.batch))
    result.operations_counted = counter.get_total_flops()
    outputs = [t for _, t in tensors_with_paths(example.run(model.train(), example.batch)) if t.is_floating_point()]
    torch.stack([output.double().square().mean() for output in outputs]).sum().backward()
    if not any(parameter.grad is not None for parameter in model.parameters()):
        raise ValueError("no gradient reaches the shrunk model")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.shape != parameter.shape:
            raise ValueError(f"the gradient of '{name}' has the shape {tuple(parameter.grad.shape)}")


def randomize_batch_norm(model: nn.Module) -> None:
    """Gives batch norm statistics and weights that are not all alike."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                for tensor, low, high in (
                    (module.running_mean, -0.1, 0.1),
                    (module.running_var, 0.7, 1.3),
                    (module.weight, 0.7, 1.3),
                    (module.bias, -0.1, 0.1),
                ):
                    if tensor is not None:
                        tensor.uniform_(low, high)


def mask(model: nn.Module, pairs: Pairs) -> None:
    """Sets the channels to zero as pruning does: in every parameter that makes, scales, shifts or reads them."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for group, channels in pairs:
            for member in group.members:
                if member.role != Role.OTHER and member.parameter in parameters:
                    gone = [index for index, channel in enumerate(member.channels.tolist()) if channel in channels]
                    parameters[member.parameter].index_fill_(member.dim, torch.tensor(gone), 0)


def left_whole(groups: Sequence[ChannelGroup]) -> dict[str, int]:
    """Returns why groups were left whole -> how many."""
    reasons = [
        "has a single channel" if group.obstacle is None else f"{group.obstacle.operator}: {group.obstacle.reason}"
        for group in groups
        if group.obstacle is not None or group.size == 1
    ]
    return dict(collections.Counter(reasons).most_common())


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    found = run()
    return time.process_time() - started, found


def isolated(network: Network, timeout: float) -> Result:
    """Runs `measure` in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(network, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            found: Result = receiver.recv()
            return found
        return Result(network.name, f"took longer than {timeout:.0f} s")
    except EOFError:
        process.join()
        return Result(network.name, f"the process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _child(network: Network, sender: Connection) -> None:
    sender.send(measure(network))


def row(result: Result) -> tuple[Any, ...]:
    """Returns a line of the table."""
    if result.error:
        return (result.network, result.error[:60], *[""] * (len(HEADERS) - 2))
    return (
        result.network,
        "yes" if result.certified else "no",
        f"{result.trace_seconds + result.group_seconds:.2f}",
        f"{result.prunable} of {result.groups}",
        f"{result.removed} of {result.channels}",
        f"{result.parameters / 1e6:.3g} -> {result.parameters_left / 1e6:.3g}",
        f"{result.operations / 1e9:.3g} -> {result.operations_left / 1e9:.3g}",
        f"{max(result.eval_difference or 0.0, result.train_difference or 0.0):.0e}",
        next(iter(result.left_whole), ""),
    )


def summary(source: str, results: Sequence[Result]) -> tuple[Any, ...]:
    """Returns a row of the table of all."""
    built = [result for result in results if result.built]
    good = [result for result in built if result.certified]
    seconds = [result.trace_seconds + result.group_seconds for result in good] or [0.0]
    return (
        source,
        f"{len(good)} of {len(built)}",
        sum(not result.prunable for result in good),
        sum(result.operations_left == result.operations_counted for result in good),
        f"{statistics.median(seconds):.2f}",
        f"{max(seconds):.2f}",
    )


def saved() -> dict[str, Any]:
    """Returns the networks in results/zoo_channels.json, so that one library can be measured anew."""
    path = report.RESULTS / "zoo_channels.json"
    found: dict[str, Any] = json.loads(path.read_text())["networks"] if path.exists() else {}
    return found


HEADERS = (
    "network",
    "certified",
    "trace + groups s",
    "groups",
    "channels",
    "M parameters",
    "GFLOPs",
    "difference",
    "most frequent reason to leave a group whole",
)


def main() -> None:
    """Measures, prints, and writes results/zoo_channels.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SOURCES))
    parser.add_argument("--name", default="", help="only networks whose name contains this; nothing is written then")
    parser.add_argument("--timeout", type=float, default=600.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # torch's counter does not look inside
    define_missing_operators()
    channel_groups(trace(nn.Linear(1, 1), torch.zeros(1, 1)))  # what is loaded at the first trace does not count
    rows, tables, everything = [], [], saved()
    for source in [options.only] if options.only else SOURCES:
        try:
            networks = [network for network in SOURCES[source]() if options.name in network.name]
        except ImportError as error:
            print(f"{source}: skipped, {error}", flush=True)
            continue
        results = []
        for network in networks:
            results.append(isolated(network, options.timeout))
            print(results[-1], flush=True)
        rows.append(summary(source, results))
        tables.append(Table(source, HEADERS, [row(result) for result in results]))
        everything[source] = [asdict(result) for result in results]
        if not options.name:
            report.write("zoo_channels", {"networks": everything})
    headers = ("networks", "certified", "nothing to remove", "operations as counted", "median s", "most s")
    report.show(*tables, Table("Half of the channels removed", headers, rows))


if __name__ == "__main__":
    main()
