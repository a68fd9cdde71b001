"""Batches as users' loaders give them, of every kind: what is passed to forward, copied, counted and said."""

import collections
import copy
import dataclasses
import functools
import types

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from compress_core import CompressionError, DataError, InitArgs, create_compressed_model, register_default_init_args
from compress_core.data.arguments import samples_in
from compress_core.data.calibration import CalibrationData
from compress_core.data.messages import suggestion
from compress_core.data.ranks import fingerprint
from compress_core.data.structures import copied, map_tensors, moved, tensors_of

torch.manual_seed(0)
X, Y, MASK = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]), torch.rand(4, 1)
NAMES = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
PACKED = pack_sequence([torch.rand(5, 3), torch.rand(3, 3), torch.rand(2, 3)])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def net(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.norm(self.first(x))))).mean((2, 3)))


class Single(Net):
    def forward(self, x):
        return self.net(x)


class Masked(Net):
    def forward(self, image, mask=None):
        return self.net(image) if mask is None else self.net(image) * mask


class Both(Net):
    def forward(self, image, mask):
        return self.net(image) * mask


class Items(Net):
    def forward(self, batch):
        return self.net(batch["image"])


class Attributes(Net):
    def forward(self, data):
        return self.net(data.image)


class Transformers(Net):
    def forward(self, pixel_values=None, labels=None, return_dict=None):
        logits = self.net(pixel_values)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x, state=None):
        return self.head(self.lstm(x, state)[1][0][-1])


class Encoding(collections.UserDict):
    """As transformers' BatchEncoding: a mapping that is no dict, with its entries as attributes."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class Graph:
    """As PyTorch Geometric's Data: moves itself, and returns its entries from to_dict."""

    def __init__(self, **entries):
        self._store = entries

    def __getattr__(self, name):
        if name.startswith("_") or name not in self._store:
            raise AttributeError(name)
        return self._store[name]

    def __setattr__(self, name, value):
        if name == "_store":
            object.__setattr__(self, name, value)
        else:
            self._store = {**self._store, name: value}

    def to_dict(self):
        return dict(self._store)

    def clone(self):
        return Graph(**{name: copy.deepcopy(value) for name, value in self._store.items()})

    def to(self, device):
        return Graph(**{name: moved(value, device) for name, value in self._store.items()})


class Instances:
    """As detectron2's: attributes, and a `to` of its own."""

    def __init__(self, **entries):
        self.__dict__.update(entries)

    def to(self, device):
        return Instances(**{name: moved(value, device) for name, value in vars(self).items()})


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    label: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    mask: torch.Tensor
    image: torch.Tensor
    name: str = "of no use"


class Attrs:
    """As a class of attrs, which is no dependency: it has `__attrs_attrs__`."""

    __attrs_attrs__ = (types.SimpleNamespace(name="image"), types.SimpleNamespace(name="label"))

    def __init__(self, image, label):
        self.image, self.label = image, label


Pair = collections.namedtuple("Pair", "image label")
Reversed = collections.namedtuple("Reversed", "label image")

