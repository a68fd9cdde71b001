"""Patterns of scopes: they match as Python's do, in linear time, and what could take forever is refused."""

import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_core import ConfigError, create_compressed_model
from compress_core.config.patterns import compile_pattern

NAMES = [
    "",
    "a",
    "layer1.0.conv1",
    "Net/Sequential[layer1]/NNCFConv2d[conv1]/conv2d_0",
    "aaab",
    "x y\tz_9",
    "fc|WEIGHT",
]


@pytest.mark.parametrize(
    "pattern",
    [
        "conv", "^layer\\d+\\.", "conv\\d$", "(a|b)+$", "(a|aa)*b", "[^/]*conv", ".*layer.*conv.*", "\\bconv", "\\Bonv1\\b",
        "a{2,3}b", "a{0,2}?b", "(?:x|) y", "\\s\\w_\\D?9\\Z", "[\\d_]+$", "()*", "(a*)*$", "^$", "[\\]\\[]", "\\|W", "\\A[a-c]{3}",
        "^(?!.*conv1)", "(?i)CONV", "(.)\\1", "(?=l)layer", "[^\\W\\d]{4}", "^.{4}$", "(?P<n>a)b",
    ],
)  # fmt: skip
def test_matches_as_python_does(pattern):
    found = compile_pattern(pattern)
    assert [found(name) for name in NAMES] == [re.search(pattern, name) is not None for name in NAMES]


PIECES = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", "[^a]", "\\w", "^", "$", "\\b", ""]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
    ),
    max_leaves=6,
)


@given(PIECES, st.text("ab .", max_size=6))
def test_random_patterns_match_as_python_does(pattern, name):
    assert compile_pattern(pattern)(name) == (re.search(pattern, name) is not None)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)+$", "(a|aa)+$", "(.*)*b$", ".*.*.*.*.*.*x", "(a?){40}a{40}$"])
def test_work_grows_linearly_with_the_name(pattern, monkeypatch):
    found = compile_pattern(pattern)
    matcher, visited = found.__self__, [0]
    reached = matcher._reached

    def counted(starts, name, position):
        result = reached(starts, name, position)
        visited[0] += len(result)
        return result

    monkeypatch.setattr(matcher, "_reached", counted)
    work = []
    for length in (500, 1000):
        visited[0] = 0
        assert found("a" * length + "!") is False
        work.append(visited[0])
    assert work[1] < 2.1 * work[0]


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        ("(?i)(a+)+$", "could take forever"),
        ("(?=x)(a|bc)*$", "could take forever"),
        ("(.)\\1.*.*.*.*.*x", "could take forever"),
        ("((a{1,99}){1,99}){1,99}", "may not repeat so much"),
        ("(" * 900 + "a" + ")" * 900, "nested too deeply"),
        ("(" * 51 + "a" + ")" * 51, "nested too deeply"),
        ("a" * 3000, "at most 2000 characters"),
        ("a{99999999999999}", "is not a regular expression"),
        ("(", "is not a regular expression"),
    ],
)
def test_refused_with_the_path(pattern, part):
    section = {"algorithm": "magnitude_sparsity", "ignored_scopes": ["{re}" + pattern]}
    with pytest.raises(ConfigError, match=rf"ignored_scopes\.0: .*{part}"):
        create_compressed_model(torch.nn.Linear(2, 2), {"compression": section})


@pytest.mark.parametrize("limit", [1000, 20_000])
def test_the_limit_of_nesting_does_not_depend_on_what_has_been_imported(limit):
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        with pytest.raises(ValueError, match="nested too deeply"):
            compile_pattern("(" * 900 + "a" + ")" * 900)
        assert compile_pattern("(" * 50 + "a" + ")" * 50)("a")
        assert compile_pattern("(\\(|[(\\](]|[](])" * 60)("(" * 60)
    finally:
        sys.setrecursionlimit(before)
