"""Bits that a method chooses: kept within the budget, with the state, and by all or none."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

from compress_core import (
    CompressionError,
    CompressionStage,
    ConfigError,
    DataError,
    PluginError,
    StateError,
    create_compressed_model,
    register_default_init_args,
)
from compress_core.testing import fingerprint
from compress_quantization.precision import ChosenBits, PrecisionMethod
from tests.plugins.quantization.precision.search_helpers import (
    GROUPS,
    Net,
    bits_of,
    created,
    document,
    make_net,
    pairs,
    weight_bits,
    with_method,
)

# The points of the frontier, of which each takes an evaluation, stand only where they are tested.
FOUR = {"type": "sensitivity", "budget": {"average_bits": 4}, "frontier_points": 0}
METHODS = {
    "sensitivity": FOUR,
    "sensitivity, strict": {**FOUR, "bitwidth_assignment_mode": "strict"},
    "sensitivity, operations": {**FOUR, "budget": {"bit_operations": 0.5}},
    "sensitivity, size": {**FOUR, "budget": {"file_size": 0.00035}},
    "hawq": {"type": "hawq", "iter_number": 3},
    "hawq, budget": {"type": "hawq", "iter_number": 3, "budget": {"average_bits": 4}},
    "autoq": {"type": "autoq", "iter_number": 3},
}


@functools.cache
def first(name):
    """Returns the controller and the model of a method, made once; nobody trains them."""
    return created(METHODS[name])


def state_of(name):
    return json.loads(json.dumps(first(name)[0].get_compression_state(), allow_nan=False))


def average(controller, model):
    sizes = {f"{n.removesuffix('.weight')}|WEIGHT": p.numel() for n, p in model.named_parameters()}
    bits = weight_bits(controller)
    return sum(bits[n] * sizes[n] for n in bits) / sum(sizes[n] for n in bits)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_model_is_the_same_to_the_last_bit_without_data_or_search(name, monkeypatch):
    controller, model = first(name)
    bits = weight_bits(controller)
    assert min(bits.values()) < 8
    state = state_of(name)
    again, twin = create_compressed_model(make_net(7), document(METHODS[name]), compression_state=state)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    assert weight_bits(again) == bits
    assert bits_of(again) == bits_of(controller)
    assert again.precision_report == controller.precision_report
    assert json.loads(json.dumps(again.get_compression_state())) == state
    for mode in (True, False):
        x = pairs(1)[0][0]
        assert torch.equal(model.train(mode)(x), twin.train(mode)(x))
    stripped, other = controller.strip().eval(), again.strip().eval()
    assert torch.equal(stripped(x), other(x))


@pytest.mark.parametrize("name", METHODS)
def test_generators_modes_and_flags_stay_as_they_were(name):
    model = make_net()
    model.bn.train()
    before = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(
        pairs(4, size=6), batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(5)
    )
    own = loader.generator.get_state()
    _, model = created(METHODS[name], model, loader)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(own, loader.generator.get_state())
    assert model.bn.training
    assert not model.fc.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_the_same_data_give_the_same_bits(name):
    torch.manual_seed(2)
    assert bits_of(created(METHODS[name])[0]) == bits_of(first(name)[0])


def test_the_choice_is_the_best_of_all_by_the_measured_errors():
    controller, model = created({**FOUR, "bits": [2, 3, 4, 6, 8], "frontier_points": 1})
    errors = controller.precision_report.sensitivities
    assert {frozenset(name.split(" + ")) for name in errors} == GROUPS
    sizes = {f"{n.removesuffix('.weight')}|WEIGHT": p.numel() for n, p in model.named_parameters()}
    costs = {name: sum(sizes[part] for part in name.split(" + ")) for name in errors}
    best = min(
        (
            (sum(errors[n][b] for n, b in zip(errors, bits, strict=True)), bits)
            for bits in itertools.product([2, 3, 4, 6, 8], repeat=len(errors))
            if sum(costs[n] * b for n, b in zip(errors, bits, strict=True)) <= 4 * sum(costs.values())
        ),
    )
    chosen = weight_bits(controller)
    assert [chosen[name.split(" + ")[0]] for name in errors] == list(best[1])
    assert average(controller, model) <= 4
    (point,) = [p for p in controller.precision_report.points if p.chosen]
    assert point.used == pytest.approx(average(controller, model))


def test_errors_are_those_of_the_quantizer_alone():
    controller, _ = created({**FOUR, "output_error": "squared", "num_data_points": 24})
    errors, data = controller.precision_report.sensitivities, torch.cat([x for x, _ in pairs()])
    plain = make_net()
    quantizer = controller.all_quantizations["fc|WEIGHT"]
    for bits, expected in errors["fc|WEIGHT"].items():
        changed = make_net()
        step = changed.fc.weight.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        low = -(2 ** (bits - 1)) + (bits == 8)
        with torch.no_grad():
            changed.fc.weight.copy_((changed.fc.weight / step).round().clamp(low, 2 ** (bits - 1) - 1) * step)
            reference, found = plain(data).double(), changed(data).double()
        by_hand = float((found - reference).square().sum() / reference.square().sum())
        if quantizer.shape == (5, 1):
            assert expected == pytest.approx(by_hand, rel=1e-3)


def test_weights_that_read_one_activation_have_the_same_bits():
    for budget in (2.5, 5.0):
        bits = weight_bits(created({**FOUR, "budget": {"average_bits": budget}})[0])
        assert bits["left|WEIGHT"] == bits["right|WEIGHT"]


def test_in_the_strict_mode_activations_have_the_bits_of_their_weights():
    bits = bits_of(first("sensitivity, strict")[0])
    assert bits["model/input 0|OUTPUT"] == bits["stem|WEIGHT"]
    shared = [name for name in bits if "relu#0" in name]
    assert bits[shared[0]] == bits["left|WEIGHT"] == bits["right|WEIGHT"]


def test_in_the_liberal_mode_activations_keep_their_bits():
    bits = bits_of(first("sensitivity")[0])
    assert {number for name, number in bits.items() if not name.endswith("|WEIGHT")} == {8}


@pytest.mark.parametrize(("budget", "unit"), [({"bit_operations": 0.4}, 0.4), ({"file_size": 0.00035}, 0.00035)])
def test_other_budgets_are_kept(budget, unit):
    controller, model = created({**FOUR, "budget": budget, "frontier_points": 1})
    (point,) = [p for p in controller.precision_report.points if p.chosen]
    assert point.used <= unit
    bits = bits_of(controller)
    if "bit_operations" in budget:
        # stem: 4x4 positions of 6x3x3x3 elements; left and right: 4x4 of 4x6; fc: one of 5x4.
        work = {"stem|WEIGHT": 16 * 162, "left|WEIGHT": 16 * 24, "right|WEIGHT": 16 * 24, "fc|WEIGHT": 20}
        used = sum(bits[name] * 8 * macs for name, macs in work.items()) / (64 * sum(work.values()))
    else:
        sizes = {
            f"{n}|WEIGHT": m.weight.numel() for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
        }
        packed = sum(bits[name] * size for name, size in sizes.items())
        rest = sum(8 * t.numel() * t.element_size() for n, t in model.state_dict().items() if not _is_stored_weight(n))
        used = (packed + rest) / 8e6
    assert point.used == pytest.approx(used, rel=1e-6)


BESIDE = {
    "magnitude_sparsity": {"sparsity_init": 0.5},
    "rb_sparsity": {},
    "const_sparsity": {},
    "movement_sparsity": {
        "params": {"warmup_start_epoch": 1, "warmup_end_epoch": 2, "importance_regularization_factor": 0.1}
    },
}


@pytest.mark.parametrize("other", BESIDE)
def test_the_size_of_the_file_is_that_of_the_stripped_model(other):
    """Masks and scores go with `strip`, and buffers that are not saved are in no file."""
    model = make_net()
    model.register_buffer("cache", torch.zeros(1000), persistent=False)
    section = document({**FOUR, "budget": {"file_size": 0.00035}, "frontier_points": 1})
    section["compression"] = [{"algorithm": other, **BESIDE[other]}, section["compression"]]
    controller, model = create_compressed_model(model, section, init_loader=pairs())
    (point,) = [p for p in controller.precision_report.points if p.chosen]
    bits = weight_bits(controller)
    masked = ("mask", "scores", "threshold", "moment")
    state = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[2] not in masked}
    rest = sum(8 * t.numel() * t.element_size() for n, t in state.items() if not _is_stored_weight(n))
    packed = sum(bits[f"{n.removesuffix('.weight')}|WEIGHT"] * state[n].numel() for n in state if _is_stored_weight(n))
    assert point.used == pytest.approx((packed + rest) / 8e6, rel=1e-12)


def _is_stored_weight(name):
    return name in ("stem.weight", "left.weight", "right.weight", "fc.weight")


@pytest.mark.parametrize("kind", ["sensitivity", "hawq", "autoq"])
def test_bits_of_the_device_bound_the_choice(kind):
    precision = {**METHODS[kind], "bits": [2, 3, 4, 8]} if kind != "autoq" else METHODS[kind]
    precision = precision | ({"budget": {"average_bits": 5}} if kind == "sensitivity" else {})
    bits = weight_bits(created(precision, device="NPU")[0])
    assert set(bits.values()) <= ({4, 8} if kind == "hawq" else {2, 4, 8})


def test_bits_that_the_config_gives_are_not_chosen():
    precision = {**FOUR, "budget": {"average_bits": 6.5}}
    chosen = bits_of(created(precision, scope_overrides={"weights": {"stem": {"bits": 7}}})[0])
    assert chosen["stem|WEIGHT"] == 7
    assert min(chosen["fc|WEIGHT"], chosen["left|WEIGHT"]) < 7


WRONG = [
    ({"type": "sensitivity"}, "precision.budget", "is required"),
    ({**FOUR, "budget": {}}, "budget", "exactly one"),
    ({**FOUR, "budget": {"average_bits": 4, "file_size": 1}}, "budget", "exactly one"),
    ({**FOUR, "budget": {"average_bits": 1.5}}, "budget.average_bits", "between 2 and 8"),
    ({**FOUR, "budget": {"file_size": 0.0001}}, "budget.file_size", "cannot be kept"),
    ({**FOUR, "budget": {"bit_operations": 0.01}}, "budget.bit_operations", "cannot be kept"),
    ({**FOUR, "tolerance": 0.1}, "precision.tolerance", "no effect"),
    ({**FOUR, "bitwidth_per_scope": [[4, "fc|WEIGHT"]]}, "bitwidth_per_scope", "no effect"),
    ({**FOUR, "dump_path": "x"}, "dump_path", "no effect without"),
    ({**FOUR, "params": {"a": 1}}, "params", "no effect"),
    ({**FOUR, "sensitivities_path": "nowhere.json"}, "sensitivities_path", "holds no measured errors"),
    ({"type": "hawq", "compression_ratio": 9}, "compression_ratio", "ratios from 1 to 4"),
    ({"type": "hawq", "compression_ratio": 0.5}, "compression_ratio", "ratios from 1 to 4"),
    ({"type": "hawq", "budget": {"average_bits": 1}, "iter_number": 2}, "budget.average_bits", "from 2 to 8"),
    ({"type": "hawq", "compression_ratio": 2, "budget": {"average_bits": 4}}, "budget", "remove one"),
    ({"type": "hawq", "iter_number": 0}, "iter_number", "computes no trace"),
    ({"type": "hawq", "traces_per_layer_path": "nowhere.npy"}, "traces_per_layer_path", "holds no traces"),
    ({"type": "hawq", "eval_subset_ratio": 0.5}, "eval_subset_ratio", "no effect"),
    ({"type": "autoq", "compression_ratio": 0.05}, "compression_ratio", "between 0.0625 and 0.25"),
    ({"type": "autoq", "compression_ratio": 0.5}, "compression_ratio", "0.25"),
    ({"type": "sensitivty"}, "precision.type", "sensitivity"),
]


@pytest.mark.parametrize(("precision", "place", "text"), WRONG, ids=[f"{w[1]}-{i}" for i, w in enumerate(WRONG)])
def test_what_is_wrong_is_named_and_the_model_stays(precision, place, text):
    model = make_net()
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=text) as caught:
        created(precision, model)
    assert any(place in problem.path for problem in caught.value.problems)
    assert fingerprint(model) == before


def test_a_device_with_one_number_of_bits_leaves_nothing_to_choose():
    with pytest.raises(ConfigError, match=r"nothing to choose: target_device CPU offers \[8\]"):
        created(FOUR, device="CPU")


@pytest.mark.parametrize("precision", [{"type": "hawq", "bits": [4, 8], "tolerance": 0.5}, {"type": "autoq"}])
def test_documents_of_nncf_for_such_a_device_leave_eight_bits_with_a_warning(precision, caplog):
    with caplog.at_level(logging.WARNING):
        controller, _ = created(precision, device="CPU")
    assert set(weight_bits(controller).values()) == {8}
    assert f"{precision['type']} has nothing to choose: target_device CPU" in caplog.text
    resumed, _ = create_compressed_model(
        make_net(), document(precision, device="CPU"), compression_state=controller.get_compression_state()
    )
    assert weight_bits(resumed) == weight_bits(controller)


def test_where_all_bits_are_given_there_is_nothing_to_choose():
    with pytest.raises(ConfigError, match="each weight can have one number of bits only"):
        created(FOUR, weights={"bits": 4})


@pytest.mark.parametrize("precision", [FOUR, {"type": "manual", "bitwidth_per_scope": [[4, "fc|WEIGHT"]]}])
def test_frozen_layers_are_refused_by_name(precision):
    model = make_net()
    model.fc.requires_grad_(False)
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=r"frozen \(requires_grad is False\).*: fc.weight\."):
        created(precision, model)
    assert fingerprint(model) == before
    if precision is FOUR:
        controller, _ = created({**precision, "bits": [4, 8]}, model, ignored_scopes=["fc"])
        assert "fc|WEIGHT" not in bits_of(controller)


def test_without_data_the_remedy_is_named():
    with pytest.raises(DataError, match="register_default_init_args"):
        create_compressed_model(make_net(), document(FOUR))


def test_an_output_without_floats_cannot_be_measured():
    class Labels(Net):
        def forward(self, x):
            return super().forward(x).argmax(1)

    with pytest.raises(CompressionError, match="no floating-point tensor"):
        created(FOUR, Labels())


def test_kl_needs_classes():
    class Scalar(Net):
        def forward(self, x):
            return super().forward(x).mean(1)

    with pytest.raises(DataError, match="'kl' compares scores of classes"):
        created({**FOUR, "output_error": "kl"}, Scalar())
    assert created(FOUR, Scalar())[0].precision_report.error.startswith("mean square")


@pytest.mark.parametrize("name", METHODS)
def test_a_failing_forward_leaves_the_model_as_it_was(name):
    model = make_net()

    calls = {"left": 40}

    def hook(module, inputs):
        calls["left"] -= 1
        if calls["left"] == 0:
            raise RuntimeError("out of luck")

    handle = model.fc.register_forward_pre_hook(hook)
    before = fingerprint(model)
    failed = False
    for left in (4, 6, 9):
        calls["left"] = left
        try:
            created(METHODS[name], model)
        except (CompressionError, RuntimeError):
            failed = True
            assert fingerprint(model) == before
        else:
            model = make_net()
            handle = model.fc.register_forward_pre_hook(hook)
            before = fingerprint(model)
    assert failed
    handle.remove()


# Hawq.


def test_hawq_uses_the_criterion_and_its_target():
    seen = []

    def criterion_fn(outputs, target, criterion):
        seen.append(target.shape)
        return criterion(outputs, target)

    config = register_default_init_args(
        document(METHODS["hawq"]), pairs(), criterion=nn.CrossEntropyLoss(), criterion_fn=criterion_fn
    )
    controller, _ = create_compressed_model(make_net(), config)
    assert seen
    assert len(set(weight_bits(controller).values())) > 1
    effect = controller.ledger["compression.quantization.initializer.precision.iter_number"].effect
    assert effect == "3 random vectors"


def test_a_batch_without_a_target_is_refused_if_there_is_a_criterion():
    config = register_default_init_args(
        document(METHODS["hawq"]), [x for x, _ in pairs()], criterion=nn.CrossEntropyLoss()
    )
    with pytest.raises(DataError, match="register no criterion"):
        create_compressed_model(make_net(), config)


@pytest.mark.parametrize("kind", ["npy", "json", "names", "pt"])
def test_traces_are_read_from_files_without_executing_them(kind, tmp_path):
    path = tmp_path / f"traces.{'json' if kind in ('json', 'names') else kind}"
    names = ["stem|WEIGHT", "left|WEIGHT", "right|WEIGHT", "fc|WEIGHT"]
    values = [5.0, 0.1, 0.1, 9.0]
    if kind == "npy":
        np.save(path, np.array(values))
    elif kind == "pt":
        torch.save(torch.tensor(values), path)
    else:
        path.write_text(json.dumps(values if kind == "json" else dict(zip(names, values, strict=True))))
    bits = weight_bits(created({"type": "hawq", "traces_per_layer_path": str(path)})[0])
    assert bits["left|WEIGHT"] <= bits["stem|WEIGHT"] <= bits["fc|WEIGHT"]


def test_a_pickled_object_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (__import__("pathlib").Path.touch, (tmp_path / "executed",))

    path = tmp_path / "traces.pt"
    torch.save(Evil(), path)
    with pytest.raises(ConfigError, match="traces_per_layer_path"):
        created({"type": "hawq", "traces_per_layer_path": str(path)})
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 2.0, 3.0, float("nan")], {"fc|WEIGHT": 1.0}, ["a"] * 4])
def test_traces_that_do_not_fit_are_refused(values, tmp_path):
    path = tmp_path / "traces.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="traces_per_layer_path"):
        created({"type": "hawq", "traces_per_layer_path": str(path)})


def test_the_order_of_traces_decides_and_bits_do_not_fall_along_it(tmp_path):
    for values in ([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]):
        path = tmp_path / "traces.json"
        path.write_text(json.dumps(values))
        chosen = {"type": "hawq", "traces_per_layer_path": str(path), "budget": {"average_bits": 5}}
        bits = list(weight_bits(created(chosen)[0]).values())
        ordered = [bits[i] for i in np.argsort(values)]
        assert ordered == sorted(ordered)


def test_strict_without_a_solution_is_an_error_and_not_eight_bits():
    precision = {"type": "hawq", "iter_number": 2, "bitwidth_assignment_mode": "strict", "bits": [4, 8]}
    with pytest.raises(ConfigError, match="the mode is strict"):
        created(precision, activations={"bits": 6})


# Autoq.


def test_autoq_uses_the_metric_on_a_part_of_the_loader():
    calls = []

    def metric(model, loader):
        calls.append(len(list(loader)))
        return float(sum((model(x).argmax(1) == y).sum() for x, y in loader))

    precision = {"type": "autoq", "iter_number": 4, "eval_subset_ratio": 0.5}
    config = register_default_init_args(document(precision), pairs(), val_loader=pairs(4), autoq_eval_fn=metric)
    controller, _ = create_compressed_model(make_net(), config)
    assert set(calls) == {2}
    ledger = controller.ledger
    assert "without an agent" in ledger["compression.quantization.initializer.precision.type"].effect
    assert "evaluations of swaps" in ledger["compression.quantization.initializer.precision.iter_number"].effect


def test_a_metric_that_does_not_tell_bits_apart_leaves_as_many_as_the_ratio_allows():
    config = register_default_init_args(document({"type": "autoq"}), pairs(), autoq_eval_fn=lambda model, loader: 1.0)
    controller, model = create_compressed_model(make_net(), config)
    assert 0.11 < average(controller, model) / 32 <= 0.15


def test_among_equal_losses_none_gets_two_bits_for_the_sake_of_others():
    """All layers have as many weights: 2, 4 and 8 bits would be more bits in sum, and far worse than 4 bits for all."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    section = {**document({"type": "autoq"}), "input_info": {"sample_size": [1, 6]}}
    loader = [(torch.randn(8, 6), torch.zeros(8))]
    config = register_default_init_args(section, loader, autoq_eval_fn=lambda model, loader: 1.0)
    controller, _ = create_compressed_model(model, config)
    assert set(weight_bits(controller).values()) == {4}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_refused(value):
    config = register_default_init_args(document({"type": "autoq"}), pairs(), autoq_eval_fn=lambda model, loader: value)
    with pytest.raises(DataError, match="autoq_eval_fn must return a finite number for the unquantized model"):
        create_compressed_model(make_net(), config)


