"""Writes docs/benchmarks.md and the figures of docs/howto/choose.md from benchmarks/results/*.json.

Usage: python -m docs.make_benchmarks [--check]

Nothing is measured here: each figure is in a file that a script of `benchmarks/` has written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import (
    bn_adaptation,
    creation_cost,
    exported_accuracy,
    exported_latency,
    latency_budget,
    mixed_precision,
    pruned_latency,
    quantization_cost,
    reconstruction_tuning,
    runtimes,
    sparsity_against_nncf,
)
from benchmarks.report import RESULTS
from benchmarks.zoo import table as zoo_table
from compress_core.contract.statistics import Table
from docs import benchmark_tables
from docs.choosing import decision_table

PAGE = Path(__file__).parent / "benchmarks.md"
CHOOSE = Path(__file__).parent / "howto" / "choose.md"
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"
Content = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A section of the page.

    Attributes:
        title: Its heading.
        command: What measured it, without `python -m benchmarks.`.
        files: Names of the results.
        tables: Makes tables of the content of a file.
        page: The page that says what was measured how, and what follows from it.
    """

    title: str
    command: str
    files: Sequence[str]
    tables: Callable[[Content], Sequence[Table]]
    page: str


BENCHMARKS = (
    Benchmark(
        "8-bit files: speed in ONNX Runtime",
        "exported_latency",
        ["exported_latency"],
        lambda content: [exported_latency.table(content["networks"])],
        "quantization.md#cost",
    ),
    Benchmark(
        "8-bit files: accuracy in each runtime",
        "exported_accuracy",
        ["exported_accuracy"],
        lambda content: [exported_accuracy.shown(content["results"])],
        "quantization.md#accuracy-of-the-file",
    ),
    Benchmark(
        "8-bit files beside those of other tools",
        "runtimes --peer PYTHON",
        ["runtimes"],
        lambda content: [runtimes.summary(content["networks"])],
        "export.md#what-8-bits-are-worth",
    ),
    Benchmark(
        "Quantization: cost of training",
        "quantization_cost --rounds 7",
        ["quantization_cost"],
        lambda content: [quantization_cost.table(content["models"])],
        "quantization.md#cost",
    ),
    Benchmark(
        "Mixed precision",
        "mixed_precision",
        ["mixed_precision"],
        lambda content: [mixed_precision.shown(content["results"])],
        "mixed_precision.md#measured",
    ),
    Benchmark(
        "Pruning: speed",
        "pruned_latency --rounds 5",
        ["pruned_latency"],
        lambda content: pruned_latency.tables(content["results"]),
        "filter_pruning.md#measured-speed",
    ),
    Benchmark(
        "Pruning: ResNet-56 on CIFAR-10",
        "resnet56_cifar10",
        ["resnet56_cifar10"],
        benchmark_tables.resnet56_tables,
        "filter_pruning.md#measured-resnet-56-on-cifar-10",
    ),
    Benchmark(
        "Pruning: a ranking that is searched for",
        "ranking_search --ratios 2.1 1.5 --candidates 24",
        ["ranking_search"],
        benchmark_tables.ranking_search_tables,
        "filter_pruning.md#rankings-that-are-searched-for",
    ),
    Benchmark(
        "Pruning: a budget in time",
        "latency_budget",
        ["latency_budget"],
        lambda content: [latency_budget.table(content["fp32"], content["rows"])],
        "filter_pruning.md#a-budget-in-time",
    ),
    Benchmark(
        "Pruning: what can be pruned",
        "zoo.channels",
        ["zoo_channels"],
        benchmark_tables.zoo_channels_tables,
        "filter_pruning.md#measured-what-can-be-pruned",
    ),
    Benchmark(
        "Pruning: the importance `geometric_median`",
        "geometric_median",
        ["geometric_median"],
        benchmark_tables.geometric_median_tables,
        "filter_pruning.md",
    ),
    Benchmark(
        "Magnitude sparsity: cost",
        "sparsity_cost",
        ["sparsity_cost"],
        benchmark_tables.sparsity_cost_tables,
        "magnitude_sparsity.md#cost",
    ),
    Benchmark(
        "Magnitude sparsity: beside NNCF 2.16",
        "against_nncf",
        ["against_nncf"],
        benchmark_tables.against_nncf_tables,
        "magnitude_sparsity.md#what-is-different-from-nncf-216-on-purpose",
    ),
    Benchmark(
        "Learned sparsity: beside NNCF 2.16",
        "sparsity_against_nncf",
        ["sparsity_against_nncf"],
        sparsity_against_nncf.tables,
        "learned_sparsity.md#side-by-side-with-nncf",
    ),
    Benchmark(
        "Documents of NNCF",
        "nncf_documents DIRECTORY",
        ["nncf_documents"],
        benchmark_tables.nncf_documents_tables,
        "from_nncf.md",
    ),
    *(
        Benchmark(
            f"Weight reconstruction: {net}",
            f"reconstruction --nets {net}",
            [f"reconstruction-{net}"],
            benchmark_tables.reconstruction_tables(net),
            "reconstruction.md#measured",
        )
        for net in ("resnet56", "vgg16-bn", "fashion-resnet", "digits", "vit")
    ),
    Benchmark(
        "Weight reconstruction, then training",
        "reconstruction_tuning",
        ["reconstruction_tuning"],
        lambda content: [reconstruction_tuning.table(content)],
        "reconstruction.md#measured",
    ),
    Benchmark(
        "Weight reconstruction: memory",
        "reconstruction_memory",
        ["reconstruction_memory"],
        benchmark_tables.reconstruction_memory_tables,
        "reconstruction.md",
    ),
    *(
        Benchmark(
            f"Batch-norm adaptation: {net}" + ("" if of == "training" else f", {of} statistics"),
            f"bn_adaptation --nets {net}" + ("" if of == "training" else f" --statistics {of}"),
            [bn_adaptation.file_name(net, of)],
            benchmark_tables.adaptation_tables,
            "adaptation.md#measured",
        )
        for net, of in (
            ("digits", "training"),
            ("digits", "augmented"),
            ("digits", "clean"),
            ("fashion-resnet", "training"),
            ("resnet56", "training"),
            ("vgg16-bn", "training"),
        )
    ),
    Benchmark(
        "Batch-norm adaptation: cost", "bn_cost", ["bn_cost"], benchmark_tables.bn_cost_tables, "adaptation.md#cost"
    ),
    Benchmark(
        "Batch-norm adaptation: beside NNCF 2.16",
        "bn_against_nncf",
        ["bn_against_nncf"],
        benchmark_tables.bn_against_nncf_tables,
        "adaptation.md#compared-with-nncf-216",
    ),
    Benchmark(
        "Creating a compressed model",
        "creation_cost",
        ["creation_cost"],
        lambda content: [creation_cost.table(size, cells) for size, cells in content["cells"].items()],
        "explanation/pipeline.md",
    ),
    Benchmark("Hooks", "hook_cost", ["hook_cost"], benchmark_tables.hook_cost_tables, "plugins.md"),
    Benchmark(
        "The zoo: models of practitioners",
        "zoo",
        ["zoo"],
        lambda content: zoo_table.tables(content["models"])[:2],
        "zoo.md",
    ),
)


