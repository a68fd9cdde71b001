"""`plan_compression` touches nothing, refuses what a creation refuses, and tells the same in all its forms."""

import json
import math
import sys

import pytest
import torch
from torch import nn

from compress_core import (
    CompressionError,
    DataError,
    ModelError,
    create_compressed_model,
    plan_compression,
    register_default_init_args,
)
from compress_core.testing import fingerprint
from tests.instants import Instants
from tests.plan_helpers import ALL, IMAGES, SPARSE
from tests.sections import SECTIONS, pruning, quantization, sparsity
from tests.zoo import ZOO, ResidualNet, images, trained_model

# The law: nothing is touched.


@pytest.mark.parametrize(("name", "training"), [("resnet", True), ("transformer", False)])
@pytest.mark.parametrize("sections", ALL)
def test_a_plan_touches_nothing(sections, name, training):
    model, inputs = trained_model(name), ZOO[name][1]()
    model.train(training)
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda *arguments: None)
    before = fingerprint(model)
    try:
        plan_compression(model, {"target_device": "TRIAL", "compression": ALL[sections]}, inputs)
    except CompressionError:  # a network without convolutions has nothing to prune, for example
        assert name == "transformer"
    assert fingerprint(model) == before


@pytest.mark.parametrize("number", [1, 10, 300, 3000, 20000, 60000])
def test_a_plan_that_is_interrupted_touches_nothing(number):
    model = trained_model("resnet").train()
    before = fingerprint(model)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Instants(saving=True, wanted=number, action=stop):
        plan_compression(model, {"compression": SECTIONS["all"]}, images())
    assert fingerprint(model) == before


def test_a_forward_that_counts_its_calls_leaves_no_trace():
    seen = []

    class Counting(nn.Sequential):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            seen.append(x.shape)
            return super().forward(x)

    model = Counting(nn.Linear(4, 4))
    plan_compression(model, {"compression": [quantization()]}, torch.rand(2, 4))
    assert (Counting.calls, seen) == (0, [])


def test_a_model_that_cannot_be_copied_is_refused():
    class Single(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("there is only one")

    with pytest.raises(ModelError, match=r"copy of the model.*there is only one"):
        plan_compression(Single(4, 4), SPARSE)


def test_data_that_are_given_are_not_read_but_for_an_example():
    class Loader:
        batches = 0

        def __iter__(self):
            for _ in range(100):
                Loader.batches += 1
                yield images(), torch.zeros(4)

    config = register_default_init_args({"compression": SECTIONS["all"]}, Loader())
    plan_compression(trained_model("resnet"), config)
    assert Loader.batches == 1


# Without an example input.


def test_what_needs_no_trace_is_planned_without_an_example():
    plan = plan_compression(trained_model("resnet"), SPARSE)
    assert plan.at_start.nonzero < plan.before.nonzero
    assert plan.before.figures()["operations"] is None
    assert "no example input" in plan.to_str()


@pytest.mark.parametrize("sections", [[pruning()], [quantization()], [sparsity(), quantization()]])
def test_what_needs_a_trace_is_refused_as_by_the_creation(sections):
    with pytest.raises(DataError) as planned:
        plan_compression(trained_model("resnet"), {"compression": sections})
    with pytest.raises(DataError) as made:
        create_compressed_model(trained_model("resnet"), {"compression": sections})
    assert str(planned.value) == str(made.value)


@pytest.mark.parametrize(
    "config",
    [
        {"compression": {"algorithm": "magnitude_sparsty"}},
        {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 2}},
        {"compression": {"algorithm": "magnitude_sparsity", "ignored_scopes": ["nowhere"]}},
        {"compression": {"algorithm": "magnitude_sparsity", "params": {"schedule": "multistep", "power": 2}}},
        {**IMAGES, "compression": [pruning(pruning_flops_target=0.99)]},
        {**IMAGES, "compression": [quantization(scope_overrides={"weights": {"nowhere": {"bits": 4}}})]},
        {"compression": {"algorithm": "magnitude_sparsity", "initializer": {"batchnorm_adaptation": {"method": "x"}}}},
    ],
)
def test_errors_of_the_config_are_those_of_the_creation(config):
    data = [(images(), torch.zeros(4))]
    with pytest.raises(CompressionError) as planned:
        plan_compression(trained_model("resnet"), config)
    with pytest.raises(CompressionError) as made:
        create_compressed_model(trained_model("resnet"), config, init_loader=data)
    assert (type(planned.value), str(planned.value)) == (type(made.value), str(made.value))


def test_a_compressed_model_is_refused():
    _, model = create_compressed_model(trained_model("resnet"), SPARSE)
    with pytest.raises(ModelError, match="compressed already"):
        plan_compression(model, SPARSE)


# The report.


def test_the_report_is_the_same_in_all_its_forms():
    plan = plan_compression(trained_model("resnet"), {**IMAGES, "compression": SECTIONS["all"]})
    values = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert values["before"]["parameters"] == plan.before.parameters
    assert values["at_end"]["operations"] == plan.at_end.operations
    assert [entry["name"] for entry in values["algorithms"]] == ["filter_pruning", "magnitude_sparsity", "quantization"]
    assert "compression.0.filter_pruning.pruning_init" in values["ledger"]
    total = sum(math.prod(entry["at_end"]["shape"]) for entry in values["parameters"].values())
    assert total == values["at_end"]["parameters"]
    text, complete = plan.to_str(), plan.to_str(complete=True)
    for algorithm_ in plan.algorithms:
        assert f"{algorithm_.name}: would change" in text
        for target in algorithm_.targets:
            assert target.name in complete
        for name, reason in algorithm_.skipped.items():
            assert name in complete
            assert reason.split()[0] in text
    assert str(plan) == text


def test_a_notebook_shows_the_page_or_without_jinja2_the_tables(monkeypatch):
    from compress_core.pages import page

    plan = plan_compression(trained_model("resnet"), SPARSE)
    shown = plan._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;')
    assert shown.count("<") == 2  # the page is an attribute of the frame
    page._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "<iframe" not in plan._repr_html_()
    assert "would change" in plan._repr_html_()


def test_the_page_has_a_row_for_each_parameter(tmp_path):
    plan = plan_compression(trained_model("resnet"), {**IMAGES, "compression": SECTIONS["all"]})
    plan.write_html(tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    for name, _ in trained_model("resnet").named_parameters():
        assert f">{name}</th>" in text


def test_a_plan_holds_no_model(registry):
    import gc
    import weakref

    made = []

    class Watched(ResidualNet):
        def __deepcopy__(self, memo):
            twin = ResidualNet()
            made.append(weakref.ref(twin))
            return twin

    plan = plan_compression(Watched(), SPARSE)
    gc.collect()
    assert plan
    assert made
    assert all(reference() is None for reference in made)
