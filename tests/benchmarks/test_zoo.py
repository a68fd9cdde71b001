"""The zoo's short form: models that imitate what makes models of libraries difficult, under every algorithm.

Each goes through all that a user does, and has to work or to be refused with a sentence.
"""

import functools
import json

import pytest

from benchmarks.zoo import small, table
from benchmarks.zoo.measure import ALGORITHMS, STAGES, Outcome, measure, measure_plain

ENTRIES = {entry.name: entry for entry in small.entries()}

# The model and the algorithm -> words of the errors that are right, by stage.
SENTENCES = {
    ("Detector", "filter_pruning"): {"created": "finds no channels that can be pruned"},
    ("Detector", "all three"): {"created": "finds no channels that can be pruned"},
}
# Every algorithm alone where it meets something new; all three together everywhere.
CELLS = [
    (name, algorithm)
    for name in ENTRIES
    for algorithm in ALGORITHMS
    if algorithm in {"quantization", "all three"} or name in {"Decoder", "Detector", "Recommender"}
]


@functools.cache
def plain(name):
    return measure_plain(ENTRIES[name], export=False)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    monkeypatch.setenv("COMPRESS_QUANTIZATION_KERNELS", "eager")


@pytest.mark.parametrize(("name", "algorithm"), [pytest.param(*cell, id=" ".join(cell)) for cell in CELLS])
def test_model_works_as_its_user_writes_it(name, algorithm):
    found = dict(measure(ENTRIES[name], algorithm, plain(name), export=False))
    refused = SENTENCES.get((name, algorithm), {})
    for stage, outcome in found.items():
        if stage in refused:
            assert outcome.status == "sentence", f"{stage}: {outcome}"
            assert refused[stage] in outcome.message
        else:
            assert outcome.status in {"ok", "skipped"}, f"{stage}: {outcome}"
    assert refused or list(found) == list(STAGES)


def test_lists_name_cells_that_exist():
    assert set(SENTENCES) <= set(CELLS)


def cell(**stages):
    outcome = {"figures": {}, "message": ""}
    return {"seconds": 1.0, "stages": {stage: {**outcome, "status": status} for stage, status in stages.items()}}


def test_tables_count_what_works_and_what_says_why_not(tmp_path):
    created = {"figures": {"creation_steps": 4.0}}
    good = cell(created="ok", steps="ok", exported="skipped")
    helped = cell(created="help", steps="defect")
    for one in (good, helped):
        one["stages"]["created"] |= created
    results = {
        "a": {"kind": "detection", "library": "own", "plain": {}, "quantization": good},
        "b": {"kind": "detection", "library": "own", "plain": {}, "quantization": helped},
        "c": {"kind": "audio", "library": "own", "plain": {}, "quantization": cell(created="sentence")},
    }
    by_algorithm, by_kind, sentences, defects = table.tables(json.loads(json.dumps(results)))
    row = dict(zip(by_algorithm.headers, by_algorithm.rows[0], strict=True))
    assert (row["models"], row["as written"], row["with help"]) == (3, 1, 2)
    assert (row["steps"], row["exported"]) == ("1 of 2", "0 of 0")
    assert (row["works or says why not"], row["creation, steps"]) == (2, "4.0")
    assert [found[0] for found in by_kind.rows] == ["detection", "audio"]
    assert [found[:3] for found in sentences.rows] == [("c", "quantization", "created")]
    assert [found[:3] for found in defects.rows] == [("b", "quantization", "steps")]
    document = tmp_path / "zoo.md"
    document.write_text("before\n<!-- zoo -->\nold\n<!-- end of zoo -->\nafter\n")
    table.write(document, results)
    text = document.read_text()
    assert text.startswith("before\n<!-- zoo -->") and text.endswith("<!-- end of zoo -->\nafter\n")
    assert "old" not in text and "| b" in text


def test_defects_are_told_from_sentences():
    from benchmarks.zoo.measure import WrongResultError, attempted
    from compress_core import ConfigError, PluginError

    def raising(error):
        def run():
            raise error

        return attempted(run).status

    assert raising(ConfigError("no")) == "sentence"
    assert raising(PluginError("blames our own plugin")) == "defect"
    assert raising(RuntimeError("torch's own words")) == "defect"
    assert raising(WrongResultError("differs")) == "defect"
    assert attempted(lambda: Outcome("ok")).status == "ok"