KINDS = {
    "a tensor": (Single, X),
    "inputs, target": (Single, (X, Y)),
    "inputs, None": (Single, (X, None)),
    "inputs, names": (Single, (X, NAMES)),
    "names, inputs": (Single, (NAMES, X)),
    "None, inputs, target": (Single, (None, X, Y)),
    "inputs in a tuple": (Both, ((X, MASK), Y)),
    "a mapping in a tuple": (Masked, (({"image": X, "mask": MASK},), Y)),
    "transformers": (Transformers, {"pixel_values": X, "labels": Y}),
    "transformers, names": (Transformers, {"pixel_values": X, "labels": Y, "names": NAMES}),
    "encoding": (Transformers, Encoding(pixel_values=X, labels=Y)),
    "encoding, target": (Transformers, (Encoding(pixel_values=X), Y)),
    "labels that are None": (Transformers, {"pixel_values": X, "labels": None}),
    "an ordered dict": (Transformers, collections.OrderedDict(labels=Y, pixel_values=X)),
    "a read-only mapping": (Transformers, types.MappingProxyType({"labels": Y, "pixel_values": X})),
    "a whole mapping": (Items, {"image": X, "label": Y}),
    "a whole encoding": (Attributes, (Encoding(image=X), Y)),
    "mappings in a mapping": (Masked, {"inputs": {"image": X, "mask": MASK}, "targets": {"label": Y}}),
    "an image in a mapping in a mapping": (Single, {"inputs": {"image": X}, "label": Y}),
    "a tuple in a mapping": (Both, {"inputs": (X, MASK), "label": Y}),
    "a named tuple": (Single, Pair(X, Y)),
    "a named tuple with the label first": (Single, Reversed(Y, X)),
    "a named tuple with forward's names": (Masked, Reversed(Y, X)),
    "a dataclass": (Single, Sample(X, Y)),
    "a dataclass with forward's names": (Both, Frozen(MASK, X)),
    "a whole dataclass": (Attributes, Sample(X, Y)),
    "a whole frozen dataclass": (Attributes, Frozen(MASK, X)),
    "a dataclass, target": (Attributes, (Sample(X), Y)),
    "attrs": (Single, Attrs(X, Y)),
    "a whole class of attrs": (Attributes, Attrs(X, Y)),
    "a graph": (Attributes, Graph(image=X, y=Y)),
    "a graph with forward's names": (Both, Graph(image=X, mask=MASK, y=Y)),
    "instances": (Attributes, Instances(image=X, label=Y, name="a")),
    "instances, target": (Attributes, (Instances(image=X), Y)),
    "a namespace": (Attributes, types.SimpleNamespace(image=X, label=Y)),
}


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    monkeypatch.setenv("COMPRESS_QUANTIZATION_KERNELS", "eager")


def fill(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


SECTIONS = {
    "sparsity": {
        "algorithm": "magnitude_sparsity",
        "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 4, "method": "exact"}},
    },
    "quantization": {"algorithm": "quantization"},
    "pruning": {"algorithm": "filter_pruning", "pruning_init": 0.4, "params": {"multiple_of": 1}},
}


# Kinds in which forward gets a mask, too; and those whose objects reach the trace, and the proof of pruning.
WITH_MASK = {kind for kind, (make, _) in KINDS.items() if make is Both} | {
    "a mapping in a tuple",
    "mappings in a mapping",
}
TRACED = ["a tensor", "encoding", "a whole mapping", "a whole frozen dataclass", "a graph", "instances, target"]
TRACED += ["mappings in a mapping", "a dataclass with forward's names"]


@functools.cache
def of_plain_tensors(with_mask, section):
    """Returns the compressed model, calibrated on tensors, and what it makes of them."""
    make, plain = (Both, (X, MASK)) if with_mask else (Single, (X,))
    document = {"compression": copy.deepcopy(SECTIONS[section])}
    _, model = create_compressed_model(fill(make()), document, init_loader=[plain])
    with torch.no_grad():
        return model, model.eval()(*plain)


@pytest.mark.parametrize(
    ("kind", "section"),
    [*((kind, "sparsity") for kind in KINDS), *((k, s) for s in ("quantization", "pruning") for k in TRACED)],
)
def test_every_kind_gives_the_model_that_plain_tensors_give(kind, section):
    """A batch only wraps the same images, so nothing in the model may depend on its kind."""
    make, batch = KINDS[kind]
    before = fingerprint(batch)
    document = register_default_init_args({"compression": copy.deepcopy(SECTIONS[section])}, [batch])
    controller, model = create_compressed_model(fill(make()), document)
    assert fingerprint(batch) == before
    plain, expected = of_plain_tensors(kind in WITH_MASK, section)
    # Quantizers are named after the path of their input, so only their values can be compared.
    values, wanted = (sorted_values(m) for m in (model, plain))
    assert len(values) == len(wanted) and all(map(torch.equal, values, wanted))
    torch.testing.assert_close(call(model, batch), expected, rtol=0, atol=0)
    if section == "pruning":
        torch.testing.assert_close(call(controller.strip(), batch), expected, rtol=1e-4, atol=1e-5)


def sorted_values(model):
    return sorted(model.state_dict().values(), key=lambda t: (t.shape, t.double().sum().item()))


def call(model, batch):
    """Returns what the model makes of a batch, as its user would call it."""
    data = CalibrationData(InitArgs([batch]), "here")
    found = []
    handle = model.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        data.call_copy(model.eval(), batch)
    handle.remove()
    output = found[0]
    return output["logits"] if isinstance(output, dict) else output


def test_labels_are_no_part_of_the_calibrated_network():
    """The model's own loss is neither quantized nor rounded, in training and in the exported outputs."""
    for batch in ({"pixel_values": X, "labels": Y}, Encoding(pixel_values=X, labels=Y)):
        model = fill(Transformers())
        document = register_default_init_args({"compression": {"algorithm": "quantization"}}, [batch])
        controller, model = create_compressed_model(model, document)
        assert len(controller.non_weight_quantizers) == 4
        found = model.train()(pixel_values=X, labels=Y)
        torch.testing.assert_close(found["loss"], nn.functional.cross_entropy(found["logits"], Y), rtol=0, atol=0)
        found["loss"].backward()
        assert model.first.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "batch", [PACKED, (PACKED, Y[:3]), {"input": PACKED, "y": Y[:3]}, {"x": PACKED}, Pair(PACKED, Y[:3])]
)
def test_packed_sequences_are_one_input(batch):
    assert samples_in(batch) == 3
    model = Recurrent()
    document = register_default_init_args({"compression": {"algorithm": "quantization"}}, [batch])
    _, model = create_compressed_model(model, document)
    assert model(PACKED).shape == (3, 4)


