"""Sections are frozen in depth."""

import json

import pytest

from compress_core import (
    Section,
    create_compressed_model,
    hookimpl,
)
from compress_core.registry import use_registry
from tests.contract.algorithms import Base, fresh, net


def test_plugin_cannot_rewrite_another_section():
    class Meddling(Base):
        name = "meddling"

        @hookimpl
        def compress_configure(self, context):
            for section in context.config.sections:
                if section.algorithm == "quantization":
                    section.ignored_scopes.append("0")

    config = {"compression": [{"algorithm": "meddling"}, {"algorithm": "quantization", "ignored_scopes": ["4"]}]}
    with use_registry(fresh(Meddling)), pytest.raises(TypeError, match="a config cannot be changed") as raised:
        create_compressed_model(net(), config)
    assert any("compress_configure() of 'meddling'" in note for note in raised.value.__notes__)


def containers(value, path=""):
    if isinstance(value, Section):
        for name in type(value).model_fields:
            yield from containers(value.__dict__[name], f"{path}.{name}")
    elif isinstance(value, (list, dict)):
        yield path, value
        for key, item in enumerate(value) if isinstance(value, list) else value.items():
            yield from containers(item, f"{path}.{key}")


def test_every_container_in_a_section_is_frozen_and_still_compares_copies_and_serializes(registry):
    import copy
    import pickle

    from compress_core import CompressionConfig

    raw = {
        "algorithm": "quantization",
        "scope_overrides": {"weights": {"0": {"bits": 4}}},
        "ignored_scopes": ["a"],
        "activations": {"unified_scale_ops": [["a", "b"]]},
        "initializer": {"precision": {"bitwidth_per_scope": [[4, "0|WEIGHT"]]}, "range": [{"target_scopes": ["0"]}]},
    }
    config = CompressionConfig.from_dict({"compression": raw, "target_scopes": ["0"]})
    found = dict(containers(config.sections[0])) | dict(containers(config.root))
    assert len(found) > 10
    for path, container in found.items():
        with pytest.raises(TypeError, match="cannot be changed"):
            container.clear()
        assert pickle.loads(pickle.dumps(container)) == container == copy.deepcopy(container), path
    dumped = json.loads(config.sections[0].model_dump_json(exclude_unset=True))
    assert dumped["ignored_scopes"] == ["a"] and dumped["activations"] == {"unified_scale_ops": [["a", "b"]]}
    config.source["compression"]["algorithm"] = "other"  # a copy: what a script makes another config of
    assert config.source["compression"]["algorithm"] == "quantization"
    assert CompressionConfig.from_dict(config.source).sections == config.sections