def test_swaps_are_kept_only_if_the_metric_is_better():
    target = {"stem|WEIGHT": 2, "left|WEIGHT": 8, "right|WEIGHT": 8, "fc|WEIGHT": 8}
    controllers = []

    def metric(model, loader):
        found = {m.label: m.bits for m in model.modules() if hasattr(m, "label") and m.label.endswith("|WEIGHT")}
        on = all(m.enabled for m in model.modules() if hasattr(m, "label"))
        return -sum(abs(found[n] - target[n]) for n in target) if on else 0.0

    for evaluations in (0, 8):
        precision = {"type": "autoq", "iter_number": evaluations, "bits": [2, 3, 4, 5, 6, 8]}
        config = register_default_init_args(document(precision), pairs(), autoq_eval_fn=metric)
        controllers.append(create_compressed_model(make_net(), config)[0])
    far, near = (sum(abs(weight_bits(c)[n] - b) for n, b in target.items()) for c in controllers)
    assert near <= far


def test_keys_that_mean_nothing_here_are_warned_about(caplog):
    precision = {"type": "autoq", "warmup_iter_number": 5, "eval_subset_ratio": 0.2, "dump_init_precision_data": True}
    with caplog.at_level(logging.WARNING):
        created(precision)
    for key in ("warmup_iter_number", "eval_subset_ratio", "dump_init_precision_data"):
        assert f"{key}: has no effect" in caplog.text


