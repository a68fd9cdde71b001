"""Layers that are used in unusual ways are solved as what they are, or left alone with a reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core.transforms import get_weight_transform, raw_parameter
from compress_weight_reconstruction.twins import Writes, twin_of
from tests.plugins.weight_reconstruction.helpers import batches, copied, create, output_error, section, seeded


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.fc(self.fc(x).relu()).relu())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu())


@pytest.mark.parametrize("build", [Twice, Tied])
def test_all_calls_of_a_shared_weight_are_pooled(build):
    model, data = seeded(build), batches(8, count=10)
    original = copied(model)
    _, report = create(model, data, section(num_samples=128))
    assert not report.left_alone
    (shared,) = [layer for layer in report.layers if layer.positions == 256]
    assert shared.after < shared.before
    assert report.output_error[1] < report.output_error[0]
    assert output_error(model, original, batches(8, seed=8)) < 1


class Own(nn.Module):
    """A layer of a user's own."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        shape = (8, 6) if way in ("matmul", "operator", "addmm", "transposed") else (6, 8)
        self.weight, self.bias = nn.Parameter(torch.randn(shape) / 3), nn.Parameter(torch.randn(6))

    def forward(self, x):
        match self.way:
            case "matmul":
                return torch.matmul(x, self.weight)
            case "operator":
                return x @ self.weight + self.bias
            case "addmm":
                return torch.addmm(self.bias, x, self.weight)
            case "turned":
                return x @ self.weight.t()
            case "transposed":
                return F.linear(x, self.weight.T, self.bias)
            case "linear":
                return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("way", ["matmul", "operator", "addmm", "turned", "transposed", "linear"])
def test_weights_in_products_of_users_own_modules(way):
    model = seeded(lambda: nn.Sequential(Own(way)))
    data, original = batches(8), copied(model)
    _, report = create(model, data, section(level=0.5, damping=1e-6))
    assert not report.left_alone, report.left_alone
    assert report.layers[0].after < 0.9 * report.layers[0].before
    # Closed form on the support, by numpy's solver, in the way the parameter is stored.
    mask = get_weight_transform(model, "0.weight", "magnitude_sparsity").mask
    stored = original[0].weight.detach()
    columns_first = stored.shape == (8, 6)
    rows, kept = (stored.t(), mask.t()) if columns_first else (stored, mask)
    x = torch.cat(data[:4]).double()
    targets = x @ rows.t().double()
    if way in ("addmm", "transposed", "linear"):
        x, targets = x - x.mean(0), targets - targets.mean(0)
    found = raw_parameter(model, "0.weight").detach()
    found = (found.t() if columns_first else found).double() * kept
    for row in range(6):
        expected = torch.linalg.lstsq(x[:, kept[row]], targets[:, row : row + 1]).solution.flatten()
        torch.testing.assert_close(found[row, kept[row]], expected, rtol=1e-2, atol=2e-3)


class EmbeddingTied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x.long().clamp(0, 9)).mean(1))


def test_a_weight_that_is_also_an_embedding_is_left_alone():
    model = seeded(EmbeddingTied)
    before = model.embedding.weight.detach().clone()
    data = [torch.randint(0, 10, (16, 4)) for _ in range(6)]
    _, report = create(model, data)
    assert "embedding, which is no product with an input" in report.left_alone["embedding.weight"]
    assert torch.equal(raw_parameter(model, "embedding.weight"), before)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.other, self.rnn = nn.Linear(8, 8), nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        return self.rnn(self.fc(x))[0]


def test_what_no_product_is_seen_of_is_left_alone():
    model = seeded(Unused)
    _, report = create(model, batches(3, 8))
    assert [layer.name for layer in report.layers] == ["fc.weight"]
    assert report.left_alone["other.weight"] == "no product with it was seen in the compressed model"
    assert "lstm" in report.left_alone["rnn.weight_ih_l0"]


class Stateful(nn.Module):
    """Keeps something of its forward, and reads it after the next layer."""

    def __init__(self, keep):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.keep, self.kept, self.calls = keep, None, 0
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x):
        self.calls += 1
        if self.keep:
            self.kept = x
            self.last.copy_(x.mean(0))
            x = self.first(x).relu()
            return self.second(x + self.kept + self.last)
        kept, mean = x, x.mean(0)
        return self.second(self.first(x).relu() + kept + mean)


def test_what_a_model_keeps_between_layers_is_not_mixed_up_between_batches():
    models = [seeded(lambda keep=keep: Stateful(keep)) for keep in (True, False)]
    for model in models:
        create(model, batches(8))
    for name in ("first.weight", "second.weight", "second.bias"):
        assert torch.equal(raw_parameter(models[0], name), raw_parameter(models[1], name))
    assert models[0].calls == 0 and models[0].kept is None
    assert not models[0].last.any()


