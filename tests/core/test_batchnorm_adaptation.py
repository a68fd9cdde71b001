import copy
import json
import logging

import numpy as np
import pytest
import torch
from torch import nn

from compress_core import (
    BNAdaptationInitArgs,
    ConfigError,
    DataError,
    Stage,
    create_compressed_model,
    register_default_init_args,
)
from compress_core.testing import fingerprint
from compress_core.transforms import add_weight_transform
from tests.zoo import MobileNet, ResidualNet, images, trained


def config(samples=32, method="paired", level=0.7, **adaptation):
    section = {"num_bn_adaptation_samples": samples, "method": method, **adaptation}
    return {
        "compression": {
            "algorithm": "magnitude_sparsity",
            "sparsity_init": level,
            "params": {"sparsity_target": max(level, 0.5)},
            "initializer": {"batchnorm_adaptation": section},
        }
    }


def data(n=32, batch=8, seed=5, scale=1.0, shift=0.3):
    generator = torch.Generator().manual_seed(seed)
    return list((torch.randn(n, 3, 8, 8, generator=generator) * scale + shift).split(batch))


class OneNorm(nn.Module):
    """One batch norm: what it sees does not depend on any other."""

    def __init__(self, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = norm or nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


def population_moments(model, batches):
    """Independent: float64 convolution of everything at once, numpy's moments."""
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        seen = twin.conv(torch.cat(batches).double()).numpy()
    return seen.mean((0, 2, 3)), seen.var((0, 2, 3))


@pytest.mark.parametrize("batch", [1, 3, 8, 32])
def test_exact_leaves_the_population_moments_of_the_compressed_model(batch):
    model = trained(OneNorm(), (images(),))
    batches = data(32, batch)
    create_compressed_model(model, config(method="exact"), init_loader=batches)
    mean, var = population_moments(model, batches)
    np.testing.assert_allclose(model.norm.running_mean, mean, rtol=1e-6, atol=1e-6 * np.sqrt(var).max())
    np.testing.assert_allclose(model.norm.running_var, var, rtol=1e-6)


def test_paired_follows_its_formula():
    model = trained(OneNorm(), (images(),))
    old_mean, old_var = model.norm.running_mean.double().numpy().copy(), model.norm.running_var.double().numpy().copy()
    batches = list(torch.cat(data(28))[:, :, :5, :4].split(7))  # 3 x 2 positions after the convolution: all are paired
    original = copy.deepcopy(model)
    create_compressed_model(model, config(), init_loader=batches)
    with torch.no_grad():
        x = torch.cat(batches).double()
        seen = [copy.deepcopy(m).double().conv(x).movedim(1, 0).flatten(1).numpy() for m in (original, model)]
    (mean_o, var_o), (mean_c, var_c) = ((s.mean(1), s.var(1)) for s in seen)
    rho = np.array([np.corrcoef(o, c)[0, 1] for o, c in zip(*seen, strict=True)])
    assert rho.min() < 0.99  # the correlation matters here
    ratio = (var_c + model.norm.eps) / (var_o + model.norm.eps)
    expected_mean = mean_c + rho * (old_mean - mean_o) * np.sqrt(ratio)
    expected_var = var_c + rho**2 * (old_var * ratio - var_c)
    np.testing.assert_allclose(model.norm.running_var, expected_var, rtol=1e-5)
    np.testing.assert_allclose(model.norm.running_mean, expected_mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["paired", "exact"])
@pytest.mark.parametrize("batch", [1, 8, 13])
def test_one_batch_norm_does_not_depend_on_the_split(method, batch):
    start, whole = trained(OneNorm(), (images(),)), torch.cat(data(48))
    results = []
    for batches in ([whole], list(whole.split(batch))):
        model = copy.deepcopy(start)
        create_compressed_model(model, config(48, method), init_loader=batches)
        results.append(model.norm)
    torch.testing.assert_close(results[0].running_var, results[1].running_var, rtol=1e-6, atol=0)
    scale = float(results[0].running_var.sqrt().max())
    torch.testing.assert_close(results[0].running_mean, results[1].running_mean, rtol=1e-6, atol=1e-6 * scale)


def test_momentum_is_what_batch_norm_does_in_training_mode():
    model = MobileNet()
    model.features[1].momentum = None  # the cumulative average
    trained(model, (images(),))
    reference = copy.deepcopy(model).eval()
    batches = data(32, 8)
    controller, _ = create_compressed_model(model, config(level=0.0, method="momentum"), init_loader=batches)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    with torch.no_grad():
        for batch in batches:
            reference(batch)
    for ours, theirs in zip(_norms(model), _norms(reference), strict=True):
        assert torch.equal(ours.running_mean, theirs.running_mean)
        assert torch.equal(ours.running_var, theirs.running_var)
        assert torch.equal(ours.num_batches_tracked, theirs.num_batches_tracked)
    assert controller.statistics().batchnorm_adaptation.report.method == "momentum"


def _norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("make", [ResidualNet, MobileNet])
@pytest.mark.parametrize("batch", [1, 5, 32])
def test_paired_changes_nothing_where_compression_changed_nothing(make, batch):
    model = trained(make(), (images(),))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    create_compressed_model(model, config(level=0.0), init_loader=data(32, batch))
    for key, value in before.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["paired", "exact", "momentum"])
