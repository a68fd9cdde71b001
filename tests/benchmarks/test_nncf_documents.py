"""The script for documents of NNCF: what it says of documents that run, and of one that is refused."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import nncf_documents, report

UNET = {
    "model": "unet",
    "input_info": {"sample_size": [1, 3, 368, 480]},
    "compression": [
        {
            "algorithm": "filter_pruning",
            "pruning_init": 0.25,
            "params": {"pruning_target": 0.5},
            "ignored_scopes": [
                *(
                    f"{{re}}UNet/ModuleList\\[up_path\\]/UNetUpBlock\\[{n}\\]/NNCFConvTranspose2d\\[up\\].*"
                    for n in range(4)
                ),
                *(
                    f"{{re}}UNetUpBlock\\[3\\]/UNetConvBlock\\[conv_block\\]/Sequential\\[block\\]/NNCFConv2d\\[{n}\\].*"
                    for n in (0, 3)
                ),
            ],
        }
    ],
}
AWARE = {
    "model": "icnet",
    "input_info": {"sample_size": [1, 3, 768, 960]},
    "accuracy_aware_training": {
        "mode": "early_exit",
        "params": {"maximal_relative_accuracy_degradation": 50.0, "maximal_total_epochs": 100},
    },
    "compression": {
        "algorithm": "quantization",
        "initializer": {"range": {"num_init_samples": 1000}},
        "ignored_scopes": ["ICNet/interpolate_0"],
    },
}
DOCUMENTS = {
    "a_unet": json.dumps(UNET) + " // a comment",
    "b_aware": json.dumps(AWARE),
    "c_cut": "{",
    "c_wrong": json.dumps({**UNET, "compression": {"algorithm": "filter_pruning", "pruning_init": 2}}),
}
PARTS = ("created", "trained", "resumed", "stripped")


def test_documents_run_or_say_why_not(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "documents"
    folder.mkdir()
    for name, text in DOCUMENTS.items():
        (folder / f"{name}.json").write_text(text)
    (folder / "more").mkdir()  # another document of the same name
    (folder / "more" / "c_cut.json").write_text("{")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["nncf_documents", str(folder), "--name", "found"])
    nncf_documents.main()
    text = (tmp_path / "results" / "found.json").read_text()
    rows = {row["document"]: row for row in json.loads(text)["documents"]}
    assert str(tmp_path) not in text
    for name in ("a_unet", "b_aware"):
        assert [rows[name][part] for part in PARTS] == [True] * 4, rows[name]["sentence"]
    assert not any(rows[name]["created"] for name in ("c_wrong", "c_cut", "more/c_cut"))
    assert rows["c_cut"]["sentence"] and rows["more/c_cut"]["sentence"]
    assert "pruning_init" in rows["c_wrong"]["sentence"]
    printed = capsys.readouterr().out
    assert "5 documents" in printed
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--keep", "--only", "a_"])
    monkeypatch.setattr(nncf_documents, "run", lambda *arguments: pytest.fail("it is in the results already"))
    nncf_documents.main()
    assert "5 documents" in capsys.readouterr().out
