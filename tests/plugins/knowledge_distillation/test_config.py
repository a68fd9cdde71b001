"""What a section may say, and what it may not."""

from __future__ import annotations

import pytest

from compress_core import ConfigError, TeacherArgs, check_config, create_compressed_model
from compress_core.config import CompressionConfig
from tests.plugins.knowledge_distillation.helpers import create, make, section

FEATURE = {"student": "block1"}
LINEAR = {"type": "linear", "end_epoch": 4}


def problems(**values):
    with pytest.raises(ConfigError) as raised:
        check_config({"compression": section(**values)})
    return {
        problem.path.removeprefix("compression.knowledge_distillation."): problem.message
        for problem in raised.value.problems
    }


@pytest.mark.parametrize(
    ("values", "path", "message"),
    [
        ({}, "type", "is missing: mse, softmax or cosine"),
        ({"type": "kl"}, "type", ""),
        ({"type": "mse", "temperature": 2.0}, "temperature", "2.0 is for the type softmax"),
        ({"type": "mse", "temperature": 1.0}, "temperature", "for the type softmax"),
        ({"type": "softmax", "temperature": 0.0}, "temperature", ""),
        ({"type": "mse", "scale": 0.0}, "scale", ""),
        ({"type": "mse", "scale": -1.0}, "scale", ""),
        ({"type": "mse", "class_dim": 1}, "class_dim", "for the types softmax and cosine"),
        ({"type": "mse", "ignored_scopes": ["fc"]}, "ignored_scopes", "has no scopes"),
        ({"type": "mse", "target_scopes": ["fc"]}, "target_scopes", "has no scopes"),
        ({"type": "mse", "validate_scopes": False}, "validate_scopes", "has no scopes"),
        ({"type": "mse", "initializer": {"batchnorm_adaptation": {}}}, "initializer", "changes nothing that data"),
        ({"features": [FEATURE], "scale": 2.0}, "scale", "can have no effect"),
        ({"features": [FEATURE], "outputs": {"a": "b"}}, "outputs", "can have no effect"),
        ({"features": [{**FEATURE, "channel_dim": 1}]}, "features.0.channel_dim", "for the types cosine and attention"),
        ({"features": [{**FEATURE, "typ": "mse"}]}, "features.0.typ", "type"),
        ({"features": [{"teacher": "a"}]}, "features.0.student", ""),
        ({"type": "mse", "weight_schedule": {"type": "linear"}}, "weight_schedule.end_epoch", "is missing"),
        ({"type": "mse", "weight_schedule": {"initial": 2.0}}, "weight_schedule.initial", "can have no effect"),
        ({"type": "mse", "weight_schedule": {"end_epoch": 2}}, "weight_schedule.end_epoch", "can have no effect"),
        ({"type": "mse", "weight_schedule": {**LINEAR, "start_epoch": 4}}, "weight_schedule.end_epoch", "after start"),
        ({"type": "mse", "weight_schedule": {**LINEAR, "target": 1.0}}, "weight_schedule.target", "type constant"),
    ],
)
def test_contradictions_are_refused_by_path(values, path, message):
    found = problems(**values)
    assert list(found) == [path]
    assert message in found[path]


@pytest.mark.parametrize(
    "values",
    [
        {"type": "mse"},
        {"type": "softmax", "scale": 2, "temperature": 4},
        {"type": "cosine", "class_dim": -1},
        {"features": [FEATURE]},
        {"type": "mse", "outputs": {"logits": ""}, "weight_schedule": LINEAR},
    ],
)
def test_sections_that_mean_something_are_accepted(values):
    check_config({"compression": section(**values)})


@pytest.mark.parametrize(
    ("feature", "path", "message"),
    [
        ({"student": "block3"}, "0.student.0", "Did you mean 'block"),
        ({"student": "block*.9"}, "0.student.0", "is the name of no layer"),
        ({"student": "*"}, None, ""),
        ({"student": "{re}("}, "0.student.0", "not a regular expression"),
        ({"student": ["block1", "block?"]}, "0.student.1", "matches 'block1', which an entry before it does"),
        ({"student": []}, "0.student", "names no layer"),
        ({"student": "block*", "teacher": "block1"}, "0.teacher", "each layer of the student learns from one"),
        ({"student": "block1", "teacher": "layer1"}, "0.teacher.0", "is the name of no layer"),
    ],
)
def test_layers_that_are_not_there_are_refused_by_path(feature, path, message):
    if path is None:
        create(make(), features=[feature])
        return
    with pytest.raises(ConfigError) as raised:
        create(make(), features=[feature])
    (problem,) = raised.value.problems
    assert problem.path == f"compression.0.knowledge_distillation.features.{path}"
    assert message in problem.message


def test_the_same_pair_twice_is_refused_unless_the_losses_differ():
    with pytest.raises(ConfigError, match=r"features.1: 'block1' learns from 'block1' twice in the same way"):
        create(make(), features=[FEATURE, FEATURE])
    create(make(), features=[FEATURE, {**FEATURE, "type": "attention"}])


def test_a_teacher_without_the_layer_has_to_be_told_which():
    import torch

    with pytest.raises(ConfigError, match=r"features.0.student: the teacher has no layer 'block1'; say which"):
        create(make(), teacher=torch.nn.Linear(3, 5), features=[FEATURE])


def test_patterns_stay_between_dots_and_expressions_cross_them():
    for patterns, expected in {
        ("block*",): ["block1", "block2"],
        ("block?.0", "fc"): ["block1.0", "block2.0", "fc"],
        ("block[12].[!01]",): ["block1.2", "block2.2"],
        (r"{re}^block\d\.1$",): ["block1.1", "block2.1"],
        ("fc", "block1"): ["fc", "block1"],
    }.items():
        controller, _ = create(make(), features=[{"student": list(patterns)}])
        assert controller.get_compression_state()["algorithms"]["knowledge_distillation"]["plan"]["details"] == {
            "features": [expected]
        }


def test_a_teacher_that_nobody_learns_from_is_warned_about(caplog):
    config = CompressionConfig.from_dict({"compression": {"algorithm": "magnitude_sparsity"}})
    create_compressed_model(make(), config.register_extra_structs([TeacherArgs(make(1))]))
    assert "no algorithm of this config learns from one" in caplog.text