STRUCTURES = {**{kind: batch for kind, (_, batch) in KINDS.items()}, "packed": PACKED, "packed, target": (PACKED, Y)}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_copies_share_no_tensor_and_keep_their_type(kind):
    batch = STRUCTURES[kind]
    for twin in (moved(batch, "cpu", copied=True), copied(batch)):
        assert type(twin) is type(batch) or kind == "a read-only mapping"
        given, made = [*tensors_of(batch)], [*tensors_of(twin)]
        assert len(given) == len(made) > 0
        for before, after in zip(given, made, strict=True):
            assert torch.equal(before, after) and before.data_ptr() != after.data_ptr()


@pytest.mark.parametrize("kind", STRUCTURES)
def test_every_tensor_is_moved(kind):
    batch = STRUCTURES[kind]
    there = moved(batch, "meta")
    assert {t.device.type for t in tensors_of(batch)} == {"cpu"}
    assert {t.device.type for t in tensors_of(there)} <= ({"meta", "cpu"} if "packed" in kind else {"meta"})
    if kind == "packed":
        assert isinstance(there, PackedSequence) and there.data.is_meta and not there.batch_sizes.is_meta


def test_a_function_of_the_user_gets_the_batch_as_it_is():
    given = []

    def forward_fn(model, batch):
        given.append(batch)
        return model(batch.pixels)

    batch = Encoding(pixels=X)
    CalibrationData(InitArgs([batch], forward_fn=forward_fn), "here").call(Single(), batch)
    assert type(given[0]) is Encoding and given[0].pixels is not X


@pytest.mark.parametrize("batch", [NAMES, "text", [[1.0] * 3] * 4, types.SimpleNamespace(text="a")])
def test_a_function_may_make_tensors_of_what_holds_none(batch):
    document = register_default_init_args(
        {"compression": copy.deepcopy(SECTIONS["sparsity"])}, [batch], forward_fn=lambda model, batch: model(X)
    )
    controller, _ = create_compressed_model(Single(), document)
    report = controller.statistics().batchnorm_adaptation.report
    assert report.samples == (4 if isinstance(batch, list) else 1)


