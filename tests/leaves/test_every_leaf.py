"""Nothing in a config is ignored: another value of any leaf makes another model, is refused, or is warned about.

The leaves come from the schema. A leaf that `cases` does not know is tried with values that fit its type, in the base
document of its section; if that shows nothing, it needs an effect, or a case with a document in which it has one.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, Literal

import pytest
from pydantic import Field

from compress_core import Algorithm, AlgorithmConfig, Plan, Stage, hookimpl, mask_weight
from tests.conftest import with_built_in_plugins
from tests.leaves.cases import BASES, CASES, EVERY_OTHER_VALUE, Case
from tests.leaves.observe import TOLD, Observation, observe, observed
from tests.leaves.schema import ABSENT, Leaf, at_path, leaves_of


def built_in() -> list[Leaf]:
    return leaves_of(with_built_in_plugins())


LEAVES = built_in()


def merged(base: Any, more: Any) -> Any:
    """Returns a document with another one laid over it; what is ABSENT there goes."""
    if not isinstance(more, dict):
        return copy.deepcopy(more)
    kept = base if isinstance(base, dict) else {}
    laid = {key: merged(kept.get(key), value) for key, value in more.items() if value is not ABSENT}
    return copy.deepcopy({key: value for key, value in kept.items() if key not in more}) | laid


def document_for(leaf: Leaf, case: Case, value: Any) -> tuple[dict[str, Any], str, str]:
    """Returns the document in which the leaf has the value, its path, and that of its section."""
    name = leaf.section or case.section
    base = {key: entry for key, entry in BASES[name].items() if key not in case.without}
    document: dict[str, Any] = merged({"compression": base}, dict(case.root))
    document = merged(document, {"compression": dict(case.context)} if leaf.section else dict(case.context))
    place = document["compression"] if leaf.section else document
    prefix = f"compression.{name}." if leaf.section else ""
    return document, prefix + at_path(place, leaf.path, copy.deepcopy(value)), prefix


def problems_with(leaf: Leaf, case: Case) -> list[str]:
    """Returns what is wrong with a leaf: why it cannot be said to have an effect."""
    values = case.values or leaf.guess()
    if len(values) < 2:
        return [f"there are no two values to compare, only {values}: give it a case"]
    unknown = [value for value in leaf.literals() if value not in values]
    if unknown:
        return [f"the schema offers {unknown} too: what do they do?"]
    refused = values[1:] if case.refused is EVERY_OTHER_VALUE else case.refused
    found = []
    seen: list[tuple[Any, Observation]] = []
    for value in values:
        document, path, prefix = document_for(leaf, case, value)
        observation = observed(document, kind=case.model, data=case.data)
        if value in refused:
            found += _not_refused(observation, value, _path_of_refusal(case, path, prefix))
        elif observation.error is not None:
            found.append(f"{value!r} is refused: {observation.error}")
        else:
            seen.append((value, observation))
    for (one, first), (other, second) in itertools.combinations(seen, 2):
        found += _not_different(leaf, case, (one, first), (other, second))
    return found


def _path_of_refusal(case: Case, path: str, prefix: str) -> str:
    if not case.refused_at:
        return path
    return case.refused_at if case.refused_at.startswith("compression.") else prefix + case.refused_at


def _not_refused(observation: Observation, value: Any, path: str) -> list[str]:
    if observation.error is None:
        return [f"{value!r} is accepted and should be refused"]
    paths = [problem.path for problem in getattr(observation.error, "problems", ())] or [str(observation.error)]
    named = any(at == path or at.startswith((f"{path}.", f"{path}:")) for at in paths)
    return [] if named else [f"{value!r} is refused without '{path}': {observation.error}"]


def _mean_the_same(case, one, other):
    return (one, other) in case.same or (other, one) in case.same


def _not_different(leaf: Leaf, case: Case, one: tuple[Any, Observation], other: tuple[Any, Observation]) -> list[str]:
    what = f"{one[0]!r} and {other[0]!r}"
    shows = one[1].differences(other[1])
    if _mean_the_same(case, one[0], other[0]):
        shows -= set(TOLD)
    if case.warned or _mean_the_same(case, one[0], other[0]):
        changed = [f"{what} should mean the same and differ in {sorted(shows)}"] if shows else []
        told = [w for value, o in (one, other) if value is not ABSENT for w in _naming(leaf, o)]
        silent = case.warned and len(told) != sum(value is not ABSENT for value, _ in (one, other))
        return changed + ([f"{what}: not one warning for each names '{leaf.path[-1]}': {told}"] if silent else [])
    return [] if shows - set(TOLD) else [f"{what} make the same model: the value is ignored silently"]


def _naming(leaf: Leaf, observation: Observation) -> list[str]:
    return [warning for warning in observation.warnings if leaf.path[-1] in warning]


def parameter(leaf: Leaf) -> Any:
    case = CASES.get(str(leaf), Case())
    return pytest.param(leaf, case, id=str(leaf))


@pytest.mark.parametrize(("leaf", "case"), [parameter(leaf) for leaf in LEAVES])
def test_every_leaf_has_an_effect(leaf, case):
    if problems := problems_with(leaf, case):
        pytest.fail(f"{leaf}:\n" + "\n".join(problems), pytrace=False)


@pytest.mark.parametrize("section", BASES)
def test_the_same_document_gives_the_same_observation(section):
    more = {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 8}}}
    document = {"compression": merged(BASES[section], more if section != "knowledge_distillation" else {})}
    first, second = observe(document), observe(document)
    assert first.error is None
    assert first.differences(second) == set()


def test_no_case_is_for_a_leaf_that_is_gone():
    assert set(CASES) <= {str(leaf) for leaf in LEAVES}
    assert set(BASES) == {leaf.section for leaf in LEAVES} - {""}


class Painted(AlgorithmConfig):
    dropped: int = Field(0, ge=0, description="how many weights of each layer become zero")
    colour: str | None = Field(None, description="is read, and that is all")
    size: list[int] = Field([1], description="cannot be guessed")
    shape: Literal["round", "square"] = Field("round", description="is told and not done")


class Painting(Algorithm):
    """Masks the first weights of each layer."""

    name = "painting"
    stage = Stage.SPARSITY
    Config = Painted

    @hookimpl
    def compress_plan(self, model, algorithm, context):
        names = context.plan_weights(model, algorithm).targets
        return Plan(names, details={"shape": self.config.shape})

    @hookimpl
    def compress_commit(self, model, plan):
        _ = self.config.colour, self.config.size
        for name in plan.targets:
            mask_weight(model, name, key=self.name).mask.view(-1)[: self.config.dropped] = 0


class PaintingPlugin:
    @staticmethod
    @hookimpl
    def compress_algorithms():
        return [Painting]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dropped", ""),
        ("colour", "ignored silently"),
        ("size", "no two values"),
        ("shape", "ignored silently"),
    ],
)
def test_leaves_without_effect_are_found(registry, monkeypatch, name, words):
    registry.register(PaintingPlugin(), "painting")
    monkeypatch.setitem(BASES, "painting", {"algorithm": "painting"})
    leaf = next(leaf for leaf in leaves_of(registry) if str(leaf) == f"painting:{name}")
    found = problems_with(leaf, Case())
    assert len(found) == bool(words)
    assert all(words in problem for problem in found)
