"""Rankings over all groups that are searched for: what they decide, what they leave alone, what they refuse."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from compress_core import (
    ConfigError,
    DataError,
    FileError,
    LeGRInitArgs,
    PluginError,
    StateError,
    UsageError,
    check_config,
    create_compressed_model,
    register_default_init_args,
)
from compress_core.config import CompressionConfig
from compress_filter_pruning import legr
from compress_filter_pruning.adapted import AdaptedRanking
from compress_filter_pruning.evolution import Evolution, Space
from compress_filter_pruning.ranking import POINT, checked
from compress_filter_pruning.rankings import CHOICES
from compress_filter_pruning.statistics import Ranking
from tests.plugins.filter_pruning.pruning_helpers import Chain, config, evaluated, gone, inputs, seen
from tests.zoo import ResidualNet

NAMES = ("conv1", "conv2", "conv3")
LEGR = {"generations": 8, "population_size": 4, "train_steps": 2, "num_samples": 3}
ADAPTED = {"candidates": 8, "population_size": 4, "calibration_samples": 16}


class Dropping(Chain):
    """Draws random numbers in training mode."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.2, self.training))


def batches():
    return [(inputs(8, seed), torch.arange(8) % 5) for seed in range(3)]


class Functions:
    """The user's functions, which note what they get."""

    def __init__(self):
        self.models, self.optimizers, self.losses, self.starts, self.steps = [], [], [], [], []

    def train(self, loader, model, optimizer, controller, steps):
        self.starts.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.models.append(model)
        self.optimizers.append(optimizer)
        self.steps.append(steps)
        model.train()
        for number in range(steps):
            x, y = loader[number % len(loader)]
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(x), y) + controller.loss()).backward()
            optimizer.step()
            controller.scheduler.step()
        controller.scheduler.epoch_step()

    def validate(self, model, loader):
        assert not model.training
        outputs = [(model(x), y) for x, y in loader]
        loss = sum(nn.functional.cross_entropy(out, y) for out, y in outputs) / len(loader)
        self.losses.append(float(loss))
        return sum((out.argmax(1) == y).float().mean() for out, y in outputs) / len(loader), loss

    def register(self, document, **more):
        given = {"train_steps_fn": self.train, "val_loader": batches(), "validate_fn": self.validate} | more
        return register_default_init_args(document, batches(), **given)


def learned(functions=None, model=None, level=0.4, **params):
    functions = functions or Functions()
    document = config(level, **{"interlayer_ranking_type": "learned_ranking", "legr_params": LEGR} | params)
    return create_compressed_model(seen(Chain()) if model is None else model, functions.register(document))


def adapted(model=None, level=0.4, **params):
    document = config(level, **{"interlayer_ranking_type": "adapted_ranking", "adapted_params": ADAPTED} | params)
    document = register_default_init_args(document, batches())
    return create_compressed_model(seen(Chain()) if model is None else model, document)


def found(controller):
    return controller.statistics().filter_pruning.ranking


MAKE = {"learned": learned, "adapted": adapted}
KINDS = pytest.mark.parametrize("kind", ["learned", "adapted"])


def expected_channels(plain, coefficients, count):
    """Which channels go, by a plain sort over all scores."""
    scores = []
    for number, name in enumerate(NAMES):
        a, b = coefficients[f"{name}.weight"]
        norms = getattr(plain, name).weight.detach().double().flatten(1).norm(dim=1)
        scores += [(a * float(norm) + b, number, i) for i, norm in enumerate(norms)]
    lowest = sorted(scores)[:count]
    return {number: sorted(i for _, n, i in lowest if n == number) for number in range(3)}


@KINDS
def test_coefficients_decide_at_every_level(kind):
    plain = seen(Chain())
    controller, _ = MAKE[kind](model=copy.deepcopy(plain), level=0.0, pruning_target=0.4)
    ranking = found(controller)
    for level in (0.1, 0.25, 0.4):
        controller.set_pruning_level(level)
        wanted = expected_channels(plain, ranking.coefficients, round(28 * level))
        if all(len(wanted[number]) <= most for number, most in enumerate((7, 10, 7))):  # a tenth stays
            assert gone(controller) == wanted


