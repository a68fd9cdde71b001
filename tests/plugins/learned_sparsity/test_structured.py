"""Channels and heads that are masked everywhere go at `strip`, on models of any class."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import load_compressed_model
from tests.plugins.learned_sparsity.scores_helpers import batches, create, network, steps, through_json, transforms

KEY = "movement_sparsity"
PARAMS = {"warmup_start_epoch": 1, "warmup_end_epoch": 2, "importance_regularization_factor": 0.1}
ROOT = {"input_info": {"sample_size": [8, 12]}}


class Attention(nn.Module):
    """Nobody's class: attention of four heads, and two linear layers behind, each with a residual connection."""

    def __init__(self, width=12, heads=4):
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(12, width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 20), nn.Linear(20, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.embed(x).unsqueeze(1).expand(-1, 5, -1) * torch.linspace(0.5, 1.5, 5).view(1, 5, 1)
        q, k, v = (f(x).unflatten(-1, (-1, 3)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm(x + self.out(attended))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


STRUCTURES = [
    {"mode": "block", "sparse_factors": [3, 3], "target_scopes": ["query", "key", "value", "out"]},
    {"mode": "per_dim", "axis": 0, "target_scopes": "up"},
    {"mode": "per_dim", "axis": 1, "target_scopes": "down"},
]


def attention(*others, seed=0, state=None, **params):
    torch.manual_seed(seed)
    ignored = ["embed", "head"]
    return create(
        Attention(),
        KEY,
        *others,
        root=ROOT,
        state=state,
        params=PARAMS | params,
        sparse_structure_by_scopes=STRUCTURES,
        ignored_scopes=ignored,
    )


def set_scores(model, low):
    """All scores 1; those that `low` names -1: name of a tensor -> indices of its scores."""
    for name, mask in transforms(model, KEY).items():
        if mask.scores is None:  # a cut through its blocks has frozen it
            continue
        with torch.no_grad():
            mask.scores.fill_(1.0)
            for index in low.get(name, ()):
                mask.scores[index] = -1.0


def over(controller):
    for _ in range(3):
        controller.scheduler.epoch_step()
        controller.scheduler.step()


def head(number):
    """Everything of a head."""
    rows = {f"{name}.{kind}": [number] for name in ("query", "key", "value") for kind in ("weight", "bias")}
    return rows | {"out.weight": [(slice(None), number)]}


def unit(*numbers):
    rows = {"up.weight": list(numbers), "up.bias": list(numbers)}
    return rows | {"down.weight": [(slice(None), number) for number in numbers]}


def test_heads_and_units_that_are_masked_everywhere_are_removed():
    controller, model = attention()
    set_scores(model, head(1) | unit(0, 5, 6, 19))
    over(controller)
    part = controller.statistics().movement_sparsity
    removed = {group.weights: (group.size, group.removed) for group in part.channels}
    assert removed[("up.weight",)] == (20, 4)
    assert [value for names, value in removed.items() if "query.weight" in names] == [(4, 1)]
    x = batches(1)[0]
    expected = model.eval()(x)
    plain = controller.strip()
    assert plain.query.weight.shape == (9, 12)
    assert plain.out.weight.shape == (12, 9)
    assert plain.up.weight.shape == (16, 12)
    assert plain.down.weight.shape == (12, 16)
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)
    again = load_compressed_model(Attention(), plain.state_dict(), through_json(controller.shrink_plan)).eval()
    assert torch.equal(again(x), plain(x))
    assert "channels and heads" in part.to_str()


def test_what_is_not_masked_in_all_layers_stays():
    controller, model = attention()
    low = head(1)
    del low["value.bias"]  # one bias of the head is alive
    low |= unit(3) | {"up.weight": [3, 4], "up.bias": [3, 4]}  # the column of unit 4 is alive
    set_scores(model, low)
    before = 3 * 9 * 4 + 4 * 9
    over(controller)
    plain = controller.strip()
    assert plain.query.weight.shape == (12, 12)
    assert plain.up.weight.shape == (19, 12)
    # Nothing goes of the heads, so what is masked in their layers stays masked; unit 4 comes back.
    assert int((plain.query.weight == 0).sum()) == before - 108 + 0 or int((plain.query.weight == 0).sum()) == 36
    assert bool((plain.up.weight != 0).all())


def test_all_units_masked_leave_one():
    controller, model = attention()
    set_scores(model, unit(*range(20)))
    for mask in transforms(model, KEY).values():
        mask.mask.fill_(True)
    over(controller)
    x = batches(1)[0]
    expected = model.eval()(x)
    plain = controller.strip()
    assert plain.up.weight.shape[0] >= 1
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)


def test_why_channels_stay_is_said():
    controller, _ = attention()
    whole = controller.statistics().movement_sparsity.whole
    assert "is normalized over" in whole["out.weight"]  # the residual stream
    assert "down.weight" in whole
    other, _ = create(network(), KEY, root=ROOT, params=PARAMS, ignored_scopes=["2"])
    assert "'2.weight' makes or reads the channels too, and has no scores" in other.statistics().to_str()


def test_a_model_of_which_nothing_can_go_is_warned_of(caplog):
    model = nn.Sequential(nn.Linear(12, 4))
    with caplog.at_level(logging.WARNING):
        controller, model = create(model, KEY, root=ROOT, params=PARAMS)
    assert "no channels can be removed at the end" in caplog.text
    set_scores(model, {"0.weight": [(0, slice(0, 7))]})
    over(controller)
    assert int((controller.strip()[0].weight == 0).sum()) == 7


def test_a_resumed_model_is_stripped_alike():
    controller, model = attention()
    set_scores(model, head(2) | unit(1, 2))
    over(controller)
    state = through_json(controller.get_compression_state())
    again, resumed = attention(seed=5, state=state)
    resumed.load_state_dict(model.state_dict())
    first, second = controller.strip(), again.strip()
    x = batches(1)[0]
    assert torch.equal(first.eval()(x), second.eval()(x))
    assert second.query.weight.shape == (9, 12)


def trained(*others):
    controller, model = attention(*others, importance_regularization_factor=3.0)
    steps(controller, model, torch.optim.Adam(model.parameters(), 0.02), batches(6), 3)
    return controller, model.eval()


def test_training_removes_heads_or_units():
    controller, model = trained()
    x = batches(1)[0]
    expected = model(x)
    plain = controller.strip()
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in Attention().parameters())


