"""Compression states from a stranger: every damaged value is refused with its path, before anything is allocated."""

import copy
import json
import logging
import re
import tracemalloc

import pytest
import torch
from torch import nn

from compress_core import StateError, create_compressed_model, load_compressed_model
from compress_core.testing import fingerprint
from tests.soak import count

SECTIONS = {
    "magnitude_sparsity": {
        "algorithm": "magnitude_sparsity", "sparsity_init": 0.3,
        "params": {"schedule": "adaptive", "sparsity_target": 0.5, "patience": 2},
    },
    "filter_pruning": {"algorithm": "filter_pruning", "pruning_init": 0.3, "params": {"multiple_of": 2}},
    "quantization": {
        "algorithm": "quantization", "initializer": {"range": {"num_init_samples": 4}},
        "params": {"activations_quant_start_epoch": 1, "weights_quant_start_epoch": 0},
    },
}  # fmt: skip

# What no value of a state can be; each also stands for its like.
WRONG = {
    "negative": -5,
    "large": 2**40,
    "beyond printing": 10**5000,
    "nan": float("nan"),
    "half": 0.5,
    "text": "other",
    "none": None,
    "yes": True,
    "list": [],
    "long list": [0] * 100_000,
    "dict": {},
    "object": object(),
}

# Free text and records of the past: nothing is computed from them, so any value of the right type is as good.
FREE = re.compile(
    r"(plugin|distribution|version)$|\.config(\.|$)|\.skipped(\.|$)|\.initializers|certificate|\.potential\."
)

# Values that nothing else in the state contradicts, so that another one that fits is another state.
ALSO_VALID = {
    (r"state\.level$", "half"),
    (r"state\.schedule\.level$", "half"),
    (r"state\.schedule\.level$", "yes"),
    (r"state\.time$", "none"),
    (r"state\.time\.\d$", "large"),
    (r"(frozen|calibrated)(\..*)?$", "yes"),
    (r"(enabled|signed|on)\..*$", "yes"),
    (r"scheduler\.(epoch|step)$", "large"),
    (r"scheduler\.steps_per_epoch$", "large"),
    (r"scheduler\.steps_per_epoch$", "none"),
    (r"state\.(unreached|gone\.\d)$", "list"),
    (r"state\.certificate$", "none"),
    (r"operations\.terms\.\d+\.0$", "large"),
    (r"operations\.terms$", "list"),
    (r"operations\.terms\.\d+\.1$", "list"),
    (r"operations\.terms\.\d+\.1\.\d+\.0$", "large"),
    (r"operations\.terms\.\d+\.1\.\d+\.1$", "dict"),
    (r"operations\.terms\.\d+\.1\.\d+\.1\.\d+$", "large"),
    (r"groups\.\d\.step$", "large"),
    (r"inputs$", "list"),
    (r"inputs\.0\.values$", "none"),
    (r"inputs\.0\.values\.flat\.0$", "negative"),
    (r"inputs\.0\.values\.flat\.0$", "large"),
    (r"inputs\.0\.values\.flat\.0$", "half"),
    (r"inputs\.0\.values\.flat\.0$", "yes"),
    (r"inputs\.0\.path\.0$", "text"),
    (r"spec\.(logarithm_scale|half_range|narrow_range|signed)$", "yes"),
    (r"spec\.signed$", "none"),
    (r"num_init_samples$", "large"),
}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x)) + 1).mean((2, 3)))


def config(name):
    return {"compression": SECTIONS[name], "input_info": {"sample_size": [2, 3, 8, 8], "filler": "random"}}


def created(name, model=None, **keywords):
    loader = None if "compression_state" in keywords else [torch.randn(4, 3, 8, 8)]
    return create_compressed_model(model or Small(), config(name), init_loader=loader, **keywords)


@pytest.fixture(scope="module", params=SECTIONS)
def saved(request):
    controller, _ = created(request.param)
    if request.param == "filter_pruning":
        controller.shrink()
        controller.set_pruning_level(0.5)
    state = controller.get_compression_state()
    controller, _ = created(request.param, compression_state=state)
    assert controller.get_compression_state() == state
    return request.param, state


def places(value, path=()):
    """Yields the path of every value; of lists, and of dicts with names of quantizers, only the first entry."""
    if path:
        yield path
    if isinstance(value, dict):
        items = list(value.items())
        for key, entry in items[:1] if any("|" in str(key) for key in value) else items:
            yield from places(entry, (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 1)):
            yield from places(value[index], (*path, index))


def at(state, path):
    for key in path:
        state = state[key]
    return state


def changed(state, path, value):
    twin = copy.deepcopy(state)
    at(twin, path[:-1])[path[-1]] = value
    return twin