# Files, pictures, other packages, states.


@pytest.mark.parametrize("kind", ["sensitivity", "hawq", "autoq"])
def test_data_are_written_into_the_named_folder_only(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a" / "dump"
    created({**METHODS[kind], "dump_init_precision_data": True, "dump_path": str(folder)})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    found = json.loads((folder / "bits.json").read_text())
    assert "fc|WEIGHT" in found


def test_measured_errors_serve_another_budget(tmp_path):
    measured = {**FOUR, "dump_init_precision_data": True, "dump_path": str(tmp_path)}
    first, _ = created(measured)
    path = {"sensitivities_path": str(tmp_path / "precision.json"), "frontier_points": 0}
    again, _ = created({**FOUR, **path})
    assert bits_of(again) == bits_of(first)
    six, _ = created({**FOUR, **path, "budget": {"average_bits": 6}})
    expected, _ = created({**FOUR, "budget": {"average_bits": 6}})
    assert bits_of(six) == bits_of(expected)
    with pytest.raises(ConfigError, match="has no error of"):
        created({**FOUR, **path}, ignored_scopes=["left"])


def test_the_report_is_a_table_and_a_picture(tmp_path):
    controller, _ = created({**FOUR, "frontier_points": 4})
    text = controller.statistics().to_str()
    assert "predicted error" in text
    assert "chosen" in text
    report = controller.precision_report
    assert [p.used for p in report.points] == sorted(p.used for p in report.points)
    predicted = [p.predicted for p in report.points]
    assert predicted == sorted(predicted, reverse=True)
    pytest.importorskip("matplotlib")
    report.draw(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000


def test_a_method_of_another_package_is_a_type():
    def choose(search):
        low = int(search.config.params["low"])
        first = search.weights[0]
        return ChosenBits({w.name: low if w is first else 8 for w in search.weights}, {"params": "as asked"})

    precision = {"type": "first-first", "params": {"low": 3}}
    with with_method(PrecisionMethod(choose, ("params",))):
        controller, _ = created(precision)
        assert weight_bits(controller) == {"stem|WEIGHT": 3, "left|WEIGHT": 8, "right|WEIGHT": 8, "fc|WEIGHT": 8}
        state = json.loads(json.dumps(controller.get_compression_state()))
        again, _ = create_compressed_model(make_net(3), document(precision), compression_state=state)
        assert weight_bits(again) == weight_bits(controller)
        with pytest.raises(ConfigError, match="budget: has no effect with the type 'first-first'"):
            created({**precision, "budget": {"average_bits": 4}})


def test_bits_that_cannot_be_are_refused():
    method = PrecisionMethod(lambda search: ChosenBits({"fc|WEIGHT": 9}))
    with with_method(method), pytest.raises(PluginError, match=r"chosen 9 bits for 'fc\|WEIGHT'"):
        created({"type": "first-first"})


def test_what_is_no_method_is_refused_when_it_is_loaded():
    with pytest.raises(PluginError, match="must be a PrecisionMethod"):
        with_method(lambda search: None)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("quantizers", "fc|WEIGHT", "bits"), 9),
        (("quantizers", "fc|WEIGHT", "bits"), "4"),
        (
            ("quantizers", "nowhere|WEIGHT"),
            {"bits": 4, "narrow_range": False, "half_range": False, "smallest_scale": 0.0},
        ),
        (("report", "points"), [{"budget": 1}]),
        (("kind",), "other"),
    ],
)
def test_a_damaged_state_is_named(place, value):
    state = state_of("sensitivity")
    entry = state["algorithms"]["quantization"]["state"]["precision"]
    for key in place[:-1]:
        entry = entry[key]
    entry[place[-1]] = value
    with pytest.raises(StateError, match=r"state\.precision"):
        create_compressed_model(make_net(), document(FOUR), compression_state=state)


