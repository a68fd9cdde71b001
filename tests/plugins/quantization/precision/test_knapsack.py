"""The knapsack problem against all choices, one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_quantization.precision.knapsack import Unit, cheapest, solve

OPTIONS = st.lists(
    st.tuples(st.integers(0, 12), st.one_of(st.floats(0, 10, width=32), st.sampled_from([0.0, 1.0, math.inf]))),
    min_size=1,
    max_size=4,
)
UNITS = st.lists(OPTIONS, min_size=1, max_size=5)


def by_force(units, budget):
    """The least error, and the least cost with that error, of all choices."""
    best = None
    for numbers in itertools.product(*(range(len(unit.costs)) for unit in units)):
        cost = sum(unit.costs[n] for unit, n in zip(units, numbers, strict=True))
        error = math.fsum(unit.errors[n] for unit, n in zip(units, numbers, strict=True))
        if cost <= budget and math.isfinite(error) and (best is None or (error, cost) < best):
            best = error, cost
    return best


@settings(max_examples=400, deadline=None)
@given(UNITS, st.integers(0, 50))
def test_the_choice_is_the_best_of_all(options, budget):
    units = [Unit([c for c, _ in entry], [e for _, e in entry]) for entry in options]
    expected, found = by_force(units, budget), solve(units, budget)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert sum(unit.costs[n] for unit, n in zip(units, found, strict=True)) <= budget
    error = math.fsum(unit.errors[n] for unit, n in zip(units, found, strict=True))
    assert error == pytest.approx(expected[0], rel=1e-9, abs=1e-300)


def test_a_network_of_the_size_of_resnet_152_is_solved_at_once():
    generator = np.random.default_rng(0)
    bits = np.arange(2, 9)
    sizes = generator.integers(1, 4096, 155) * 576
    units = [Unit((size * bits).tolist(), (generator.exponential() * 4.0**-bits).tolist()) for size in sizes]
    for average in (2.5, 4.0, 6.0):
        found = solve(units, int(average * sizes.sum()))
        assert found is not None
        used = sum(unit.costs[n] for unit, n in zip(units, found, strict=True)) / sizes.sum()
        assert average - 0.05 < used <= average


def test_the_cheapest_choice_leaves_out_what_must_not_be_taken():
    units = [Unit([1, 5], [math.inf, 0.0]), Unit([2], [1.0])]
    assert cheapest(units) == 7
    assert solve(units, 7) == [1, 0]
    assert solve(units, 6) is None
