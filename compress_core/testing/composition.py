"""The algorithm in one config with others: what each adds stays, and the whole trains, resumes and strips."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from unittest import SkipTest

import torch

from compress_core.errors import CompressionError, PluginError
from compress_core.registry import default_registry
from compress_core.session.controller import CompressionController
from compress_core.testing.case import Case, fail, require, train
from compress_core.testing.outputs import leaves, require_close, require_same, run
from compress_core.testing.tags import check
from compress_core.transforms.activation import activation_transforms
from compress_core.transforms.model_wide import transforms_by_key

# One step of 8 signed bits: what a quantized value may be off when tensors have become smaller; see `require_close`.
_STEP = 1 / 127

_PRUNING = {
    "algorithm": "filter_pruning",
    "pruning_init": 0.5,
    "params": {"pruning_target": 0.5, "prune_first_conv": True, "multiple_of": 1},
}
_QUANTIZATION = {"algorithm": "quantization"}


@check()
def check_with_filter_pruning(case: Case) -> None:
    """In one config with `filter_pruning`, which plans before and makes tensors smaller at the end."""
    _check_with(case, _PRUNING)


@check()
def check_with_quantization(case: Case) -> None:
    """In one config with `quantization`, which plans behind and computes with what the algorithm leaves of weights."""
    _check_with(case, _QUANTIZATION)


def _check_with(case: Case, section: Mapping[str, Any]) -> None:
    partner, sections = section["algorithm"], case.sections()
    if partner not in default_registry().algorithms():
        raise SkipTest(f"'{partner}' is not installed")
    if any(own["algorithm"] == partner for own in sections):
        raise SkipTest(f"'{partner}' is in the config already")
    loader = case.loader if case.loader is not None else _loader(case)
    together = case.with_sections([*sections, section], loader)
    controller = _created(case, together, partner, loader)
    model = controller.model
    for name in controller.algorithms:
        _require_present(controller, name, partner)
    train(together, controller, model, 1)
    json.dumps(controller.statistics().to_dict(), allow_nan=False)
    expected = run(model, case.inputs)
    require(
        all(bool(leaf.isfinite().all()) for leaf in leaves(expected)),
        f"with '{partner}' the model returns NaN or infinity",
        "Compute with what you are given: weights that are masked may be all zero.",
    )
    state = json.loads(json.dumps(controller.get_compression_state()))
    _, resumed = together.resumed(state)
    resumed.load_state_dict(model.state_dict(), strict=True)
    require_same(
        run(resumed, case.inputs),
        expected,
        f"a model that is resumed together with '{partner}' computes something else",
        "Use your own name as the key of transforms (key=self.name), and keep tensors in them.",
    )
    _require_strip(case, controller, expected, partner)


def _loader(case: Case) -> list[Any]:
    if len(case.inputs) != 1:
        raise SkipTest("the model takes several arguments: give the case a loader")
    return [case.inputs[0]] * 2


def _created(case: Case, together: Case, partner: str, loader: Any) -> CompressionController:
    try:
        return together.compressed()[0]
    except (CompressionError, PluginError) as error:
        section = together.sections()[-1]
        try:
            case.with_sections([section], loader).compressed()
        except CompressionError as alone:
            raise SkipTest(f"'{partner}' cannot do anything with this model: {alone}") from alone
        fail(
            f"one config with '{partner}' is refused: {error}",
            "Plan on the model as it is given to you, and keep what others have added to it.",
        )


def _require_present(controller: CompressionController, name: str, partner: str) -> None:
    model = controller.model
    keys = {key for _, key, _ in transforms_by_key(model).values()}
    keys |= {handle.key for handle in activation_transforms(model)}
    algorithm = controller.algorithms[name]
    if algorithm.changes_model and not (algorithm.changes_in_place or algorithm.replaces_modules):
        require(
            name in keys,
            f"together with '{partner}' there is no transform with the key '{name}'",
            "Use your own name as the key of transforms: key=self.name.",
        )


def _require_strip(case: Case, controller: CompressionController, expected: Any, partner: str) -> None:
    what = f"the stripped model with '{partner}'"
    remedy = (
        "Declare in your transforms' `follows` how their tensors are cut with the weight, and bake what you remove."
    )
    plain = controller.strip()
    require_close(run(plain, case.inputs), expected, 1e-4, what, remedy, rounding_step=max(_STEP, case.rounding_step))
    require(
        all(isinstance(p, torch.nn.Parameter) for p in plain.parameters()), f"{what} has no parameters any more", remedy
    )