@pytest.mark.parametrize("target", ["pruning_target", "pruning_flops_target", "pruning_parameters_target"])
def test_coefficients_from_a_file_are_used_by_every_target(tmp_path, target):
    # NNCF ignores them with pruning_target. The first layer has to go first, then the third.
    coefficients = {"conv1.weight": [1e-3, 0.0], "conv2.weight": [1.0, 9.0], "conv3.weight": [1.0, 2.0]}
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps(coefficients))
    document = config(
        0.1, interlayer_ranking_type="learned_ranking", load_ranking_coeffs_path=str(path), **{target: 0.5}
    )
    controller, _ = create_compressed_model(seen(Chain()), document)
    for level in (0.15, 0.4):
        controller.set_pruning_level(level)
        first, second, _ = (len(channels) for channels in gone(controller).values())
        assert first > 0
        assert second == 0
    assert controller.compression_rate == pytest.approx(0.4, abs=0.1)
    assert found(controller).tried == 0


def test_trained_candidates_are_whole_models_with_masks():
    plain, functions = seen(Chain()), Functions()
    before = copy.deepcopy(plain.state_dict())
    controller, model = learned(functions, plain)
    assert len(functions.models) == len(functions.losses) == 8
    assert len({id(m) for m in functions.models}) == len({id(o) for o in functions.optimizers}) == 8
    assert all(m is not plain and m is not model for m in functions.models)
    assert functions.steps == [2] * 8
    for start in functions.starts:  # each begins with the weights of the model
        assert all(torch.equal(start[name], before[name]) for name in start)
    for trial in functions.models:
        lost = sum(int((getattr(trial, n).weight.detach().flatten(1).norm(dim=1) == 0).sum()) for n in NAMES)
        assert lost == 28 * 0.5  # the target
    optimizer = functions.optimizers[0]
    values = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    assert isinstance(optimizer, torch.optim.SGD)
    assert {key: optimizer.param_groups[0][key] for key in values} == values
    ranking = found(controller)
    assert ranking.value == min(functions.losses)
    assert ranking.unweighted == functions.losses[3]  # the last of the first population is the identity
    assert (ranking.measure, ranking.tried) == ("loss", 8)


def test_an_optimizer_of_ones_own():
    made = []

    def make(parameters):
        made.append(torch.optim.Adam(parameters, 1e-3))
        return made[-1]

    functions = Functions()
    document = config(0.3, interlayer_ranking_type="learned_ranking", legr_params=LEGR)
    create_compressed_model(seen(Chain()), functions.register(document, legr_train_optimizer=make))
    assert functions.optimizers == made
    assert len(made) == 8


def global_state():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


@KINDS
def test_the_search_leaves_no_trace(kind):
    plain = seen(Dropping()).eval()
    plain.bn1.train()
    before, modes = copy.deepcopy(plain.state_dict()), [m.training for m in plain.modules()]
    torch.manual_seed(11)
    state = global_state()
    with torch.no_grad():  # as the caller likes
        controller, model = MAKE[kind](model=plain, level=0.0, pruning_target=0.4)
    after = global_state()
    assert torch.equal(state[0], after[0])
    assert state[1:] == after[1:]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    names = {name for name, _ in Dropping().named_modules()}
    assert [m.training for name, m in model.named_modules() if name in names] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert controller.pruning_level == 0


@KINDS
def test_the_same_ranking_whatever_the_global_generators_say(kind):
    plain = seen(Dropping())
    rankings = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        rankings.append(found(MAKE[kind](model=copy.deepcopy(plain))[0]))
    assert rankings[0] == rankings[1]
    section = {"learned": ("legr_params", LEGR), "adapted": ("adapted_params", ADAPTED)}[kind]
    other = MAKE[kind](model=copy.deepcopy(plain), **{section[0]: section[1] | {"random_seed": 7}})
    assert found(other[0]).coefficients != rankings[0].coefficients