PRUNING = {
    "algorithm": "filter_pruning",
    "pruning_init": 0.3,
    "params": {"pruning_target": 0.3, "multiple_of": 1, "prune_first_conv": True},
}


@pytest.mark.parametrize("in_place", [False, True])
def test_filter_pruning_and_quantization_remove_and_round_the_rest(in_place):
    controller, model = attention(PRUNING, {"algorithm": "quantization"})
    set_scores(model, head(1) | unit(0, 5, 6, 19))
    steps(controller, model, torch.optim.SGD(model.parameters(), 1e-3), batches(2), 1)
    over(controller)
    x = batches(1)[0]
    expected = model.eval()(x)
    masked = model.up.weight.detach().flatten(1).any(1)
    plain = controller.strip(do_copy=not in_place)
    assert plain.up.weight.shape[0] == int(masked.sum()) < 16
    torch.testing.assert_close(plain(x), expected, rtol=1e-3, atol=0.05)


def test_filter_pruning_shrinks_in_the_middle_of_training():
    def start(state=None):
        return attention(PRUNING, state=state)

    controller, model = start()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    steps(controller, model, optimizer, batches(2), 1)
    controller.shrink(optimizer)
    left = model.up.weight.shape[0]
    assert left == 14
    set_scores(model, unit(0, 3))
    for _ in range(2):
        controller.scheduler.epoch_step()
        controller.scheduler.step()
    state = through_json(controller.get_compression_state())
    expected = model.eval()(batches(1)[0])
    _, resumed = (again := start(state))
    resumed.load_state_dict(model.state_dict())
    for c in (controller, again[0]):
        plain = c.strip()
        assert plain.up.weight.shape[0] == left - 2
        torch.testing.assert_close(plain.eval()(batches(1)[0]), expected, rtol=1e-4, atol=1e-5)


def test_stripping_a_copy_leaves_the_training_alone():
    controller, model = attention()
    set_scores(model, head(0))
    over(controller)
    before = copy.deepcopy(model.state_dict())
    controller.strip()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert controller.strip().query.weight.shape == (9, 12)


def test_torchs_own_attention_and_plain_perceptrons():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(12, 8), nn.Unflatten(0, (2, 4)), layer, nn.Flatten(0, 1), nn.Linear(8, 3))
    controller, model = create(model, KEY, root=ROOT, params=PARAMS)
    names = controller.sparsified_module_info
    assert {"2.self_attn.in_proj_weight", "2.self_attn.in_proj_bias", "2.self_attn.out_proj.weight"} <= set(names)
    rows = {"2.linear1.weight": [2], "2.linear1.bias": [2], "2.linear2.weight": [(slice(None), 2)]}
    set_scores(model, rows)
    over(controller)
    x = batches(1)[0]
    expected = model.eval()(x)
    plain = controller.strip()
    assert plain[2].linear1.weight.shape == (15, 8)
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)

    controller, model = create(network(), KEY, root=ROOT, params=PARAMS)
    low = {"0.weight": [3], "0.bias": [3], "2.weight": [(slice(None), 3)]}
    set_scores(model, low)
    over(controller)
    assert controller.strip()[0].weight.shape == (23, 12)