def test_nothing_but_the_statistics_moves(method):
    model = trained(MobileNet(), (images(),))
    model.features[4].eval()  # frozen by the user
    model.classifier.eval()
    model.register_buffer("counter", torch.zeros(1))
    model.register_forward_pre_hook(lambda module, args: module.counter.add_(1) and None)
    before = fingerprint(model)
    create_compressed_model(model, config(level=0.0, method=method), init_loader=data())
    # Level 0 on the plain model: apart from classes and transforms, only statistics of two layers may differ.
    changed = _changed_tensors(before, fingerprint(model))
    allowed = {"running_mean", "running_var", "num_batches_tracked"}
    assert {name.rpartition(".")[2] for name in changed} <= allowed
    assert {name.rpartition(".")[0] for name in changed} <= {"features.1", "features.7"}
    if method != "paired":
        assert {name.rpartition(".")[0] for name in changed} == {"features.1", "features.7"}
    after = fingerprint(model)
    for key in ("torch rng", "python rng", "numpy rng"):
        assert after[key] == before[key]
    for name, record in before["modules"].items():
        assert after["modules"][name]["training"] == record["training"], name
        assert after["modules"][name]["hooks"] == record["hooks"], name
        simple = {k: v for k, v in after["modules"][name]["simple"].items() if k in record["simple"]}
        assert simple == record["simple"], name


def _changed_tensors(before, after):
    changed = []
    for name, record in before["modules"].items():
        for kind in ("parameters", "buffers"):
            for key, value in record[kind].items():
                if after["modules"][name][kind][key] != value:
                    changed.append(f"{name}.{key}")
    return changed


@pytest.mark.parametrize(
    ("requested", "batch", "batches", "used"),
    [
        (32, 8, 20, 32),
        (36, 8, 20, 40),
        (35, 8, 20, 32),
        (1, 8, 20, 8),
        (1000, 8, 4, 32),
        (5, 1, 20, 5),
        (12, 8, 20, 16),
    ],
)
def test_samples_are_rounded_to_whole_batches(requested, batch, batches, used):
    fetched = []

    def loader():
        for item in data(batch * batches, batch):
            fetched.append(len(item))
            yield item

    controller, _ = create_compressed_model(OneNorm(), config(requested), init_loader=loader())
    assert controller.statistics().batchnorm_adaptation.report.samples == used
    assert used <= sum(fetched) <= used + batch
    assert requested != used or sum(fetched) == used  # nothing is fetched once the number is reached


def test_uneven_batches_are_normal():
    whole = torch.cat(data(32))
    uneven = [whole[:7], whole[7:8], whole[8:30], whole[30:]]  # the last is smaller, as a DataLoader's
    results = []
    for batches in ([whole], uneven):
        torch.manual_seed(1)
        model = OneNorm()
        create_compressed_model(model, config(32, "exact"), init_loader=batches)
        results.append(model.norm.running_var.double())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