@KINDS
def test_a_failure_or_an_interrupt_in_the_search_leaves_everything_as_it_was(kind):
    for error in (ValueError("mine"), KeyboardInterrupt()):
        plain, calls = seen(Dropping()), []
        before, state = copy.deepcopy(plain.state_dict()), global_state()

        def failing(model, loader, calls=calls, error=error):
            calls.append(torch.rand(()))
            if len(calls) == 3:
                raise error
            return 0.5, 1.0

        ranking = f"{kind}_ranking"
        document = config(0.4, interlayer_ranking_type=ranking)
        config_ = Functions().register(document, validate_fn=failing)
        with pytest.raises(type(error)):
            create_compressed_model(plain, config_)
        assert plain.state_dict().keys() == before.keys()
        assert all(torch.equal(plain.state_dict()[name], value) for name, value in before.items())
        assert torch.equal(global_state()[0], state[0])
        create_compressed_model(plain, config(0.4))


@KINDS
def test_resuming_searches_nothing_and_goes_on_to_the_bit(kind):
    plain = seen(Chain())
    controller, model = MAKE[kind](model=copy.deepcopy(plain), level=0.2, pruning_target=0.6, pruning_steps=4)
    state = json.loads(json.dumps(controller.get_compression_state()))
    section = {"interlayer_ranking_type": f"{kind}_ranking", "pruning_target": 0.6, "pruning_steps": 4}
    resumed, again = create_compressed_model(seen(Chain()), config(0.2, **section), compression_state=state)
    again.load_state_dict(model.state_dict())
    assert found(resumed) == found(controller)
    for _ in range(4):
        for each in (controller, resumed):
            each.scheduler.epoch_step()
        assert gone(resumed) == gone(controller)
    assert torch.equal(evaluated(model), evaluated(again))
    states = [each.get_compression_state()["algorithms"]["filter_pruning"]["state"] for each in (resumed, controller)]
    assert states[0] == states[1]
    twin = copy.deepcopy(resumed)
    assert found(twin) == found(resumed)
    controller.shrink()
    controller.set_pruning_level(0.65)
    later, _ = create_compressed_model(
        seen(Chain()),
        config(0.2, **section),
        compression_state=json.loads(json.dumps(controller.get_compression_state())),
    )
    assert found(later) == found(controller)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: None, "ranking: there is none"),
        (lambda r: {**r, "coefficients": {}}, "ranking.coefficients: there are none for"),
        (lambda r: {**r, "coefficients": {**r["coefficients"], "conv9.weight": [1.0, 0.0]}}, "conv9"),
        (lambda r: {**r, "coefficients": {**r["coefficients"], "conv1.weight": [1.0]}}, "conv1.weight"),
        (lambda r: {**r, "coefficients": {**r["coefficients"], "conv1.weight": [1.0, "x"]}}, "conv1.weight"),
        (lambda r: {**r, "coefficients": {**r["coefficients"], "conv1.weight": [1e200, 0.0]}}, "conv1.weight"),
        (lambda r: {**r, "tried": -1}, "tried"),
    ],
)
def test_damaged_states_are_refused(change, message):
    controller, _ = adapted()
    state = json.loads(json.dumps(controller.get_compression_state()))
    own = state["algorithms"]["filter_pruning"]["state"]
    own["ranking"] = change(own["ranking"])
    document = config(0.4, interlayer_ranking_type="adapted_ranking", adapted_params=ADAPTED)
    with pytest.raises(StateError, match=message):
        create_compressed_model(seen(Chain()), document, compression_state=state)


@KINDS
def test_coefficients_are_written_and_read(kind, tmp_path):
    plain, path = seen(Chain()), tmp_path / "ranking.json"
    controller, _ = MAKE[kind](model=copy.deepcopy(plain), save_ranking_coeffs_path=str(path))
    document = config(0.4, interlayer_ranking_type=f"{kind}_ranking", load_ranking_coeffs_path=str(path))
    again, _ = create_compressed_model(copy.deepcopy(plain), document)
    assert found(again).coefficients == found(controller).coefficients
    assert gone(again) == gone(controller)


