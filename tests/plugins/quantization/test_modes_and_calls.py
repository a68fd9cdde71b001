"""Quantizers at calls: in both modes, at properties of tensors, and around packed sequences."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from compress_core import create_compressed_model, register_default_init_args
from compress_core.torch_internals import FakeTensor

RANGES = {"initializer": {"range": {"num_init_samples": 4}}}


def compressed(model, data, **section):
    torch.manual_seed(0)
    config = {"compression": {"algorithm": "quantization", **RANGES, **section}}
    return create_compressed_model(model, register_default_init_args(config, data))


def idle(controller):
    """Returns the quantizers of activations without a gradient."""
    quantizers = controller.non_weight_quantizers.items()
    return [name for name, quantizer in quantizers if all(p.grad is None for p in quantizer.parameters())]


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.short = False
        self.function, self.a, self.b, self.auxiliary = function, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.function(self, x)


DATA = [(torch.linspace(-1, 1, 36).reshape(6, 6) * (n + 1), 0) for n in range(2)]


# Training and eval mode.


def test_training_reaches_all_quantizers_from_other_lines(caplog):
    def forward(net, x):
        if net.training:
            y = F.relu(net.a(x))
            return net.b(y), net.auxiliary(y)
        y = F.relu(net.a(x))
        return net.b(y)

    controller, model = compressed(Net(forward), DATA)
    sum(output.square().sum() for output in model.train()(DATA[0][0])).backward()
    assert len(controller.non_weight_quantizers) == 2
    assert idle(controller) == []
    assert not caplog.records


def test_quantizers_that_training_does_not_reach_are_named(caplog):
    def forward(net, x):
        y = net.a(x)
        return net.b(torch.relu(y) if net.training else F.relu(y))

    with caplog.at_level(logging.WARNING):
        compressed(Net(forward), DATA)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "act in eval mode only: 'model/relu#0|OUTPUT'." in message
    caplog.clear()
    compressed(Net(forward), DATA, ignored_scopes=["model/relu#0|OUTPUT"])
    assert not caplog.records


class OwnBackward(torch.autograd.Function):
    """A function with a backward of its own (the GELU of Bloom in training)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.relu(x) * 2

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * (ctx.saved_tensors[0] > 0)


@pytest.mark.parametrize("only_in_training", [True, False])
def test_quantizers_that_learn_nothing_are_named(only_in_training, caplog):
    def forward(net, x):
        y = net.a(x)
        if net.training or not only_in_training:
            return net.b(OwnBackward.apply(y))
        return net.b(F.relu(y) * 2)

    with caplog.at_level(logging.WARNING):
        controller, model = compressed(Net(forward), DATA)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "a torch.autograd.Function computes the tensors of these quantizers" in message
    model.train()(DATA[0][0]).square().sum().backward()
    assert idle(controller)
    assert all(f"'{name}'" in message for name in idle(controller))
    caplog.clear()
    controller, model = compressed(Net(forward), DATA, ignored_scopes=idle(controller))
    model.train()(DATA[0][0]).square().sum().backward()
    assert not caplog.records
    assert idle(controller) == []


def positions(length, fake):
    """Positions as libraries make them: in another number of steps while something traces or exports the model."""
    found = torch.arange(length)
    for step in (1, 1, 1) if fake or torch.compiler.is_compiling() else (3,):
        found = found + step
    return found % length


