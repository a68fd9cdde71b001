"""2,000 broken configs: each ends in an error that names the path, or in the ledger; none in a traceback of ours."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from torch import nn

from compress_core import CompressionError, ConfigError, create_compressed_model
from tests.soak import count

VALID = {
    "input_info": {"sample_size": [1, 3], "type": "float", "filler": "ones"},
    "target_device": "CPU",
    "ignored_scopes": ["2"],
    "compression": [
        {
            "algorithm": "magnitude_sparsity",
            "sparsity_init": 0.1,
            "ignored_scopes": ["{re}^9", "2"],
            "target_scopes": ["0", "2"],
            "validate_scopes": False,
            "initializer": {
                "batchnorm_adaptation": {"num_bn_adaptation_samples": 8, "method": "exact", "ignored_scopes": []}
            },
            "params": {
                "schedule": "polynomial",
                "sparsity_target": 0.5,
                "sparsity_target_epoch": 2,
                "sparsity_freeze_epoch": 9,
                "power": 1.0,
                "concave": True,
                "sparsity_level_setting_mode": "global",
                "weight_importance": "abs",
            },
        }
    ],
}
VALUES = [
    None,
    -1,
    0,
    1.5,
    7,
    "x",
    "",
    [],
    {},
    [None],
    True,
    1e400,
    float("nan"),
    "{re}(",
    ["9"],
    10**400,
    "exponential",
    "multistep",
]


def places(value, path=()):
    """Yields the path of every key and element."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in entries:
        yield (*path, key)
        yield from places(item, (*path, key))


def at(document, path):
    for key in path:
        document = document[key]
    return document


def misspelt(word, rng):
    i = rng.randrange(len(word))
    kind = rng.choice(["drop", "double", "swap", "replace"])
    if kind == "drop":
        return word[:i] + word[i + 1 :]
    if kind == "double":
        return word[: i + 1] + word[i:]
    if kind == "swap" and i + 1 < len(word):
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return word[:i] + rng.choice("abcxyz_") + word[i + 1 :]


def mutated(rng):
    """Returns a document with one fault, and the key that was misspelt if one was."""
    document = copy.deepcopy(VALID)
    path = rng.choice(list(places(document)))
    parent, key = at(document, path[:-1]), path[-1]
    kind = rng.choice(["misspell", "value", "value", "delete", "wrap", "duplicate", "stranger"])
    if kind == "misspell" and isinstance(key, str):
        wrong = misspelt(key, rng)
        if wrong and wrong not in parent:
            document_before = dict(parent)
            parent.clear()
            parent.update({wrong if k == key else k: v for k, v in document_before.items()})
            return document, (key, wrong)
    elif kind == "value":
        parent[key] = rng.choice(VALUES)
    elif kind == "delete":
        del parent[key]
    elif kind == "wrap":
        parent[key] = [parent[key]]
    elif kind == "duplicate" and isinstance(parent, list):
        parent.append(parent[key])
    elif isinstance(parent, dict):
        parent["stranger"] = 1
    return document, None


def given(value, path=""):
    """Yields the dotted path of every value of a section."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from given(item, f"{path}.{key}")
        elif not isinstance(item, dict):
            yield f"{path}.{key}"


@pytest.mark.soak("configs")
@pytest.mark.parametrize("seed", range(count(8, 400)))
def test_every_mutation_ends_in_an_error_with_a_path_or_in_the_ledger(seed, caplog, tried):
    rng = random.Random(seed)
    torch.manual_seed(0)
    loader = [torch.randn(8, 3)]
    accepted = 0
    for _ in range(250):
        tried.cases += 1
        document, misspelling = mutated(rng)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        shown = json.dumps(document, default=str)
        caplog.clear()
        try:
            controller, _ = create_compressed_model(model, document, init_loader=loader)
        except ConfigError as error:
            assert all(problem.path and problem.message for problem in error.problems), shown
            assert [type(module) for module in model] == [nn.Linear, nn.BatchNorm1d, nn.Linear], shown
            if misspelling:
                right, wrong = misspelling
                assert wrong in str(error), shown
                assert f"'{right}'" in str(error), (shown, str(error))
            continue
        except CompressionError as error:
            pytest.fail(f"{error!r} for {shown}")
        accepted += 1
        assert misspelling is None or misspelling[1] in caplog.text, shown
        json.dumps(controller.get_compression_state())
        sections = document.get("compression", [])
        for index, section in enumerate(sections if isinstance(sections, list) else [sections]):
            prefix = f"compression.{index}" if isinstance(sections, list) else "compression"
            for path in given(section):
                full = f"{prefix}.magnitude_sparsity{path}"
                entries = [e for e in controller.ledger if e.path == full or e.path.startswith(f"{full}.")]
                assert entries or at(section, path[1:].split(".")) == [], (full, shown)
        for _ in range(3):
            controller.scheduler.epoch_step()
            controller.scheduler.step()
    assert 0 < accepted < 250  # both kinds occur
