"""Gates and their loss against the formulas of NNCF 2.16, written down independently, in float64."""

from __future__ import annotations

import copy
import io
import logging
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from compress_core import CompressionStage, ConfigError, UsageError
from compress_core.transforms import raw_parameter
from compress_learned_sparsity.rb.gates import StochasticGate
from tests.plugins.learned_sparsity.scores_helpers import (
    batches,
    create,
    network,
    same_tensors,
    steps,
    through_json,
    transforms,
)

KEY = "rb_sparsity"


def at_level(level, model=None, **params):
    model = network(dtype=torch.float64) if model is None else model
    return create(model, KEY, sparsity_init=level, params={"sparsity_target": max(level, 0.5), **params})


def set_scores(model, generator):
    for gate in transforms(model, KEY).values():
        with torch.no_grad():
            gate.scores.copy_(3 * torch.randn(gate.scores.shape, generator=generator, dtype=gate.scores.dtype))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


@pytest.mark.parametrize(("level", "expected"), [(0.0, 0.0), (0.2, 16.0), (0.4, 64.0), (0.6, 144.0)])
def test_loss_of_the_reference_with_all_gates_open(level, expected):
    controller, _ = at_level(level)
    assert controller.loss().item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("mode", ["global", "local"])
def test_loss_and_its_gradient(mode):
    controller, model = at_level(0.3, sparsity_level_setting_mode=mode)
    set_scores(model, torch.Generator().manual_seed(1))
    gates = list(transforms(model, KEY).values())
    loss = controller.loss()
    loss.backward()
    scores = [gate.scores.detach() for gate in gates]
    together = [torch.cat([s.flatten() for s in scores])] if mode == "global" else scores
    deviations = [float((s > 0).double().mean()) - 0.7 for s in together]
    assert loss.item() == pytest.approx(sum((d / 0.05) ** 2 for d in deviations), rel=1e-12)
    total = sum(s.numel() for s in scores)
    for index, gate in enumerate(gates):
        deviation = deviations[0 if mode == "global" else index]
        size = total if mode == "global" else gate.scores.numel()
        s = sigmoid(gate.scores.detach())
        torch.testing.assert_close(gate.scores.grad, 2 * deviation / 0.05**2 / size * s * (1 - s), rtol=1e-10, atol=0)


def test_errors_of_layers_do_not_cancel_in_local_mode():
    controller, model = at_level(0.5, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double())
    local, other = at_level(
        0.5, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double(), sparsity_level_setting_mode="local"
    )
    for m in (model, other):
        with torch.no_grad():
            transforms(m, KEY)["0.weight"].scores.fill_(-1.0)
    assert controller.loss().item() == 0  # half of all
    assert local.loss().item() == pytest.approx(2 * (0.5 / 0.05) ** 2)


def test_gates_in_training_and_their_gradients():
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    gate = StochasticGate(weight, name="w").double()
    assert gate.scores[0, 0].item() == pytest.approx(math.log(99), rel=1e-15)
    with torch.no_grad():
        gate.scores.copy_(torch.randn(6, 5, dtype=torch.float64))
    gate.draw(4)
    upstream = torch.randn(6, 5, dtype=torch.float64)
    (gate(weight) * upstream).sum().backward()
    z = (gate.scores + gate.noise).detach()
    is_open = (sigmoid(z) > 0.5).double()
    assert torch.equal(gate(weight).detach(), is_open * weight.detach())
    torch.testing.assert_close(weight.grad, upstream * is_open, rtol=0, atol=0)
    expected = upstream * weight.detach() * sigmoid(z) * (1 - sigmoid(z))
    torch.testing.assert_close(gate.scores.grad, expected, rtol=1e-12, atol=1e-15)