GOOD = {f"{name}.weight": [1.0, 0.0] for name in NAMES}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[1, 2]", "not an object"),
        ("[" * 100_000, "not JSON"),
        ('{"conv1.weight": [1, 0], "conv1.weight": [2, 0]}', "twice"),
        (json.dumps({"Net/NNCFConv2d[conv1]/conv2d_0": [1, 0]}), r"none for \['conv1.weight'"),
        (json.dumps(GOOD | {"linear.weight": [1, 0]}), r"'linear.weight'.* make no channels"),
        (json.dumps(GOOD | {"conv2.weight": [1, 0, 0]}), "'conv2.weight' needs two finite numbers"),
        (json.dumps(GOOD | {"conv2.weight": [True, 0]}), "'conv2.weight' needs two finite numbers"),
        (json.dumps(GOOD | {"conv2.weight": [math.nan, 0]}), "'conv2.weight' needs two finite numbers"),
        (json.dumps(GOOD | {"conv2.weight": [1, math.inf]}), "'conv2.weight' needs two finite numbers"),
        (json.dumps(GOOD)[:-1] + ', "conv2.weight2": [' + "9" * 400 + ", 0]}", "conv2.weight2"),
        (json.dumps(GOOD | {"conv2.weight": None}), "'conv2.weight' needs two finite numbers"),
        (" " * (1 << 24) + "{}", "larger than 16 MB"),
    ],
)
def test_files_that_hold_no_ranking_are_refused(tmp_path, content, message):
    path = tmp_path / "ranking.json"
    path.write_text(content)
    document = config(0.4, interlayer_ranking_type="learned_ranking", load_ranking_coeffs_path=str(path))
    with pytest.raises(ConfigError, match=message) as caught:
        create_compressed_model(seen(Chain()), document)
    assert "filter_pruning.params.load_ranking_coeffs_path" in str(caught.value)
    assert "save_ranking_coeffs_path" in str(caught.value)


def test_paths_that_do_not_work(tmp_path):
    missing = str(tmp_path / "no" / "ranking.json")
    document = config(0.4, interlayer_ranking_type="learned_ranking", load_ranking_coeffs_path=missing)
    with pytest.raises(FileError, match=r"ranking\.json"):
        create_compressed_model(seen(Chain()), document)
    for path in (missing, str(tmp_path), "a\0b"):
        functions = Functions()
        with pytest.raises(ConfigError, match="save_ranking_coeffs_path"):
            learned(functions, save_ranking_coeffs_path=path)
        assert not functions.losses  # before the search


def test_nothing_is_registered():
    document = config(0.4, interlayer_ranking_type="learned_ranking")
    with pytest.raises(DataError, match=r"train_steps_fn, val_loader, validate_fn is missing.*adapted_ranking"):
        create_compressed_model(seen(Chain()), document)
    with pytest.raises(DataError, match="train_steps_fn is missing"):
        create_compressed_model(seen(Chain()), Functions().register(document, train_steps_fn=None))
    document = config(0.4, interlayer_ranking_type="adapted_ranking")
    with pytest.raises(DataError, match="interlayer_ranking_type: needs calibration data"):
        create_compressed_model(seen(Chain()), document)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_steps_fn": print}, "train_steps_fn: .*validate_fn and val_loader is missing"),
        ({"validate_fn": print}, "validate_fn: .*val_loader is missing"),
        ({"val_loader": []}, "val_loader: .*validate_fn is missing"),
        ({"legr_train_optimizer": print, "validate_fn": print, "val_loader": []}, "without train_steps_fn"),
        ({"train_steps_fn": 3, "validate_fn": print, "val_loader": []}, "train_steps_fn: must be a function, got int"),
    ],
)
def test_functions_without_one_another(given, message):
    loaded = CompressionConfig.load(config(0.4))
    with pytest.raises(UsageError, match=message):
        register_default_init_args(loaded, batches(), **given)
    assert loaded.extra_structs() == []
    assert loaded.get_extra_struct(LeGRInitArgs) is None


@pytest.mark.parametrize("result", [None, 0.5, (1, 2, 3), ("a", 1), [torch.ones(2), 1]])
def test_what_validate_fn_has_to_return(result):
    functions = Functions()
    functions.validate = lambda model, loader: result
    with pytest.raises(DataError, match=r"validate_fn\(model, loader\) must return two numbers"):
        learned(functions)


def test_candidates_that_diverge_lose_and_if_all_do_it_is_said():
    functions, results = Functions(), iter([math.nan, math.inf, 3.0, math.nan] + [math.nan] * 4)
    functions.validate = lambda model, loader: (0.0, next(results))
    controller, _ = learned(functions)
    assert found(controller).value == 3.0
    assert found(controller).unweighted is None
    json.dumps(controller.get_compression_state(), allow_nan=False)
    functions.validate = lambda model, loader: (0.0, math.nan)
    with pytest.raises(DataError, match="none of 8 candidates has a finite result"):
        learned(functions)