class Dicts(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = OneNorm()

    def forward(self, pixels, scale=1.0):
        return self.inner(pixels * scale)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = OneNorm()

    def forward(self, left, right):
        return self.inner(left + right)


class NNCFLoader(list):
    def get_inputs(self, item):
        return (item["image"],), {}


X = torch.cat(data(16))


@pytest.mark.parametrize(
    ("make", "loader", "forward_fn"),
    [
        (OneNorm, [X[:8], X[8:]], None),
        (OneNorm, [(X, torch.zeros(16))], None),
        (OneNorm, [[X, torch.zeros(16)]], None),
        (OneNorm, [(X,)], None),
        (OneNorm, [((X,), torch.zeros(16))], None),
        (Dicts, [{"pixels": X, "labels": torch.zeros(16)}], None),
        (Dicts, [({"pixels": X}, torch.zeros(16))], None),
        (TwoInputs, [(X, torch.zeros_like(X))], None),
        (TwoInputs, [(X, torch.zeros_like(X), torch.zeros(16))], None),
        (TwoInputs, [((X, torch.zeros_like(X)), torch.zeros(16))], None),
        (OneNorm, NNCFLoader([{"image": X}]), None),
        (TwoInputs, [{"a": X}], lambda model, batch: model(batch["a"], 0.0)),
    ],
    ids=str,
)
def test_forms_of_batches(make, loader, forward_fn):
    torch.manual_seed(1)
    model = make()
    document = register_default_init_args(config(16, "exact"), loader, forward_fn=forward_fn)
    create_compressed_model(model, document)
    inner = model if make is OneNorm else model.inner
    mean, var = population_moments(inner, [X])
    np.testing.assert_allclose(inner.norm.running_var, var, rtol=1e-6)
    np.testing.assert_allclose(inner.norm.running_mean, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "norm", [nn.SyncBatchNorm(6), type("Mine", (nn.BatchNorm2d,), {})(6)], ids=["sync", "subclass"]
)
def test_other_kinds_of_batch_norm(norm):
    model = OneNorm(norm)
    batches = data()
    create_compressed_model(model, config(method="exact"), init_loader=batches)
    _, var = population_moments(model, batches)
    np.testing.assert_allclose(model.norm.running_var, var, rtol=1e-6)


class OneDimensional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.conv, self.norm3 = nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)

    def forward(self, x):
        x = self.norm(self.fc(x))
        return self.norm3(self.conv(x.view(-1, 1, 1, 2, 2)))


@pytest.mark.parametrize("method", ["paired", "exact", "momentum"])
def test_batches_of_one_sample_with_one_position_are_legal(method):
    model = OneDimensional()
    with torch.no_grad():
        model.norm.running_mean.add_(0.1)
    create_compressed_model(model, config(16, method), init_loader=list(torch.randn(16, 1, 3)))
    assert all(norm.running_var.isfinite().all() and (norm.running_var >= 0).all() for norm in _norms(model))


def test_layer_called_twice_pools_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            self.norm(x + 5)
            return self.norm(self.fc(x))

    model, x = Twice(), torch.randn(64, 3)
    create_compressed_model(model, config(64, "exact"), init_loader=[x[:16], x[16:]])
    with torch.no_grad():
        seen = torch.cat([x + 5, model.fc(x)]).double()
    torch.testing.assert_close(model.norm.running_var.double(), seen.var(0, correction=0), rtol=1e-6, atol=0)


def test_never_trained_layer_gets_exact_moments_and_counts_its_batches():
    model, batches = OneNorm(), data(32, 8)
    create_compressed_model(model, config(), init_loader=batches)
    _, var = population_moments(model, batches)
    np.testing.assert_allclose(model.norm.running_var, var, rtol=1e-6)
    assert model.norm.num_batches_tracked == 4