def test_the_noise_is_the_logit_of_uniform_numbers_and_new_in_each_step():
    gate = StochasticGate(torch.zeros(400, 500), name="w")
    first = gate.noise.clone()
    uniform = torch.sigmoid(first.double()).flatten().sort().values
    steps_of_uniform = (torch.arange(uniform.numel(), dtype=torch.float64) + 0.5) / uniform.numel()
    assert float((uniform - steps_of_uniform).abs().max()) < 1.63 / math.sqrt(uniform.numel())  # Kolmogorov, 1 %
    gate.draw(1)
    correlation = torch.corrcoef(torch.stack([first.flatten(), gate.noise.flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.01
    gate.draw(0)
    assert torch.equal(gate.noise, first)
    other = StochasticGate(torch.zeros(400, 500), name="v")
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), other.noise.flatten()]))[0, 1])) < 0.01
    # Gates are open with the probability of their scores.
    assert float((gate(torch.ones(400, 500)) != 0).float().mean()) == pytest.approx(0.99, abs=0.001)


def test_global_generators_are_left_alone_and_eval_mode_is_deterministic():
    controller, model = at_level(0.3)
    before = torch.get_rng_state()
    steps(controller, model, torch.optim.SGD(model.parameters(), 0.1), batches(2, torch.float64), 2)
    assert torch.equal(torch.get_rng_state(), before)
    set_scores(model, torch.Generator().manual_seed(1))
    model.eval()
    first = model(batches(1, torch.float64)[0])
    controller.scheduler.step()
    assert torch.equal(model(batches(1, torch.float64)[0]), first)
    for name, gate in transforms(model, KEY).items():
        shown = model.get_submodule(name.rpartition(".")[0]).weight
        assert torch.equal(shown != 0, gate.scores > 0)


def test_recomputed_activations_have_the_gates_of_their_step():
    controller, model = at_level(0.3)
    set_scores(model, torch.Generator().manual_seed(1))
    model.train()
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    x = batches(1, torch.float64)[0].requires_grad_()
    gradients = []
    for again in (False, True):
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=False, preserve_rng_state=False) if again else model(x)
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_levels_reached_and_asked_for_are_both_reported_and_the_stage_goes_by_the_first():
    controller, model = at_level(0.5)
    part = controller.statistics().rb_sparsity
    assert (part.sparsity_level, part.requested_level, part.target_level) == (0.0, 0.5, 0.5)
    assert part.mean_sparse_prob == pytest.approx(0.01)
    assert controller.compression_rate == 0
    assert controller.compression_stage() is CompressionStage.UNCOMPRESSED
    gates = list(transforms(model, KEY).values())
    sizes = sum(g.scores.numel() for g in gates)
    with torch.no_grad():
        gates[0].scores[:12] = -1
    closed = 12 * 12 / sizes  # 20 % of 50 %
    assert controller.compression_stage() is CompressionStage.PARTIALLY_COMPRESSED
    with torch.no_grad():
        gates[1].scores.fill_(-1)
    closed += 24 * 16 / sizes
    assert controller.compression_rate == controller.sparsity_level == pytest.approx(closed)
    assert controller.compression_stage() is CompressionStage.FULLY_COMPRESSED
    assert controller.statistics().rb_sparsity.model_parameters == sum(p.numel() for p in network().parameters())


@pytest.mark.parametrize(
    ("target", "closed", "full"), [(0.5, 0.46, False), (0.5, 0.48, True), (0.02, 0.005, False), (0.02, 0.012, True)]
)
def test_what_may_be_missing_of_a_target(target, closed, full):
    controller, model = create(nn.Linear(100, 100), KEY, params={"sparsity_target": target})
    with torch.no_grad():
        transforms(model, KEY)["weight"].scores.flatten()[: round(10000 * closed)] = -1
    expected = CompressionStage.FULLY_COMPRESSED if full else CompressionStage.PARTIALLY_COMPRESSED
    assert controller.compression_stage() is expected