@pytest.mark.parametrize("fraction", [False, True], ids=["integers", "integers to floats"])
def test_calls_on_integers_alone_do_not_count(fraction, caplog, tmp_path):
    def forward(net, x):
        found = positions(6, isinstance(x, FakeTensor))
        y = net.a(x) + net.table(found)
        if fraction:
            y = F.layer_norm(y, (6,)) * ((found + 1) / 6)  # takes integers and returns floats
        return net.b(F.layer_norm(y + 1, (6,)))

    net = Net(forward)
    net.table = nn.Embedding(6, 6)
    with caplog.at_level(logging.WARNING):
        controller, model = compressed(net, DATA)
        model.eval()(DATA[0][0])
    assert not [record for record in caplog.records if "samples" not in record.getMessage()]
    assert any("add#" in name for name in controller.non_weight_quantizers)
    model.train()(DATA[0][0]).square().sum().backward()
    assert idle(controller) == []
    report = controller.export_onnx(tmp_path / "model.onnx", DATA[0][0], dynamic_batch=False)
    assert report.worst().relative_mean < 0.05 and not report.notes
    again = torch.compile(model.eval(), fullgraph=True, backend="eager")
    assert torch.equal(again(DATA[0][0]), model(DATA[0][0]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_hide_nothing_from_autograd(reentrant, caplog):
    def forward(net, x):
        y = net.a(x).requires_grad_()
        return net.b(checkpoint(lambda t: F.relu(t) * 2, y, use_reentrant=reentrant))

    controller, model = compressed(Net(forward), DATA)
    model.train()(DATA[0][0]).square().sum().backward()
    assert not caplog.records
    assert idle(controller) == []


def test_modules_that_only_training_runs_are_named(caplog):
    def forward(net, x):
        y = F.relu(net.a(x))
        return (net.b(y), net.auxiliary(y * 2)) if net.training else net.b(y)

    with caplog.at_level(logging.WARNING):
        compressed(Net(forward), DATA)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "so activations inside of them are not quantized, just weights: 'auxiliary'." in message
    caplog.clear()
    compressed(Net(forward), DATA, ignored_scopes=["auxiliary"])
    assert not caplog.records


def test_a_forward_with_fewer_calls_names_the_quantizer_and_how_to_ignore_it(caplog):
    def forward(net, x):
        y = net.a(x)
        return net.b(y if net.short else F.relu(y))

    _, model = compressed(Net(forward), DATA)
    model.eval()(DATA[0][0])
    assert not caplog.records
    model.short = True
    for _ in range(2):
        model(DATA[0][0])
    (message,) = [record.getMessage() for record in caplog.records]
    assert "'model/relu#0|OUTPUT'" in message
    assert "add these names to ignored_scopes" in message
    caplog.clear()
    _, model = compressed(Net(forward), DATA, ignored_scopes=["model/relu#0|OUTPUT"])
    model.short = True
    model.eval()(DATA[0][0])
    assert not caplog.records


# Properties.

PROPERTIES = {
    "real": lambda x: torch.fft.fft(x).real,
    "imag": lambda x: torch.fft.fft(x).imag,
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
    "mH": lambda x: x.mH,
    "H": lambda x: x.H,
    "real and T": lambda x: torch.fft.fft(x).real.T,
    "two readers": lambda x: x.T + x,
    "of a real tensor": lambda x: torch.relu(x.real),
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_tensors_that_are_read_as_a_property(name, caplog):
    controller, model = compressed(Net(lambda net, x: net.b(PROPERTIES[name](net.a(x)))), DATA)
    model.train()(DATA[0][0]).square().sum().backward()
    assert len(controller.non_weight_quantizers) >= 2
    assert idle(controller) == []
    expected = model.eval()(DATA[0][0])
    assert torch.allclose(controller.strip().eval()(DATA[0][0]), expected, atol=1e-5)
    assert not caplog.records


@pytest.mark.parametrize("function", [lambda x: x.data, lambda x: x.data.T])
def test_data_of_a_tensor_is_quantized_where_the_tensor_is(function):
    controller, _ = compressed(Net(lambda net, x: net.b(function(net.a(x)))), DATA)
    assert list(controller.non_weight_quantizers) == ["model/input 0|OUTPUT", "a|OUTPUT"]


# Packed sequences.

LENGTHS = torch.tensor([7, 5, 2])


class Tagger(nn.Module):
    def __init__(self, kind, batch_first, enforce_sorted, how):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(6, 6), kind(6, 8, batch_first=batch_first), nn.Linear(8, 3)
        self.batch_first, self.enforce_sorted, self.how = batch_first, enforce_sorted, how

    def forward(self, x, lengths):
        x = torch.relu(self.embed(x))
        if self.how == "list":
            packed = pack_sequence([part[:length] for part, length in zip(x, [7, 5, 2], strict=True)])
        else:
            packed = pack_padded_sequence(x, lengths, self.batch_first, self.enforce_sorted)
        output, hidden = self.rnn(packed)
        if self.how == "hidden":
            return self.head(hidden[0] if isinstance(hidden, tuple) else hidden)
        return self.head(output.data if self.how == "data" else pad_packed_sequence(output, self.batch_first)[0])


@pytest.mark.parametrize("how", ["padded", "hidden", "data", "list"])
@pytest.mark.parametrize(
    ("kind", "batch_first", "enforce_sorted"), [(nn.LSTM, True, False), (nn.GRU, False, True), (nn.RNN, True, True)]
)
def test_packed_sequences(kind, batch_first, enforce_sorted, how, caplog):
    shape = (3, 7, 6) if batch_first or how == "list" else (7, 3, 6)
    data = [{"x": torch.linspace(-1, 1, 126).reshape(shape) * (n + 1), "lengths": LENGTHS} for n in range(2)]
    controller, model = compressed(Tagger(kind, batch_first, enforce_sorted, how), data)
    model.train()(**data[0]).square().sum().backward()
    # The input, the rectified projection, and what the head reads.
    assert len(controller.non_weight_quantizers) == 3
    assert idle(controller) == []
    expected = model.eval()(**data[0])
    assert torch.allclose(controller.strip().eval()(**data[0]), expected, atol=1e-5)
    assert not caplog.records