def test_old_checkpoint_without_counter_is_not_taken_for_untrained():
    model = trained(OneNorm(), (images(),))
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    old = OneNorm()
    metadata = {name: {"version": 1} for name, _ in old.named_modules()}
    state = type(model.state_dict())(state)
    state._metadata = metadata
    old.load_state_dict(state)
    assert old.norm.num_batches_tracked == 0
    before = old.norm.running_var.clone()
    create_compressed_model(old, config(level=0.0), init_loader=data())
    torch.testing.assert_close(old.norm.running_var, before, rtol=1e-6, atol=0)


def test_frozen_and_ignored_layers_stay():
    for freeze in ("eval", "momentum", "root scope", "own scope"):
        model = trained(ResidualNet(), (images(),))
        document = config(method="exact")
        if freeze == "eval":
            model.bn1.eval()
        elif freeze == "momentum":
            model.bn1.momentum = 0.0
        elif freeze == "root scope":
            document["ignored_scopes"] = ["bn1", "fc"]
            document["compression"]["validate_scopes"] = False
        else:
            document["compression"]["initializer"]["batchnorm_adaptation"]["ignored_scopes"] = "bn1"
        before = copy.deepcopy(model)
        create_compressed_model(model, document, init_loader=data())
        assert torch.equal(model.bn1.running_mean, before.bn1.running_mean), freeze
        assert not torch.equal(model.bn2.running_mean, before.bn2.running_mean), freeze


def test_layer_that_is_not_reached_stays_and_is_reported():
    class Unused(OneNorm):
        def __init__(self):
            super().__init__()
            self.other = nn.BatchNorm2d(3)

    model = Unused()
    with torch.no_grad():
        model.other.running_mean.add_(1)
    controller, _ = create_compressed_model(model, config(), init_loader=data())
    layers = {layer.name: layer for layer in controller.statistics().batchnorm_adaptation.report.layers}
    assert layers["other"].values == 0
    assert torch.equal(model.other.running_mean, torch.ones(3))


@pytest.mark.parametrize("method", ["paired", "exact"])
def test_non_finite_data_is_an_error_and_undone(method):
    batches = data(32, 8)
    batches[2][0, 0, 0, 0] = float("nan")
    model = trained(OneNorm(), (images(),))
    before = fingerprint(model)
    with pytest.raises(DataError, match="batch norm 'norm' hold NaN or infinity"):
        create_compressed_model(model, config(method=method), init_loader=batches)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "gave no sample"),
        (5, "iterable of batches, such as a DataLoader, got int"),
        (["text"], "holds no tensor"),
        ([{1, 2}], "holds no tensor"),
    ],
)
def test_unusable_loaders(loader, message):
    with pytest.raises(DataError, match=message) as caught:
        create_compressed_model(OneNorm(), config(), init_loader=loader)
    assert "compression.magnitude_sparsity.initializer.batchnorm_adaptation" in str(caught.value)


def test_section_without_batch_norm_in_the_model():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=r"batchnorm_adaptation: the model has no batch norm.*remove this section"):
        create_compressed_model(model, config(), init_loader=[torch.randn(4, 3)])
    create_compressed_model(model, config(samples=0))