def test_frozen_gates_do_not_move_whatever_the_optimizer_does():
    controller, model = at_level(0.5, network())
    optimizer = torch.optim.Adam(model.parameters(), 0.3, weight_decay=0.1)
    steps(controller, model, optimizer, batches(3), 8)
    controller.freeze()
    before = {name: gate.is_open().clone() for name, gate in transforms(model, KEY).items()}
    assert 0 < controller.sparsity_level < 1
    x = batches(1)[0]
    model.zero_grad()
    (model(x).square().sum() + controller.loss()).backward()
    loss = controller.loss()
    assert isinstance(loss, torch.Tensor)
    assert loss.item() == 0
    assert all(not gate.scores.grad.any() for gate in transforms(model, KEY).values())
    torch.testing.assert_close(model(x), model.eval()(x), rtol=0, atol=0)
    steps(controller, model, optimizer, batches(3), 3)
    assert all(torch.equal(before[name], gate.is_open()) for name, gate in transforms(model, KEY).items())
    with pytest.raises(UsageError, match=r"the masks are frozen; call controller.freeze\(False\)"):
        controller.set_sparsity_level(0.2)
    controller.freeze(False)
    controller.set_sparsity_level(0.2)
    assert controller.loss().item() > 0


def test_setting_the_rate_asks_for_it_and_leaves_the_gates_free():
    controller, _ = at_level(0.0)
    controller.freeze()
    controller.algorithms[KEY].compression_rate = 0.4
    assert controller.requested_level == 0.4
    assert not controller.frozen
    assert controller.loss().item() == pytest.approx(64)


@pytest.mark.parametrize("update", [{}, {"schedule": "polynomial", "update_per_optimizer_step": True}])
def test_a_rate_that_was_set_holds_whatever_the_schedule_says_and_after_resuming(update):
    """Accuracy-aware training sets rates, and its epochs begin with `epoch_step()`."""
    params = {"sparsity_target": 0.6, "sparsity_target_epoch": 2, "sparsity_freeze_epoch": 3, **update}
    params |= {"steps_per_epoch": 1} if update else {}
    section = {"sparsity_init": 0.1, "params": params}
    controller, model = create(network(), KEY, **section)
    controller.scheduler.epoch_step()
    controller.compression_rate = 0.3
    state = through_json(controller.get_compression_state())
    again, resumed = create(network(9), KEY, state=state, **section)
    resumed.load_state_dict(model.state_dict())
    for found in (controller, again):
        for _ in range(4):  # the schedule would be at 0.6 in epoch 2, and would freeze in epoch 3
            found.scheduler.epoch_step()
            found.scheduler.step()
            assert (found.requested_level, found.frozen) == (0.3, False)
        found.freeze(False)  # the user's word: the schedule goes on, which ends in frozen gates
        found.scheduler.epoch_step()
        assert found.frozen


def test_the_default_schedule_is_exponential_and_ends_in_frozen_gates():
    section = {"sparsity_init": 0.1, "params": {"sparsity_target": 0.7, "sparsity_target_epoch": 4}}
    section["params"]["sparsity_freeze_epoch"] = 6
    controller, _ = create(network(), KEY, **section)
    asked = []
    for _ in range(7):
        controller.scheduler.epoch_step()
        asked.append(controller.requested_level)
    expected = [1 - 0.9 * (0.3 / 0.9) ** (min(e, 4) / 4) for e in range(6)]
    assert asked[:6] == pytest.approx(expected)
    assert controller.frozen