def refused(message, **params):
    with pytest.raises(ConfigError, match=message):
        check_config(config(0.0, **params))


@pytest.mark.parametrize("kind", ["learned_ranking", "adapted_ranking"])
def test_what_contradicts_a_search(kind):
    refused("params.all_weights: is false", interlayer_ranking_type=kind, all_weights=False)
    refused("params.filter_importance", interlayer_ranking_type=kind, filter_importance="reconstruction")
    other = {"learned_ranking": "adapted_params", "adapted_ranking": "legr_params"}[kind]
    refused(f"params.{other}", interlayer_ranking_type=kind, **{other: {}})
    refused(f"params.{other}", interlayer_ranking_type=kind, **{other: {"random_seed": 1}})
    own = {"learned_ranking": "legr_params", "adapted_ranking": "adapted_params"}[kind]
    refused(f"params.{own}", interlayer_ranking_type=kind, load_ranking_coeffs_path="a", **{own: {"random_seed": 1}})
    for path in ("save_ranking_coeffs_path", "load_ranking_coeffs_path"):
        refused(f"params.{path}", **{path: "a"})
    check_config(config(0.0, interlayer_ranking_type=kind, all_weights=True, **{own: {"random_seed": 1}}))


def test_a_search_for_nothing_and_a_level_that_cannot_be_reached():
    with pytest.raises(ConfigError, match="the target is 0"):
        learned(level=0.0, pruning_target=0.0)
    with pytest.raises(ConfigError, match=r"legr_params.max_pruning: 0\.99.* cannot be reached: at most"):
        learned(level=0.0, pruning_flops_target=0.2, legr_params={**LEGR, "max_pruning": 0.99})


def test_level_of_the_search():
    functions = Functions()
    controller, _ = learned(functions, level=0.0, pruning_target=0.3, legr_params={**LEGR, "max_pruning": 0.6})
    for trial in functions.models:
        lost = sum(int((getattr(trial, n).weight.detach().flatten(1).norm(dim=1) == 0).sum()) for n in NAMES)
        assert lost == pytest.approx(28 * 0.6, abs=1)
    assert controller.target_pruning_level == 0.3


@pytest.mark.parametrize("kind", ["learned_ranking", "adapted_ranking"])
def test_defaults_of_a_search_are_those_of_nncf(tmp_path, kind):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD))
    params = {"interlayer_ranking_type": kind, "load_ranking_coeffs_path": str(path)}
    document = {
        "input_info": {"sample_size": [1, 3, 8, 8]},
        "compression": {"algorithm": "filter_pruning", "params": params},
    }
    controller, _ = create_compressed_model(seen(Chain((16, 32, 16))), document)
    assert controller.pruned_module_groups == {0: ["conv1"], 1: ["conv2"], 2: ["conv3"]}


# Adapted candidates.


def test_the_error_is_that_of_the_adapted_model():
    plain = seen(Chain()).double()
    x = inputs(8, 3).double()
    params = {"adapted_params": {**ADAPTED, "calibration_samples": 8}, "pruning_target": 0.4}
    document, data = config(0.4, interlayer_ranking_type="adapted_ranking", **params), [(x, 0)]
    controller, model = create_compressed_model(copy.deepcopy(plain), register_default_init_args(document, data))
    trial = copy.deepcopy(model)
    with torch.no_grad():
        wanted = plain.eval()(x)
        for name in ("bn1", "bn2"):
            layer, kept = trial.get_submodule(name), {}
            handle = layer.register_forward_pre_hook(lambda m, args, kept=kept: kept.update(x=args[0]))
            trial.eval()(x)
            handle.remove()
            layer.running_mean.copy_(kept["x"].mean((0, 2, 3)))
            layer.running_var.copy_(kept["x"].var((0, 2, 3), correction=0))
        error = float((trial.eval()(x) - wanted).square().sum() / wanted.square().sum())
    assert found(controller).value == pytest.approx(error, rel=1e-9)
    assert found(controller).value <= found(controller).unweighted


