"""The tables of docs/benchmarks.md, each made of a file in benchmarks/results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import bn_adaptation, nncf_documents, reconstruction, report
from benchmarks.zoo import channels
from compress_core.contract.statistics import Table

Content = dict[str, Any]


def ratio(cell: dict[str, float] | None) -> str:
    """Returns a median with its quartiles."""
    return report.quartiles(cell) if cell else ""


def grid(title: str, first: str, rows: dict[str, dict[str, Any]]) -> Table:
    """Returns a table of ratios: a row for each key, a column for each of its keys."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    return Table(
        title, (first, *columns), [(name, *(ratio(row.get(c)) for c in columns)) for name, row in rows.items()]
    )


def adaptation_tables(content: Content) -> list[Table]:
    kept = {
        case: {**found, "rows": [row for row in found["rows"] if row["samples"] in (64, 2048)]}
        for case, found in content["results"].items()
    }
    fp32 = f"FP32 {content['fp32']:.2f} %, {content['settings']['test_images']} test images"
    made = bn_adaptation.table("", kept), bn_adaptation.goals("", content["results"])
    titles = (
        f"Accuracy in %, lowest..highest mean over batch sizes; {fp32}",
        "paired with 64 samples against the others",
    )
    return [Table(title, table.headers, table.rows) for title, table in zip(titles, made, strict=True)]


def bn_cost_tables(content: Content) -> list[Table]:
    return [
        grid(
            "Pass / plain forward, CPU time of one thread, median [quartiles]", "model, 50 % sparse", content["ratios"]
        )
    ]


def bn_against_nncf_tables(content: Content) -> list[Table]:
    passes = next(iter(content["ratios"].values()))
    rows = {run: {name: found[run] for name, found in content["ratios"].items()} for run in passes}
    gaps = content["momentum"]
    keys = next(iter(gaps.values()))
    return [
        grid("Pass / plain forward of the uncompressed model, CPU time, median [quartiles]", "pass", rows),
        Table(
            "NNCF's adaptation and `momentum`, same weights and batches: largest differences",
            ("statistic", *gaps),
            [(key, *(f"{found[key]:.1e}" for found in gaps.values())) for key in keys],
        ),
    ]


def against_nncf_tables(content: Content) -> list[Table]:
    schedules = content["schedules"]
    rows = [[f"{value:.3g}" if isinstance(value, float) else value for value in row.values()] for row in schedules]
    return [
        Table("Magnitude sparsity over 9 epochs, ResNet-18-like", list(schedules[0]), rows),
        grid("Training step / plain step, CPU time, median [quartiles]", "network", content["training_steps"]),
    ]


def sparsity_cost_tables(content: Content) -> list[Table]:
    headers = ("importance", "weights", "level", "CPU s", "MB besides the model")
    keys = ("importance", "weights", "level", "cpu_seconds", "extra_peak_mb")
    rows = [[f"{row[k]:.2f}" if isinstance(row[k], float) else row[k] for k in keys] for row in content["global_level"]]
    return [
        grid(
            "Training step with masks / plain step, CPU time, median [quartiles]", "network", content["training_steps"]
        ),
        Table(f"Setting a global level on {content['millions']} million weights", headers, rows),
    ]


def resnet56_tables(content: Content) -> list[Table]:
    keys = ("FLOPs", "parameters", "pruned", "adapted", "fine-tuned")
    rows = [(f"{row['ratio']:.1f}", *(f"{row[key]:.2f}" for key in keys)) for row in content["rows"]]
    settings = content["settings"]
    tuning = f"{settings['epochs']} epoch(s) on {settings['train_images']} images"
    return [
        Table(
            f"ResNet-56 on CIFAR-10, FP32 {content['fp32']:.2f} %, fine-tuned {tuning}",
            ("asked for", "FLOPs / left", "parameters / left", "pruned, %", "adapted, %", "fine-tuned, %"),
            rows,
        )
    ]


def ranking_search_tables(content: Content) -> list[Table]:
    keys = ("FLOPs", "parameters", "accuracy", "seconds")
    rows = [(f"{row['ratio']:.1f}", row["kind"], *(f"{row[key]:.2f}" for key in keys)) for row in content["rows"]]
    headers = ("asked for", "ranking", "FLOPs / left", "parameters / left", "accuracy, %", "CPU s")
    return [Table(f"ResNet-56 on CIFAR-10, FP32 {content['fp32']:.2f} %, pruned and adapted", headers, rows)]


def geometric_median_tables(content: Content) -> list[Table]:
    rows = [
        (
            name,
            *(f"{row[key]:.3g}" for key in ("differences", "products")),
            f"{row['differences'] / row['products']:.1f}",
            f"{row['unchanged']:.3g}",
            f"{row['apart']:.0e}",
        )
        for name, row in content.items()
        if name != "machine"
    ]
    headers = ("weight", "differences, s", "products, s", "times faster", "unchanged, s", "sums differ by")
    return [Table("Sums of distances, CPU time of one thread", headers, rows)]


def reconstruction_tables(net: str) -> Callable[[Content], list[Table]]:
    def tables(content: Content) -> list[Table]:
        return [reconstruction.table(net, content, 256, all_images=False)]

    return tables


def reconstruction_memory_tables(content: Content) -> list[Table]:
    row = (
        str(content["samples"]),
        f"{content['bound_gib']:.1f}",
        f"{content['peak_gb']:.2f}",
        f"{content['forwards']:.1f}",
        f"{content['wall_seconds']:.0f}",
    )
    headers = ("samples", "bound, GiB", "peak, GB", "cost, plain forwards", "wall s")
    return [Table("ResNet-50, 224x224 pixels, 80 % sparse", headers, [row])]


def hook_cost_tables(content: Content) -> list[Table]:
    steps = [
        (name, f"{row['median']:.1f} [{row['low']:.1f}, {row['high']:.1f}]", f"{row['per_algorithm']:.1f}")
        for name, row in content["step"].items()
    ]
    creation = {name: row for name, row in content["creation"].items() if isinstance(row, dict)}
    shares = [(name, f"{row['median']:.4f} [{row['low']:.4f}, {row['high']:.4f}]") for name, row in creation.items()]
    return [
        Table(
            "Hooks of a training step, microseconds", ("hook, algorithms", "median [quartiles]", "per algorithm"), steps
        ),
        Table("Share of a creation, in %", ("part", "median [quartiles]"), shares),
        Table("Importing `compress_core` after torch", ("seconds",), [(ratio(content["import"]),)]),
    ]


def zoo_channels_tables(content: Content) -> list[Table]:
    rows = [
        channels.summary(source, [channels.Result(**found) for found in results])
        for source, results in content["networks"].items()
    ]
    headers = ("networks", "certified", "nothing to remove", "operations as counted", "median s", "most s")
    return [Table("Half of the channels removed from every group that can be pruned", headers, rows)]


def nncf_documents_tables(content: Content) -> list[Table]:
    made = nncf_documents.table(content["documents"])
    *rows, total = made.rows
    refused = [(row[0], row[-1]) for row in rows if row[-1]]
    tables = [Table(f"Of {total[0]}, how many were", made.headers[2:-1], [total[2:-1]])]
    return [*tables, Table("Refused", (made.headers[0], made.headers[-1]), refused)] if refused else tables
