"""What libraries' loaders give, and how the model is called with it when the user has said nothing."""

import queue

import pytest
import torch
from torch import nn

from compress_core import DataError, InitArgs, create_compressed_model, register_default_init_args
from compress_core.data.arguments import arguments_of, samples_in
from compress_core.data.calibration import CalibrationData
from compress_core.data.messages import suggestion

IMAGES = [torch.rand(3, 8, 8), torch.rand(3, 9, 7)]
TARGETS = [{"boxes": torch.rand(2, 4), "labels": torch.tensor([0, 1])} for _ in IMAGES]
X = torch.rand(2, 3, 8, 8)


class Recorder(nn.Module):
    """Notes the arguments of its forward, in a queue: attributes are as before after a forward of calibration."""

    def __init__(self):
        super().__init__()
        self.calls = queue.SimpleQueue()

    def called(self, *args, **kwargs):
        self.calls.put((args, kwargs))


class Single(Recorder):
    def forward(self, x):
        self.called(x)


class Detector(Recorder):
    def forward(self, images, targets=None):
        self.called(images, targets)


class Typed(Recorder):
    def forward(self, images: list[torch.Tensor], scale: float = 1.0):
        self.called(images)


class Open(Recorder):
    """As in ultralytics: further arguments of any name."""

    def forward(self, x, *args, **kwargs):
        self.called(x, *args, **kwargs)


class Keywords(Recorder):
    """As in transformers."""

    def forward(self, input_ids=None, pixel_values=None, labels=None, **kwargs):
        self.called(input_ids=input_ids, pixel_values=pixel_values, labels=labels, **kwargs)


class Masked(Recorder):
    def forward(self, image, mask=None):
        self.called(image, mask)


class Pair(Recorder):
    def forward(self, a, b):
        self.called(a, b)


def seen(model, batch, *, training=False):
    CalibrationData(InitArgs([batch]), "here").call(model.train(training), batch)
    return model.calls.get_nowait()


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    return found == expected


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, TARGETS),
        (tuple(IMAGES), tuple(TARGETS)),
        [tuple(IMAGES), tuple(TARGETS)],
        (IMAGES, TARGETS, ["a.jpg", "b.jpg"]),
        [*zip(IMAGES, TARGETS, strict=True)],
        (IMAGES[:1], TARGETS[:1]),
    ],
    ids=["lists", "tuples", "a list of tuples", "and names", "samples as they are", "one image"],
)
def test_detectors_get_images_and_in_training_targets(batch):
    number = len(batch[0])
    images, targets = IMAGES[:number], TARGETS[:number]
    assert same(seen(Detector(), batch), ((images, None), {}))
    assert same(seen(Detector(), batch, training=True), ((images, targets), {}))
    assert same(seen(Single(), batch, training=True), ((images,), {}))
    assert samples_in(batch) == number


@pytest.mark.parametrize("make", [Single, Open])
@pytest.mark.parametrize("key", ["image", "img", "input"])
@pytest.mark.parametrize("extra", [{}, {"label": torch.zeros(2)}, {"cls": torch.zeros(7, 1), "im_file": ("a", "b")}])
def test_entry_that_is_the_input(make, key, extra):
    batch = {**extra, key: X}
    assert same(seen(make(), batch), ((X,), {}))
    assert samples_in(batch) == 2


def test_multi_task_dicts_and_pairs_of_dicts():
    labels = {"depth": torch.zeros(2, 1), "class": torch.zeros(2)}
    assert same(seen(Single(), {"image": X, "labels": labels}), ((X,), {}))
    assert same(seen(Single(), ({"image": X}, labels)), ((X,), {}))
    assert same(seen(Single(), (X, labels)), ((X,), {}))


def test_entries_that_forward_has_names_for_stay_keywords():
    mask = torch.ones(2, 1)
    assert same(seen(Masked(), {"image": X, "mask": mask, "label": mask}), ((X, mask), {}))
    tokens = {"input_ids": torch.ones(2, 4), "labels": torch.ones(2), "extra": torch.ones(1)}
    expected = {"input_ids": tokens["input_ids"], "pixel_values": None, "labels": tokens["labels"]}
    assert same(seen(Keywords(), tokens), ((), {**expected, "extra": tokens["extra"]}))
    assert same(seen(Keywords(), {"pixel_values": X}), ((), {"input_ids": None, "pixel_values": X, "labels": None}))


def test_two_entries_that_may_be_the_input_are_not_guessed():
    with pytest.raises(DataError, match=r"batch\['image'\] = .*forward_fn=lambda model, batch: model\(x=batch"):
        seen(Single(), {"image": X, "input": X})


def test_one_dict_for_each_sample():
    batch = [{"image": image, "height": 8} for image in IMAGES]
    assert same(seen(Single(), batch), ((batch,), {}))
    assert samples_in(batch) == 2


def test_sequences_that_a_forward_takes_whole():
    assert same(seen(Single(), ((X, X), torch.zeros(2))), (((X, X),), {}))  # a siamese network
    assert same(seen(Pair(), ((X, X), torch.zeros(2))), ((X, X), {}))
    assert same(seen(Single(), ((X,), torch.zeros(2))), ((X,), {}))
    assert same(seen(Typed(), (IMAGES, torch.zeros(2))), ((IMAGES,), {}))
    assert same(seen(Typed(), IMAGES), ((IMAGES,), {}))
    assert same(seen(Pair(), (X, X, torch.zeros(2))), ((X, X), {}))


@pytest.mark.parametrize("batch", ["text", 3, None, (), []])
def test_batches_without_inputs(batch):
    assert arguments_of(Single(), batch) is None
    assert samples_in(batch) is None


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("'Tensor' object has no attribute 'items'"),
        ValueError("images is expected to be a list of 3d tensors"),
        KeyError("image"),
        AssertionError("targets should not be none when in training mode"),
        TypeError("missing 1 required positional argument"),
        Exception("of a class of the model's own"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_of_a_guessed_call_shows_a_forward_fn(error):
    class Fussy(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            raise error

    document = {
        "compression": {
            "algorithm": "magnitude_sparsity",
            "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 2}},
        }
    }
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Fussy())
    with pytest.raises(DataError) as caught:
        create_compressed_model(model, register_default_init_args(document, [{"frames": X, "y": torch.zeros(2)}]))
    text = str(caught.value)
    assert (
        "register_default_init_args(config, loader, forward_fn=lambda model, batch: model(input=batch['frames']))"
        in text
    )
    assert "batch['frames'] = Tensor (2, 3, 8, 8) torch.float32, batch['y'] = Tensor (2,) torch.float32" in text


def test_suggestions_are_programs():
    for batch, expected in (
        ({"frames": X}, X),
        ({"label": torch.zeros(1), "image": X}, X),
        ((X, torch.zeros(2)), X),
        (X, X),
    ):
        function = eval(suggestion(nn.Identity(), batch).partition("=")[2])
        assert torch.equal(function(nn.Identity(), batch), expected)