@pytest.mark.parametrize("schedule", ["polynomial", "multistep", "adaptive", "exponential"])
@pytest.mark.parametrize("mode", ["global", "local"])
def test_every_schedule_moves_what_the_loss_asks_for(schedule, mode):
    params = {"schedule": schedule, "sparsity_level_setting_mode": mode}
    if schedule == "multistep":
        params |= {"multistep_steps": [1, 2], "multistep_sparsity_levels": [0.1, 0.3, 0.5]}
    elif schedule != "adaptive":
        params["sparsity_target_epoch"] = 3
    controller, model = create(network(), KEY, params=params)
    first = controller.loss().item()
    for _ in range(4):
        controller.scheduler.epoch_step()
        with torch.no_grad():  # the gates do as they are told
            for gate in transforms(model, KEY).values():
                gate.scores.flatten()[: math.ceil(controller.requested_level * gate.scores.numel())] = -1
    assert first == 0
    assert controller.requested_level == pytest.approx({"adaptive": 0.2}.get(schedule, 0.5))


def test_the_adaptive_schedule_waits_for_the_real_level():
    controller, model = create(network(), KEY, params={"schedule": "adaptive", "patience": 1})
    asked = []
    for _ in range(5):
        controller.scheduler.epoch_step()
        asked.append(controller.requested_level)
    # Nothing is trained: 0.05 is not reached within 0.03, so the level does not rise any more.
    assert asked == pytest.approx([0.05] * 5)
    with torch.no_grad():
        for gate in transforms(model, KEY).values():
            gate.scores.flatten()[: gate.scores.numel() // 20] = -1
    controller.scheduler.epoch_step()
    assert controller.requested_level == pytest.approx(0.1)


def test_a_key_that_nncf_ignores_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        create(network(), KEY, params={"schedule": "adaptive", "sparsity_target_epoch": 5})
    assert (
        "compression.0.rb_sparsity.params.sparsity_target_epoch" in caplog.text
        or "sparsity_target_epoch" in caplog.text
    )


def test_the_factor_on_gradients_is_on_those_of_the_gates_alone():
    found = []
    for factor in (None, 0.25):
        section = {} if factor is None else {"compression_lr_multiplier": factor}
        controller, model = create(network(), KEY, sparsity_init=0.3, params={"sparsity_target": 0.5}, **section)
        (model(batches(1)[0]).square().sum() + controller.loss()).backward()
        gates = {n: g.scores.grad for n, g in transforms(model, KEY).items()}
        found.append((gates, raw_parameter(model, "0.weight").grad))
    for name, gradient in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], 0.25 * gradient, rtol=1e-6, atol=1e-12)
    assert torch.equal(found[0][1], found[1][1])


def test_frozen_layers_stay_dense_and_are_named(caplog):
    model = network()
    model[2].weight.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        controller, model = create(model, KEY)
    assert controller.sparsified_module_info == ["0.weight", "4.weight"]
    assert "'2.weight'" in caplog.text
    assert controller.statistics().rb_sparsity.skipped == {"2.weight": "is frozen: requires_grad is False"}
    state = through_json(controller.get_compression_state())
    again, _ = create(network(), KEY, state=state)  # whatever is trained now
    assert again.sparsified_module_info == ["0.weight", "4.weight"]


def test_a_loop_that_tells_of_no_steps_is_warned(caplog):
    controller, model = at_level(0.3, network())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            controller.scheduler.epoch_step()
            for x in batches(3):
                (model(x).sum() + controller.loss()).backward()
    assert caplog.text.count("scheduler.step() was not called") == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_resumes_in_the_middle_of_an_epoch_to_the_same_bits(frozen):
    def start():
        return at_level(0.3, network(), schedule="polynomial", sparsity_target_epoch=3)

    def half(controller, model, optimizer, data):
        for x in data:
            controller.scheduler.step()
            optimizer.zero_grad()
            ((model(x)[:, 0] - x.sum(1)).square().mean() + controller.loss()).backward()
            optimizer.step()

    data = batches(6)
    controller, model = start()
    optimizer = torch.optim.Adam(model.parameters(), 0.2)
    steps(controller, model, optimizer, data, 1)
    if frozen:
        controller.freeze()
    controller.scheduler.epoch_step()
    half(controller, model, optimizer, data[:3])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    state = through_json(controller.get_compression_state())
    section = {"sparsity_init": 0.3}
    params = {"sparsity_target": 0.5, "schedule": "polynomial", "sparsity_target_epoch": 3}
    again, resumed = create(network(9), KEY, state=state, params=params, **section)
    values, moments = torch.load(file, weights_only=True)
    resumed.load_state_dict(values)
    other = torch.optim.Adam(resumed.parameters(), 0.2)
    other.load_state_dict(moments)
    for c, m, o in ((controller, model, optimizer), (again, resumed, other)):
        half(c, m, o, data[3:])
        steps(c, m, o, data, 1)
    same_tensors(model.state_dict(), resumed.state_dict())
    torch.testing.assert_close(model(data[0]), resumed(data[0]), rtol=0, atol=0)  # noise of the same step
    assert controller.compression_rate == again.compression_rate