def test_training_and_copies_keep_the_bits():
    controller, model = created(FOUR)
    bits = weight_bits(controller)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for x, y in pairs(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert weight_bits(controller) == bits
    twin = copy.deepcopy(model)
    x = pairs(1)[0][0]
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_with_stages_the_bits_hold_when_the_quantizers_are_turned_on():
    controller, _ = created(FOUR, params={"weights_quant_start_epoch": 1, "activations_quant_start_epoch": 0})
    quantizer = controller.all_quantizations["fc|WEIGHT"]
    assert not quantizer.enabled
    bits = bits_of(controller)
    controller.scheduler.epoch_step()
    controller.scheduler.epoch_step()
    assert quantizer.enabled
    assert bits_of(controller) == bits


@pytest.mark.parametrize("kind", ["sensitivity", "hawq", "autoq"])
@pytest.mark.parametrize("group", ["weights", "activations"])
def test_stages_that_begin_later_do_not_change_the_choice(kind, group):
    """Quantizers that are still off are measured as they will be: off, they would have no error with any bits."""
    precision = {"sensitivity": FOUR, "hawq": METHODS["hawq"], "autoq": METHODS["autoq"]}[kind]
    plain, _ = created(precision)
    other = "activations" if group == "weights" else "weights"
    params = {f"{group}_quant_start_epoch": 2, f"{other}_quant_start_epoch": 0}
    staged, _ = created(precision, params=params)
    assert weight_bits(staged) == weight_bits(plain)
    assert staged.compression_stage() == CompressionStage.PARTIALLY_COMPRESSED