def test_absent_section_is_off_with_one_line_and_zero_is_off_without(caplog):
    for section, lines in (({}, 1), ({"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}, 0)):
        caplog.clear()
        model = trained(OneNorm(), (images(),))
        before = model.norm.running_mean.clone()
        document = config()
        document["compression"]["initializer"] = section
        with caplog.at_level(logging.INFO):
            create_compressed_model(model, document, init_loader=data())
        assert torch.equal(model.norm.running_mean, before)
        assert sum("no batchnorm_adaptation" in record.message for record in caplog.records) == lines


def test_empty_section_is_2000_samples():
    document = config()
    document["compression"]["initializer"] = {"batchnorm_adaptation": {}}
    controller, _ = create_compressed_model(OneNorm(), document, init_loader=data(32, 8) * 80)
    report = controller.statistics().batchnorm_adaptation.report
    assert (report.requested_samples, report.samples, report.method) == (2000, 2000, "paired")


def test_calls_of_adapt_batchnorm_do_not_add_up():
    model = trained(ResidualNet(), (images(),))
    controller, _ = create_compressed_model(model, config(), init_loader=data())
    first = model.bn2.running_var.clone()
    controller.adapt_batchnorm(data(seed=9))
    assert not torch.equal(model.bn2.running_var, first)
    report = controller.adapt_batchnorm()
    assert torch.equal(model.bn2.running_var, first)
    assert (report.method, report.samples) == ("paired", 32)
    controller.adapt_batchnorm(BNAdaptationInitArgs(data()), num_samples=8, method="exact")
    assert controller.statistics().batchnorm_adaptation.report.samples == 8


def test_adapt_batchnorm_after_training_uses_exact(caplog):
    model = trained(ResidualNet(), (images(),))
    controller, _ = create_compressed_model(model, config(), init_loader=data())
    trained(model, (images(),))
    with caplog.at_level(logging.INFO):
        assert controller.adapt_batchnorm().method == "exact"
    assert "using 'exact' for 'paired'" in caplog.text


@pytest.mark.parametrize("keywords", [{"num_samples": 0}, {"num_samples": 1.5}, {"method": "best"}, {"loader": []}])
def test_adapt_batchnorm_refuses_nonsense_and_leaves_statistics(keywords):
    model = trained(ResidualNet(), (images(),))
    controller, _ = create_compressed_model(model, config(), init_loader=data())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(DataError, match=r"adapt_batchnorm\(\)"):
        controller.adapt_batchnorm(**keywords)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_failing_adaptation_leaves_statistics():
    model = trained(ResidualNet(), (images(),))
    controller, _ = create_compressed_model(model, config(), init_loader=data())
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def loader():
        yield data()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        controller.adapt_batchnorm(loader())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_requests_of_several_algorithms_are_one_run(registry):
    from compress_core import hookimpl
    from tests.core.test_registry import algorithm, contributing

    class Scale(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    def commit(self, model):
        add_weight_transform(model, "conv.weight", Scale(), stage=Stage.PRECISION, key=self.name)

    other = algorithm(
        stage=Stage.PRECISION,
        compress_plan=hookimpl(lambda self, model, context: context.plan_weights(model, self)),
        compress_commit=hookimpl(commit),
    )
    registry.register(contributing(other), "demo")
    forwards = []
    model = trained(OneNorm(), (images(),))
    model.register_forward_hook(lambda *_: forwards.append(1))
    first = config(16)["compression"]
    second = {"algorithm": "mine", "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 24}}}
    controller, _ = create_compressed_model(model, {"compression": [second, first]}, init_loader=data(32, 8))
    assert controller.statistics().batchnorm_adaptation.report.samples == 24
    assert len(forwards) == 2 * 3  # one run: three batches, with and without transforms
    second["initializer"]["batchnorm_adaptation"]["method"] = "exact"
    with pytest.raises(ConfigError, match="adaptation runs once for all, choose one"):
        create_compressed_model(OneNorm(), {"compression": [second, first]}, init_loader=data())


def test_pairing_with_an_algorithm_that_changes_weights_in_place(registry):
    """Before and after commit give the same as bypassing: the change is the same, only the way it is made differs."""
    from compress_core import Plan, hookimpl
    from tests.core.test_registry import algorithm, contributing

    def commit(self, model):
        with torch.no_grad():
            for name in ("conv1", "conv2"):
                model.get_submodule(name).weight.mul_(0.5)

    class Scale(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    def commit_transforms(self, model):
        for name in ("conv1", "conv2"):
            add_weight_transform(model, f"{name}.weight", Scale(), stage=Stage.SPARSITY, key=self.name)

    plan = hookimpl(lambda self: Plan(("conv1.weight", "conv2.weight")))
    in_place = algorithm(name="in_place", changes_in_place=True, compress_plan=plan, compress_commit=hookimpl(commit))
    by_transform = algorithm(name="by_transform", compress_plan=plan, compress_commit=hookimpl(commit_transforms))
    registry.register(contributing(in_place, by_transform), "demo")
    results = {}
    start = trained(ResidualNet(), (images(),))
    for name in ("in_place", "by_transform"):
        model = copy.deepcopy(start)
        section = {"algorithm": name, "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 32}}}
        create_compressed_model(model, {"compression": section}, init_loader=iter(data()))
        results[name] = model
    for key in ("bn1", "bn2"):
        ours, theirs = (getattr(results[name], key) for name in ("in_place", "by_transform"))
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(ours.running_var, getattr(start, key).running_var, rtol=1e-2)


def test_shuffled_loader_is_as_before():
    dataset = torch.utils.data.TensorDataset(torch.cat(data(32)))
    for generator in (None, torch.Generator().manual_seed(3)):
        loader = torch.utils.data.DataLoader(dataset, 8, shuffle=True, generator=generator)
        state = (torch.get_rng_state(), None if generator is None else generator.get_state())
        create_compressed_model(OneNorm(), config(), init_loader=loader)
        create_compressed_model(OneNorm(), register_default_init_args(config(), loader))
        torch.manual_seed(0)
        assert generator is None or torch.equal(generator.get_state(), state[1])


def test_statistics_show_the_drift():
    model = trained(ResidualNet(), (images(),))
    old = model.bn1.running_mean.double().clone()
    scale = (model.bn1.running_var.double() + model.bn1.eps).sqrt()
    controller, _ = create_compressed_model(model, config(), init_loader=data())
    drift = controller.statistics().batchnorm_adaptation.report.layers[0]
    assert drift.name == "bn1"
    assert drift.values == 32 * 64
    assert drift.mean_shift == pytest.approx(float(((model.bn1.running_mean - old).abs() / scale).max()), rel=1e-6)
    text = controller.statistics().to_str()
    assert "Drift of the running statistics" in text


class Metric:
    """A metric that says what it is told, and behaves badly otherwise."""

    def __init__(self, *values):
        self.values = list(values)

    def __call__(self, model):
        assert not model.training
        model.train()
        torch.rand(3)
        return self.values.pop(0)


@pytest.mark.parametrize(
    ("metric", "kept"), [((0.5, 0.6), True), ((0.5, 0.5), True), ((0.6, 0.5), False), ((0.5, float("nan")), False)]
)
@pytest.mark.parametrize("registered", [True, False])
def test_guard_rolls_back_what_made_the_metric_worse(metric, kept, registered):
    model = trained(ResidualNet(), (images(),))
    before = fingerprint(model)
    evaluate = Metric(*metric)
    document = config(guard=True if registered else evaluate)
    if registered:
        document = register_default_init_args(document, data(), model_eval_fn=evaluate)
    controller, _ = create_compressed_model(model, document, init_loader=None if registered else data())
    changed = {name.rpartition(".")[2] for name in _changed_tensors(before, fingerprint(model))}
    assert changed == ({"running_mean", "running_var"} if kept else set())
    verdict = controller.statistics().batchnorm_adaptation.report.guard
    assert (verdict.before, verdict.kept) == (metric[0], kept)
    assert model.training
    assert torch.equal(torch.get_rng_state(), torch.frombuffer(bytearray(before["torch rng"]), dtype=torch.uint8))
    assert ("no: rolled back" in controller.statistics().to_str()) is not kept
    json.dumps([controller.get_compression_state(), controller.statistics().to_dict()])


def test_guard_without_a_function_or_a_number_is_an_error_and_undone():
    model = trained(ResidualNet(), (images(),))
    before = fingerprint(model)
    with pytest.raises(
        DataError, match=r"batchnorm_adaptation\.guard: is true, but no function is registered.*model_eval_fn="
    ):
        create_compressed_model(model, config(guard=True), init_loader=data())
    with pytest.raises(DataError, match=r"guard: the function must return one number, larger is better, got tuple"):
        create_compressed_model(model, config(guard=lambda m: (1, 2)), init_loader=data())
    assert fingerprint(model) == before


def test_layer_frozen_at_creation_stays_frozen_in_eval_mode():
    model = trained(ResidualNet(), (images(),))
    model.bn1.eval()
    controller, _ = create_compressed_model(model, config(), init_loader=data())
    before = model.bn1.running_mean.clone()
    model.eval()
    controller.adapt_batchnorm()
    assert torch.equal(model.bn1.running_mean, before)