class Branching(nn.Module):
    """Takes another way, and another order, for some batches."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        match int(x[0, 0] * 100) % 4:
            case 0:
                x = self.left(x)
            case 1:
                x = self.right(self.left(x).relu())
            case _:
                x = self.left(self.right(x).relu())
        return self.head(x.relu())


def test_batches_may_take_different_ways():
    model = seeded(Branching)
    data = batches(8, count=20, size=8)
    for number, batch in enumerate(data):
        batch[0, 0] = number / 100 + 1e-4
    original = copied(model)
    create(model, data, section(num_samples=128))
    assert output_error(model, original, data) < 1


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(x)


def test_a_users_hook_that_uses_the_weight_is_not_the_models_forward():
    models = [seeded(Hooked) for _ in range(2)]

    def look(module, args, output):
        F.linear(7 + args[0], module.weight)

    models[0].fc.register_forward_hook(look)
    for model in models:
        create(model, batches(8))
    assert torch.equal(raw_parameter(models[0], "fc.weight"), raw_parameter(models[1], "fc.weight"))


def test_ignored_scopes_are_left_alone():
    model = seeded(Twice)
    before = model.head.weight.detach().clone()
    _, report = create(model, batches(8), section(ignored_scopes=["head"]))
    assert "head" in report.left_alone["head.weight"]
    assert torch.equal(raw_parameter(model, "head.weight"), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))).to(dtype)
    _, report = create(model, [batch.to(dtype) for batch in batches(8)])
    assert not report.left_alone
    assert report.output_error[1] < report.output_error[0]
    assert raw_parameter(model, "0.weight").dtype == dtype


class OnlyUnderAutocast(Hooked):
    def forward(self, x):
        result = super().forward(x)
        if result.dtype != torch.bfloat16:
            raise ValueError(f"autocast is off: {result.dtype}")
        return result


def test_autocast_around_creation_holds_in_the_forwards():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, report = create(seeded(OnlyUnderAutocast), batches(8))
    assert report.layers[0].after < report.layers[0].before


def test_one_batch_only_is_solved_and_compared_on_itself():
    model = seeded(Twice)
    _, report = create(model, batches(8, count=1, size=64))
    assert report.held_out == 0 and "no samples besides" in report.notes[0]
    assert report.samples == 64


def test_a_loader_with_fewer_samples_than_asked_for_says_so(caplog):
    _, report = create(seeded(Twice), batches(8, count=2), section(num_samples=512))
    assert report.samples == 32
    assert "512 samples were asked for, 32 are used" in caplog.text


class Attention(nn.Module):
    def __init__(self, cross):
        super().__init__()
        self.attention, self.head, self.cross = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3), cross

    def forward(self, x):
        other = x.flip(1) if self.cross else x
        return self.head(x + self.attention(x, other, other, need_weights=False)[0])


@pytest.mark.parametrize("cross", [False, True])
def test_projections_of_attention_are_solved_each_for_itself(cross):
    model, data = seeded(lambda: Attention(cross)), batches(5, 8)
    original = copied(model)
    _, report = create(model, data, section(level=0.5))
    assert not report.left_alone
    names = {layer.name for layer in report.layers}
    parts = {f"attention.in_proj_weight[{rows}]" for rows in ("0:8", "8:16", "16:24")}
    assert names == {*parts, "attention.out_proj.weight", "head.weight"}
    assert all(layer.after < layer.before for layer in report.layers)
    assert output_error(model, original, batches(5, 8, seed=8)) < report.output_error[0]
    assert not torch.equal(model.attention.in_proj_bias, original.attention.in_proj_bias)
    mask = get_weight_transform(model, "attention.in_proj_weight", "magnitude_sparsity").mask
    assert not torch.equal(
        raw_parameter(model, "attention.in_proj_weight")[mask], original.attention.in_proj_weight[mask]
    )


class Chunks(nn.Module):
    def __init__(self, overlap):
        super().__init__()
        self.weight, self.overlap = nn.Parameter(torch.randn(8, 6)), overlap

    def forward(self, x):
        second = self.weight[2 if self.overlap else 4 :]
        return torch.cat([F.linear(x, self.weight[:4]), F.linear(x, second)], -1)


@pytest.mark.parametrize("overlap", [False, True])
def test_parts_of_a_weight_are_solved_unless_they_overlap(overlap):
    model = seeded(lambda: nn.Sequential(Chunks(overlap)))
    _, report = create(model, batches(6))
    if overlap:
        assert report.left_alone == {"0.weight": "its products use parts of it that overlap"}
    else:
        assert [layer.name for layer in report.layers] == ["0.weight[0:4]", "0.weight[4:8]"]
        assert all(layer.after < layer.before for layer in report.layers)


class Caching(Hooked):
    """Keeps a result with its graph, which torch refuses to copy."""

    def forward(self, x):
        self.features = super().forward(x)
        return self.features


def test_a_model_that_keeps_a_result_with_its_graph():
    model = seeded(Caching)
    model(torch.randn(2, 8))
    kept = model.features
    assert kept.grad_fn is not None
    create(model, batches(8))
    assert model.features is kept


class Masked(nn.Module):
    """Buffers that are read, written to in place, and written to through `.data`."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)
        for name in ("table", "written", "quietly"):
            self.register_buffer(name, torch.ones(8))

    def forward(self, x):
        self.written.add_(1)
        self.quietly.data.mul_(2)
        return self.fc(x * self.table)


def test_twins_share_the_buffers_that_no_forward_writes_to():
    model = Masked().eval()
    twin = twin_of(model)
    writes = Writes(twin, model)
    assert all(getattr(twin, name) is not getattr(model, name) for name in ("table", "written", "quietly"))
    twin(torch.ones(2, 8))
    assert writes.found() == {"written", "quietly"}
    later = twin_of(model, writes.found())
    assert later.table is model.table and later.fc.weight is model.fc.weight
    assert later.written is not model.written and later.quietly is not model.quietly
    create(model, batches(8))
    assert bool((torch.cat([model.table, model.written, model.quietly]) == 1).all())


class Routing(nn.Module):
    """Sends rows to a layer by what the first layer makes of them, so compression changes which."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.second(x[x[:, 0] > 0])


def test_positions_that_cannot_be_paired_leave_the_layer_alone():
    model = seeded(Routing)
    before = model.second.weight.detach().clone()
    _, report = create(model, batches(8), section(level=0.8, ignored_scopes=["first"]))
    assert report.left_alone["second.weight"].startswith("its inputs have other shapes in the two models")
    assert torch.equal(raw_parameter(model, "second.weight"), before)
