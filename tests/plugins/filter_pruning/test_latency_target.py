"""Measured time as a budget. Most tests run on a machine whose clock counts operations, so that every law is exact."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from compress_core import CompressionStage, ConfigError, StateError, create_compressed_model
from compress_filter_pruning import latency, latency_budget, latency_samples
from compress_filter_pruning.latency_model import LatencyModel, Part, fitted
from compress_filter_pruning.statistics import LatencyCheck
from tests.integration.processes import as_rank, run_in_processes
from tests.plugins.filter_pruning.pruning_helpers import Chain, config, evaluated, gone, pruned, seen, twin

WIDTHS = (16, 24, 16)


@pytest.fixture
def flops(monkeypatch):
    """A machine whose clock counts floating point operations."""
    with Operations() as counter:
        set_clock(monkeypatch, lambda _: lambda: counter.total)
        yield counter


class Operations(TorchDispatchMode):
    """Counts two for each multiply-accumulate of convolutions and products of matrices."""

    total = 0.0
    overhead = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.total += self.overhead
        if func is torch.ops.aten.convolution.default:
            self.total += 2 * found.numel() * args[1][0].numel()
        elif func is torch.ops.aten.addmm.default:
            self.total += 2 * found.numel() * args[1].shape[1]
        return found


def set_clock(monkeypatch, clock):
    for module in (latency, latency_samples, latency_budget):
        monkeypatch.setattr(module, "clock", clock)


@pytest.mark.parametrize("all_weights", [False, True])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_where_time_is_operations_the_budget_is_that_of_operations(flops, target, all_weights):
    plain = seen(Chain(WIDTHS))
    timed, _ = pruned(twin(plain), target, pruning_latency_target=target, all_weights=all_weights)
    counted, _ = pruned(twin(plain), target, pruning_flops_target=target, all_weights=all_weights)
    assert gone(timed) == gone(counted)
    assert timed.compression_rate == pytest.approx(counted.flops_pruning_level, abs=1e-6)
    assert timed.maximal_compression_rate == pytest.approx(counted.maximal_compression_rate, abs=1e-6)
    assert timed.target_pruning_level == target
    assert timed.compression_stage() == CompressionStage.FULLY_COMPRESSED
    timed.strip()
    figures = timed.statistics().filter_pruning
    for check in (figures.planned_latency, figures.stripped_latency):
        assert check.measured == pytest.approx(check.predicted, abs=1e-6)
        assert check.measured >= target
    assert "level set last (of time)" in timed.statistics().to_str()
    assert json.loads(json.dumps(figures.to_dict()))["stripped_latency"] == figures.stripped_latency.to_dict()


def test_model_and_random_numbers_are_as_before_the_measurements(flops):
    torch.manual_seed(3)
    plain = seen(Chain(WIDTHS))
    before, wanted, state = copy.deepcopy(plain.state_dict()), evaluated(plain), torch.get_rng_state()
    plain.train()
    _, model = pruned(plain, 0.0, pruning_latency_target=0.4)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)
    assert torch.equal(evaluated(model), wanted)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("wrong", [0.6, 1.6])
def test_wrong_model_is_corrected_where_the_target_is(flops, monkeypatch, wrong):
    """Times of layers that add up to something else than the time of the network, as on real machines."""
    true = latency_samples.fitted_model

    def distorted(model, plan):
        found = true(model, plan)
        constant = Part(np.zeros(1), np.zeros((1, len(plan.groups))), np.array([found.of(found.full), 0.0, 0.0]))
        return LatencyModel((*found.parts, constant), found.full) if wrong < 1 else slow_in_one(found)

    def slow_in_one(found):
        last = found.parts[0]
        return LatencyModel((*found.parts, Part(last.fixed, last.slopes, last.times * 4)), found.full)

    monkeypatch.setattr(latency_budget, "fitted_model", distorted)
    controller, _ = pruned(seen(Chain(WIDTHS)), 0.5, pruning_latency_target=0.5, all_weights=True)
    check = controller.statistics().filter_pruning.planned_latency
    assert abs(check.measured - check.predicted) < 0.01
    assert 0.49 < check.measured < 0.6
    assert controller.flops_pruning_level == pytest.approx(check.measured, abs=1e-6)


@pytest.mark.parametrize("do_copy", [True, False])
def test_stripped_model_that_is_slower_than_predicted_is_a_warning(flops, caplog, do_copy):
    controller, _ = pruned(seen(Chain(WIDTHS)), 0.5, pruning_latency_target=0.5)
    flops.overhead = 1e5  # another machine, on which small layers cost as much as large ones
    with caplog.at_level(logging.WARNING):
        controller.strip(do_copy=do_copy)
    assert "measured, the stripped model takes" in caplog.text
    if do_copy:
        check = controller.statistics().filter_pruning.stripped_latency
        assert abs(check.measured - check.predicted) > 0.05


@pytest.mark.parametrize("search", [False, True])
def test_resumed_run_measures_nothing_and_prunes_the_same(flops, monkeypatch, search):
    params = {"pruning_latency_target": 0.5, "pruning_steps": 3, "all_weights": True if not search else None}
    if search:
        params |= {"interlayer_ranking_type": "adapted_ranking"}
        params |= {"adapted_params": {"candidates": 3, "population_size": 2, "calibration_samples": 8}}
    plain, data = seen(Chain(WIDTHS)), [torch.randn(8, 3, 8, 8) for _ in range(2)]
    first, model = create_compressed_model(twin(plain), config(0.0, **params), init_loader=data)
    first.scheduler.epoch_step()
    state = json.loads(json.dumps(first.get_compression_state()))
    weights = copy.deepcopy(model.state_dict())

    def refused(*_):
        raise AssertionError("measured again")

    set_clock(monkeypatch, refused)
    second, other = create_compressed_model(twin(plain), config(0.0, **params), compression_state=state)
    other.load_state_dict(weights)
    for _ in range(3):
        assert gone(second) == gone(first)
        assert second.compression_rate == first.compression_rate
        first.scheduler.epoch_step()
        second.scheduler.epoch_step()
    assert second.compression_stage() == CompressionStage.FULLY_COMPRESSED
    assert second.statistics().filter_pruning.planned_latency == first.statistics().filter_pruning.planned_latency


def test_state_without_measurements_is_refused(flops):
    plain = seen(Chain(WIDTHS))
    state = pruned(twin(plain), 0.2, pruning_flops_target=0.5)[0].get_compression_state()
    with pytest.raises(
        StateError, match=r"plan.details.latency: there is none, and the target is pruning_latency_targ"
    ):
        create_compressed_model(twin(plain), config(0.2, pruning_latency_target=0.5), compression_state=state)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda d: d["parts"][0]["times"].append(1.0), "parts.0.times"),
        (lambda d: d["parts"][0]["times"].__setitem__(0, -1.0), "parts.0.times"),
        (lambda d: d["parts"][0]["times"].__setitem__(0, float("nan")), "parts.0.times"),
        (lambda d: d["parts"][0]["factors"][0]["slopes"].__setitem__("9", 1.0), "parts.0"),
        (lambda d: d.__setitem__("groups", 2), "groups"),
        (lambda d: d.__setitem__("parts", []), "parts"),
        (lambda d: d["anchors"].append([0.1]), "anchors"),
        (lambda d: [p.__setitem__("times", [0.0] * len(p["times"])) for p in d["parts"]], "parts"),
    ],
)
def test_damaged_measurements_are_refused_with_their_place(flops, change, path):
    plain = seen(Chain(WIDTHS))
    state = pruned(twin(plain), 0.2, pruning_latency_target=0.5)[0].get_compression_state()
    state = json.loads(json.dumps(state))
    change(state["algorithms"]["filter_pruning"]["plan"]["details"]["latency"])
    with pytest.raises(StateError, match=rf"plan\.details\.latency\.{path}"):
        create_compressed_model(twin(plain), config(0.2, pruning_latency_target=0.5), compression_state=state)


def test_targets_exclude_one_another_and_what_cannot_be_reached_is_refused(flops):
    with pytest.raises(
        ConfigError, match=r"params\.pruning_latency_target: is given together with pruning_flops_target"
    ):
        pruned(seen(Chain()), 0.0, pruning_latency_target=0.5, pruning_flops_target=0.4)
    with pytest.raises(ConfigError, match=r"pruning_latency_target: 0\.5 is below pruning_init 0\.6"):
        pruned(seen(Chain()), 0.6, pruning_latency_target=0.5)
    with pytest.raises(ConfigError, match=r"pruning_latency_target: .*at most 0\.\d+ of this model's measured time"):
        pruned(seen(Chain()), 0.0, pruning_latency_target=0.999, multiple_of=8)


def test_permanent_removal_keeps_counting_from_the_full_model(flops):
    controller, _ = pruned(seen(Chain(WIDTHS)), 0.3, pruning_latency_target=0.6)
    before = controller.compression_rate
    controller.shrink()
    assert controller.compression_rate == pytest.approx(before)
    controller.set_pruning_level(0.6)
    assert controller.compression_rate >= 0.6


times = st.lists(st.floats(0, 10), min_size=4, max_size=4)


@given(times, st.integers(0, 10_000))
def test_fit_finds_times_that_are_not_negative(wanted, seed):
    generator = np.random.default_rng(seed)
    factors = generator.uniform(0.1, 1, (12, 2))
    rows = np.concatenate([np.ones((12, 1)), factors, factors.prod(1, keepdims=True)], 1)
    assert rows @ fitted(rows, rows @ np.array(wanted)) == pytest.approx(rows @ np.array(wanted), abs=1e-6)
    noisy = fitted(rows, generator.normal(size=12))
    assert (noisy >= 0).all()


@settings(deadline=None)
@given(
    st.lists(times, min_size=1, max_size=3),
    st.lists(st.tuples(st.floats(0, 1), st.floats(-1, 1)), max_size=4),
    st.data(),
)
def test_fewer_channels_never_take_longer_whatever_was_measured(parts, anchors, data):
    slopes = np.array([[1 / 16, 0], [0, 1 / 8]])
    made = tuple(Part(np.zeros(2), slopes, np.array(entry) + 1e-3) for entry in parts)
    model = LatencyModel(made, (16, 8), tuple(anchors))
    more = [data.draw(st.integers(1, 16)), data.draw(st.integers(1, 8))]
    fewer = [data.draw(st.integers(1, more[0])), data.draw(st.integers(1, more[1]))]
    assert model.of(fewer) <= model.of(more) * (1 + 1e-9)
    again = LatencyModel.from_dict(json.loads(json.dumps(model.to_dict())), (16, 8))
    assert again.of(fewer) == model.of(fewer)


def test_check_survives_saving():
    model = LatencyModel(
        (Part(np.zeros(1), np.ones((1, 1)) / 4, np.ones(3)),), (4,), (), LatencyCheck(0.1, -0.2, 3.0, 1)
    )
    assert LatencyModel.from_dict(model.to_dict(), (4,)).check == model.check


def worker(rank, folder):
    with as_rank(rank, folder):
        patch = pytest.MonkeyPatch()
        torch.set_num_threads(1)
        if rank:
            set_clock(patch, lambda _: pytest.fail("the second process measures"))
        torch.manual_seed(0)
        controller, _ = pruned(seen(Chain(WIDTHS)), 0.0, pruning_latency_target=0.05, all_weights=True)
        check = controller.statistics().filter_pruning.planned_latency
        torch.save((gone(controller), controller.compression_rate, check.to_dict()), f"{folder}/rank{rank}.pt")


@pytest.mark.slow
def test_all_processes_use_what_the_first_one_measures(tmp_path):
    run_in_processes(worker, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