def test_the_ranking_is_never_worse_than_the_unweighted_one_on_the_data():
    for seed in range(3):
        torch.manual_seed(seed)
        ranking = found(adapted(seen(Chain()))[0])
        assert ranking.measure == "error"
        assert 0 < ranking.value <= ranking.unweighted


@pytest.mark.parametrize("target", ["pruning_target", "pruning_flops_target", "pruning_parameters_target"])
@pytest.mark.parametrize("model", [Chain, ResidualNet])
def test_one_of_the_candidates_is_the_same_level_in_each_group(target, model, monkeypatch):
    plain = seen(model(), inputs())

    def search(self, request):
        return Ranking(dict(request.uniform(dict.fromkeys(request.weights, (2.0, 7.0)), 0.5)))

    monkeypatch.setattr(AdaptedRanking, "search", search)
    controller, _ = adapted(copy.deepcopy(plain), 0.5, **{target: 0.5})
    uniform, _ = create_compressed_model(copy.deepcopy(plain), config(0.5, **{target: 0.5}))
    # The last channels of a level may stay, where the budget is reached without them.
    spared = {n: set(channels) - set(gone(controller)[n]) for n, channels in gone(uniform).items()}
    assert all(set(channels) <= set(gone(uniform)[number]) for number, channels in gone(controller).items())
    assert sum(map(len, spared.values())) <= (0 if target == "pruning_target" else len(spared))
    assert controller.compression_rate >= 0.5 - 1e-9


def test_accuracy_decides_if_it_is_registered():
    functions, given = Functions(), iter([0.1, 0.2, 0.9, 0.3, 0.2, 0.1, 0.4, 0.5])
    functions.validate = lambda model, loader: (next(given), -1.0)
    document = config(0.4, interlayer_ranking_type="adapted_ranking", adapted_params=ADAPTED)
    controller, _ = create_compressed_model(seen(Chain()), functions.register(document, train_steps_fn=None))
    ranking = found(controller)
    assert (ranking.measure, ranking.value, ranking.unweighted, ranking.tried) == ("accuracy", 0.9, 0.1, 8)


def test_a_model_without_batch_norm():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.linear = nn.Linear(8, 5)

        def forward(self, x):
            return self.linear(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))

    controller, _ = adapted(Plain())
    assert controller.pruning_level == pytest.approx(6 / 16)


def test_outputs_that_cannot_be_compared():
    class Choosing(Chain):
        def forward(self, x):
            return super().forward(x).argmax(1)

    with pytest.raises(DataError, match=r"returns no floating point tensor.*validate_fn"):
        adapted(seen(Choosing()))

    class Detecting(Chain):
        def forward(self, x):
            out = super().forward(x)
            return out[out > out.detach().mean()] if not self.training else out

    with pytest.raises(DataError, match=r"other shapes.*validate_fn"):
        adapted(seen(Detecting()))


# The search itself.


def space(count=3, sigma=1.0):
    names = [f"w{i}" for i in range(count)]
    return Space(dict.fromkeys(names, (1.0, 0.0)), dict.fromkeys(names, 0.5), sigma)


def tried(evolution, reward, fixed=None):
    candidates = []

    def noted(candidate):
        candidates.append(dict(candidate))
        return reward(candidate)

    return evolution.run(noted, fixed or {}, "place"), candidates


def closeness(candidate):
    return -sum((math.log(a) - i) ** 2 + (b - i) ** 2 for i, (a, b) in enumerate(candidate.values()))


def test_random_candidates_all_differ_and_children_differ_in_few_weights():
    # NNCF seeds its generator again for each: all random candidates are the same one.
    result, candidates = tried(Evolution(space(12), 60, 20, 4, 0.25, 42), closeness, {19: space(12).centre})
    first = {str(c) for c in candidates[:20]}
    assert len(first) == 20
    assert candidates[19] == space(12).centre
    for number, child in enumerate(candidates[20:], 20):
        parents = candidates[number - 20 : number]  # the oldest one dies
        assert min(sum(child[n] != parent[n] for n in child) for parent in parents) == 3
    assert result.reward == max(result.rewards)
    assert closeness(result.best) == result.reward