def test_fingerprints_see_all_values():
    """A mapping that is no dict is one leaf for torch, and its text shortens large tensors."""
    other = X.clone()
    other[2, 1, 4, 4] += 1
    for wrap in (lambda x: Encoding(x=x), lambda x: Sample(x), lambda x: Graph(x=x), lambda x: [(x, "a")]):
        assert fingerprint(wrap(X)) == fingerprint(wrap(X.clone())) != fingerprint(wrap(other))


def test_objects_that_lead_back_to_themselves_end():
    batch = types.SimpleNamespace(image=X)
    batch.me, batch.model = batch, Single()
    assert [*tensors_of(batch)] == [X]
    assert map_tensors(lambda x: x + 1, batch).image is not X


# What is not understood.


class Siamese(Net):
    def forward(self, left, right, scale=1.0):
        return self.net(left) - self.net(right) * scale


UNCLEAR = {
    "unknown keys": (Single, {"frames": X, "y": Y}, "x=batch['frames']", X),
    "the target first": (Single, {"y": Y, "frames": X}, "x=batch['frames']", X),
    "an index first": (Single, (Y, X, Y), "x=batch[1]", X),
    "keys for two arguments": (Siamese, {"a": X, "b": X}, "left=batch['a'], right=batch['b']", (X, X)),
    "keys for one of two arguments": (Siamese, {"left": X, "b": X}, "left=batch['left'], right=batch['b']", (X, X)),
    "pairs that nobody has collated": (Single, [*zip(X, Y, strict=True)], "torch.stack([sample[0] for sample in", X),
    "dicts that nobody has collated": (
        Single,
        [{"label": y, "image": x} for x, y in zip(X, Y, strict=True)],
        "torch.stack([sample['image'] for sample in batch])",
        X,
    ),
    "deep": (Single, {"data": {"views": [X, X]}, "y": Y}, "x=batch['data']['views'][0]", X),
    "a dataclass of two": (Siamese, Sample(X, X), "left=batch.image, right=batch.label", (X, X)),
    "a namespace": (Siamese, types.SimpleNamespace(a=X, b=X), "left=batch.a, right=batch.b", (X, X)),
}


@pytest.mark.parametrize(
    ("kind", "section"), [*((kind, "sparsity") for kind in UNCLEAR), ("deep", "quantization"), ("deep", "pruning")]
)
def test_what_is_not_understood_shows_the_function_to_write(kind, section):
    make, batch, expected, _ = UNCLEAR[kind]
    document = register_default_init_args({"compression": copy.deepcopy(SECTIONS[section])}, [batch])
    with pytest.raises(CompressionError) as caught:
        create_compressed_model(make(), document)
    text = str(caught.value)
    assert text.endswith("))") and "register_default_init_args(config, loader, forward_fn=lambda model, batch:" in text
    assert f"model({expected}" in text
    assert text.count("forward_fn") == 1 and "\n" not in text
    assert f"forward of {make.__name__} takes ({'x' if make is Single else 'left, right, scale=1.0'})" in text
    assert "(4, 3, 8, 8) torch.float32" in text or "(3, 8, 8) torch.float32" in text


@pytest.mark.parametrize("kind", UNCLEAR)
def test_the_function_that_is_shown_works(kind):
    make, batch, _, arguments = UNCLEAR[kind]
    model = fill(make())
    function = eval(suggestion(model, batch).partition("=")[2])
    expected = model(*arguments) if isinstance(arguments, tuple) else model(arguments)
    torch.testing.assert_close(function(model, batch), expected, rtol=0, atol=0)


def test_error_of_a_users_function_says_so_and_shows_the_batch():
    with pytest.raises(DataError, match=r"forward_fn failed on a calibration batch: .*batch\['a'\] = Tensor") as caught:
        data = CalibrationData(InitArgs([{"a": X}], forward_fn=lambda model, batch: model(batch["a"][0, 0])), "here")
        data.call(Single(), {"a": X})
    assert "register_default_init_args" not in str(caught.value)