def test_copies_draw_the_same_noise_and_share_nothing():
    controller, model = at_level(0.3, network())
    steps(controller, model, torch.optim.SGD(model.parameters(), 0.1), batches(2), 1)
    twin_controller, twin = copy.deepcopy((controller, model))
    for c in (controller, twin_controller):
        c.scheduler.step()
    x = batches(1)[0]
    assert torch.equal(model(x), twin(x))
    twin_controller.scheduler.step()
    assert not torch.equal(transforms(model, KEY)["0.weight"].noise, transforms(twin, KEY)["0.weight"].noise)


def test_compiled_training_is_that_of_eager_mode():
    results = []
    for compiled in (False, True):
        controller, model = at_level(0.4, network())
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for epoch in range(4):
            controller.scheduler.epoch_step()
            if epoch == 3:
                controller.freeze()
            for x in batches(2):
                controller.scheduler.step()
                optimizer.zero_grad()
                (run(x).square().mean() + controller.loss()).backward()
                optimizer.step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    controller, model = at_level(0.4, network(dtype=dtype))
    loss = controller.loss()
    loss.backward()
    assert loss.item() == pytest.approx(64, rel=1e-3)
    assert model(batches(1)[0].to(dtype)).dtype == dtype
    assert all(gate.scores.grad.isfinite().all() for gate in transforms(model, KEY).values())


def test_tied_and_repeated_layers_have_one_gate():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 5)
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.head.weight[:5] @ self.embedding(tokens).mT)

    controller, _ = create(Tied(), KEY, sparsity_init=0.4)
    assert len(controller.sparsified_module_info) == 1
    assert controller.loss().item() == pytest.approx(64, rel=1e-5)


def test_pruned_channels_take_their_gates_with_them():
    pruning = {
        "algorithm": "filter_pruning",
        "pruning_init": 0.5,
        "params": {"pruning_target": 0.5, "multiple_of": 1, "prune_first_conv": True},
    }
    quantization = {"algorithm": "quantization"}
    root = {"input_info": {"sample_size": [8, 12]}}
    controller, model = create(
        network(), KEY, pruning, quantization, root=root, sparsity_init=0.3, params={"sparsity_target": 0.4}
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    steps(controller, model, optimizer, batches(3), 2)
    controller.shrink(optimizer)
    assert transforms(model, KEY)["0.weight"].scores.shape == (12, 12)
    steps(controller, model, optimizer, batches(3), 2)
    expected = model.eval()(batches(1)[0])
    plain = controller.strip()
    assert plain[2].weight.shape == (8, 12)
    torch.testing.assert_close(plain(batches(1)[0]), expected, rtol=1e-4, atol=0.05)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"params": {"seed": -1}}, "seed"),
        ({"params": {"sparsity_target": 1.0}}, "sparsity_target"),
        ({"params": {"power": 2.0}}, "power"),
        ({"compression_lr_multiplier": 0}, "compression_lr_multiplier"),
        ({"sparsity_init": 0.6, "params": {"sparsity_target": 0.5}}, "below sparsity_init"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        create(network(), KEY, **section)