def test_a_child_is_never_a_copy():
    _, candidates = tried(Evolution(space(3), 30, 5, 3, 0.1, 0), closeness)
    assert len({str(c) for c in candidates}) == 30


def test_seeds():
    runs = [tried(Evolution(space(), 30, 8, 4, 0.5, seed), closeness)[1] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_the_search_finds_what_it_is_to_find():
    result, _ = tried(Evolution(space(4, 0.7), 600, 32, 8, 0.3, 3), closeness)
    rewards = result.rewards
    assert np.mean(rewards[-50:]) > np.mean(rewards[:32])
    assert result.reward > max(rewards[:32]) / 4  # rewards are negative distances


def test_distributions_are_those_of_the_paper():
    drawn = [space(1, 0.8).drawn(np.random.default_rng(seed))["w0"] for seed in range(2000)]
    logs, shifts = np.log([a for a, _ in drawn]), np.array([b for _, b in drawn])
    assert abs(logs.mean()) < 0.08
    assert logs.std() == pytest.approx(0.8, rel=0.06)
    assert abs(shifts.mean()) < 0.05
    assert shifts.std() == pytest.approx(0.5, rel=0.06)


# Choices of others.


def test_choices_are_checked():
    assert [choice.name for choice in CHOICES] == ["unweighted_ranking", "learned_ranking", "adapted_ranking"]
    assert all(POINT.check(choice.value) is None for choice in CHOICES)
    assert "search(request)" in str(POINT.check(abs))
    good = Ranking({"a": (1.0, 0.0)})
    assert checked(good, "mine", ["a"]) is good
    with pytest.raises(PluginError, match="'mine' returned dict"):
        checked({"a": (1.0, 0.0)}, "mine", ["a"])
    with pytest.raises(PluginError, match="none for \\['b'\\]"):
        checked(good, "mine", ["a", "b"])
    with pytest.raises(PluginError, match="two finite numbers"):
        checked(Ranking({"a": (float("nan"), 0.0)}), "mine", ["a"])


def test_the_controller_of_a_trial_has_nothing_to_add():
    controller = legr.TrialController()
    assert controller.loss() == 0
    controller.scheduler.step(3)
    controller.scheduler.epoch_step()


@pytest.mark.parametrize("where", ["of the section", "of another section", "of the document"])
def test_candidates_keep_the_statistics_that_adaptation_leaves_alone(where):
    """Else a candidate would be judged with other statistics than the model has in the end."""
    plain, kept = seen(Chain()), []

    def validate(model, loader):
        kept.append(
            {name: torch.equal(bn.running_mean, getattr(plain, name).running_mean) for name, bn in norms(model)}
        )
        return 0.0, 1.0

    def norms(model):
        return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]

    document = config(0.4, interlayer_ranking_type="adapted_ranking", adapted_params=ADAPTED)
    section = document["compression"]
    section["initializer"] = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 8}}
    if where == "of the document":
        document["ignored_scopes"] = ["bn2"]
    elif where == "of the section":
        section["initializer"]["batchnorm_adaptation"]["ignored_scopes"] = ["bn2"]
    else:
        adaptation = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 8, "ignored_scopes": ["bn2"]}}
        document["compression"] = [section, {"algorithm": "magnitude_sparsity", "initializer": adaptation}]
    functions = {"val_loader": batches(), "validate_fn": validate}
    create_compressed_model(copy.deepcopy(plain), register_default_init_args(document, batches(), **functions))
    assert kept == [{"bn1": False, "bn2": True}] * ADAPTED["candidates"]


def test_learned_ranking_tries_the_same_level_in_each_group():
    plain, functions = seen(Chain()), Functions()
    controller, _ = learned(functions, copy.deepcopy(plain), pruning_target=0.5)
    level, _ = create_compressed_model(copy.deepcopy(plain), config(0.5, pruning_target=0.5))
    trial = functions.models[LEGR["population_size"] - 2]
    norms = {name: getattr(trial, name).weight.detach().flatten(1).norm(dim=1) for name in NAMES}
    channels = {name: (values == 0).nonzero().flatten().tolist() for name, values in norms.items()}
    assert list(channels.values()) == list(gone(level).values())
    assert found(controller).value <= functions.losses[LEGR["population_size"] - 2]