def benchmarks_page() -> str:
    """Returns docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        "All measured figures that a file holds, with the command that measured them. Made by",
        "`python -m docs.make_benchmarks` from `benchmarks/results/*.json`; a test holds the page to them. The linked",
        "pages say what was measured how, where we lose, and what follows. Public networks and data come with",
        "`make bench-data`; NNCF needs an environment of its own, which the docstring of the script describes.",
        "Brackets hold the first and the third quartile.",
        "",
        "Three scripts print a table and keep no file: `distillation` ([figures](knowledge_distillation.md#measured)),",
        "`learned_sparsity` ([figures](learned_sparsity.md#measured)) and `calibration_order`.",
        "",
    ]
    for benchmark in BENCHMARKS:
        for name in benchmark.files:
            content = json.loads((RESULTS / f"{name}.json").read_text())
            machine = content["machine"]
            threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
            lines += [
                f"## {benchmark.title}",
                "",
                f"`python -m benchmarks.{benchmark.command}`",
                "",
                f"From `benchmarks/results/{name}.json`: torch {machine['torch']}, {threads}. Read with [its"
                f" conditions]({benchmark.page}).",
                "",
            ]
            for table in benchmark.tables(content):
                lines += [f"{table.title}:", "", *markdown(table), ""]
    return "\n".join(lines).rstrip() + "\n"


def markdown(table: Table) -> list[str]:
    """Returns the lines of a table."""
    cells = [[_cell(cell) for cell in row] for row in [table.headers, *table.rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + " --- |" * len(table.headers), *lines[1:]]


def _cell(cell: Any) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")


def choose_page() -> str:
    """Returns docs/howto/choose.md with the figures as the results have them."""
    text = CHOOSE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    return "\n".join([before + BEGIN, "", *markdown(decision_table(results)), "", END]) + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say whether the pages are up to date, and write nothing")
    options = parser.parse_args()
    made = {PAGE: benchmarks_page(), CHOOSE: choose_page()}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if options.check:
        return int(bool(stale))
    for path in stale:
        path.write_text(made[path])
    print(f"{len(made)} pages, {len(stale)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