def deep(state, path, value):
    twin = json.loads(json.dumps(state))
    at(twin, path[:-1])[path[-1]] = value
    return twin


def same(a, b):
    return type(a) is type(b) and a == b


def kinds(value):
    """Returns the kinds of wrong values to try in the place of one: those that differ most from it."""
    if isinstance(value, (dict, list)):
        return ["none", "text", "long list", "dict", "list"]
    if isinstance(value, str) or value is None:
        return ["negative", "yes", "text", "object", "none"]
    return ["negative", "large", "beyond printing", "nan", "half", "text", "none", "yes"]


def complaint(load, path, prefix, *, measured):
    """Returns None if loading raises a StateError that names the path, "accepted", or what is wrong."""
    if measured:
        tracemalloc.start()
    try:
        load()
    except StateError as error:
        used = tracemalloc.get_traced_memory()[1] if measured else 0
        if used > 50 << 20:
            return f"{used >> 20} MB"
        # A value may be refused where it is missed or contradicted: in the object or list that it belongs to.
        near = [".".join(map(str, (*prefix, *path[:length]))) for length in range(max(len(path) - 4, 1), len(path) + 1)]
        return None if any(name in str(error) for name in near) else f"path not named: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        tracemalloc.stop()
    return "accepted"


# Of the several hundred values of a state, so many, evenly spread: each is tried with up to ten wrong ones. In soak, all.
PLACES = count(10, 10_000)


@pytest.mark.slow
@pytest.mark.soak("states")
def test_values_of_a_state(saved, caplog, tried):
    caplog.set_level(logging.ERROR)
    name, state = saved
    model = Small()
    before, complaints = fingerprint(model), []
    everything = list(places(state))
    for path in everything[:: max(1, len(everything) // PLACES)]:
        dotted = ".".join(map(str, path))
        for kind in kinds(at(state, path)):
            value = WRONG[kind]
            if same(at(state, path), value) or (FREE.search(f".{dotted}") and kind not in ("none", "object")):
                continue
            tried.cases += 1
            found = complaint(
                lambda path=path, value=value, model=model: created(
                    name, model, compression_state=changed(state, path, value)
                ),
                path,
                ("compression_state",),
                measured=kind in ("large", "long list"),
            )
            fits = FREE.search(f".{dotted}") or any(re.search(p, dotted) and kind == k for p, k in ALSO_VALID)
            if found == "accepted" and fits:
                model = Small()
                before = fingerprint(model)
                continue
            if found is not None:
                complaints.append(f"{dotted} = {kind}: {found}"[:300])
            if fingerprint(model) != before:
                complaints.append(f"{dotted} = {kind}: the model was changed")
                model = Small()
                before = fingerprint(model)
    tried.failed = len(complaints)
    assert not complaints, f"{len(complaints)}\n" + "\n".join(complaints)


@pytest.mark.soak("states")
def test_values_of_a_shrink_plan(tried):
    controller, model = created("filter_pruning")
    plain = controller.strip()
    plan, weights = controller.shrink_plan, plain.state_dict()
    assert load_compressed_model(Small(), weights, plan).conv2.out_channels < 8
    model, complaints = Small(), []
    before = fingerprint(model)
    everything = list(places(plan))
    for path in everything[:: max(1, len(everything) // (2 * PLACES))]:
        for kind in kinds(at(plan, path)):
            tried.cases += 1
            twin = changed(plan, path, WRONG[kind])
            found = complaint(
                lambda twin=twin: load_compressed_model(model, weights, twin), path, ("plan",), measured=False
            )
            if found is not None and not found.startswith("path not named: the "):
                complaints.append(f"{path} = {kind}: {found}")
            if fingerprint(model) != before:
                complaints.append(f"{path} = {kind}: the model was changed")
    tried.failed = len(complaints)
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("attribute", ["training", "forward", "weight", "missing", "out_channels"])
def test_a_plan_cannot_write_over_anything(attribute):
    model = Small()
    plan = {"format": 1, "tensors": {}, "attributes": {"conv2": {attribute: 9}}}
    with pytest.raises(StateError, match=rf"attributes\.conv2\.{attribute} is to become 9"):
        load_compressed_model(model, model.state_dict(), plan)


def test_depth_of_a_state():
    controller, _ = created("magnitude_sparsity")
    state = controller.get_compression_state()
    value = 1
    for _ in range(900):
        value = [value]
    for path in [path for path in places(state) if path != ("format",)]:
        with pytest.raises(StateError, match=rf"^compression_state\.{path[0]}.*nested more than 64 levels deep"):
            created("magnitude_sparsity", compression_state=deep(state, path, value))
