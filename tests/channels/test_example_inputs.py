"""The proof on the example's inputs, and on models whose outputs are discrete functions."""

import json

import pytest
import torch
from torch import nn

from compress_core import create_compressed_model
from compress_core.channels import (
    InputSpec,
    ShrinkError,
    channel_groups,
    example_arguments,
    input_specs,
    prove,
    removable_groups,
    shrinkage,
)
from compress_core.channels.replay import Decisions
from compress_core.trace import Example, trace
from tests.channel_helpers import mask
from tests.channels.small_models import normal


class Bags(nn.Module):
    """Takes tokens in one row, and where each sample begins."""

    def __init__(self):
        super().__init__()
        self.bag, self.hidden, self.head = nn.EmbeddingBag(50, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, tokens, offsets):
        if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
            raise ValueError("offsets begin at 0 and ascend")
        return self.head(torch.relu(self.hidden(self.bag(tokens, offsets))))


class Boxes(nn.Module):
    """Regions around given boxes, which have to be boxes of the image."""

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, images, boxes):
        found = self.features(images).relu()
        parts = [found[0, :, y : y + 2, x : x + 2].mean((1, 2)) for x, y in boxes.tolist()]
        return self.head(torch.stack(parts))


class Detector(nn.Module):
    """Sorts and selects among equal scores; which of them comes first depends on rounding, as here on the channels."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 1), nn.ReLU())
        self.score, self.box = nn.Conv2d(16, 1, 1), nn.Conv2d(16, 4, 1)
        with torch.no_grad():
            self.score.weight.zero_()  # as in a network that was not trained: all scores are equal

    def forward(self, x):
        hidden = self.features(x)
        rounding = 1e-12 * (hidden.shape[1] - 12) * torch.arange(36)
        scores = self.score(hidden).flatten(1).sigmoid() + rounding
        boxes = self.box(hidden).flatten(2)
        top, index = scores.topk(5)
        kept = scores > scores.mean(1, keepdim=True)
        chosen = boxes.gather(2, index[:, None].expand(-1, 4, -1))
        first = boxes[0, :, : int(scores[0].argmax()) + 1].sum(1)
        return {"scores": top, "labels": index, "boxes": chosen, "kept": boxes[0].T[kept[0]], "first": first}


def offsets():
    return {"tokens": torch.arange(10), "offsets": torch.tensor([0, 3, 7, 7])}


def pruned(model, **arguments):
    """Masks and proves: (groups that can go, reasons why others stay)."""
    found = trace(model.eval(), arguments)
    specs = input_specs(found.forwards[0], model, Example.of(**arguments))
    return removable_groups(model, channel_groups(found).prunable, specs), specs


def test_offsets_and_boxes_are_those_of_the_example():
    boxes = {"images": normal(1, 3, 6, 6), "boxes": torch.tensor([[0, 1], [3, 2], [4, 4]])}
    for model, arguments in ((Bags(), offsets()), (Boxes(), boxes)):
        (good, broken), _ = pruned(model, **arguments)
        assert good and not broken


@pytest.mark.parametrize("resumed", [False, True])
def test_strip_after_training_proves_on_the_inputs_of_creation(resumed):
    config = {"compression": {"algorithm": "filter_pruning", "pruning_init": 0.4}}
    controller, _ = create_compressed_model(Bags(), config, init_loader=[offsets()])
    if resumed:
        state = json.loads(json.dumps(controller.get_compression_state()))
        values = controller.model.state_dict()
        controller, model = create_compressed_model(Bags(), config, compression_state=state)
        model.load_state_dict(values)
    expected = controller.model.eval()(**offsets())
    stripped = controller.strip()
    assert stripped.hidden.out_features < 12
    torch.testing.assert_close(stripped(**offsets()), expected)


def test_samples_of_the_example_are_kept_and_repeated():
    images = normal(7, 3, 5, 5)
    found = trace(nn.Conv2d(3, 4, 3).eval(), images)
    (spec,) = input_specs(found.forwards[0], nn.Conv2d(3, 4, 3), Example.of(images))
    assert torch.equal(spec.values, images[:2])
    (small,), _ = example_arguments([spec], None, torch.float64, small=True)
    assert torch.equal(small, images[:2].double())
    (whole,), _ = example_arguments([spec], None, None, small=False)
    assert whole.shape == images.shape and torch.equal(whole[:2], images[:2])
    assert len(whole.flatten(1).unique(dim=0)) == 7  # batch norm makes nothing of equal samples
    assert whole.data_ptr() != spec.values.data_ptr()


def test_what_is_saved_with_the_plan():
    def specs(*tensors):
        return [InputSpec((i,), tuple(t.shape), str(t.dtype)[6:], t) for i, t in enumerate(tensors)]

    few = specs(torch.arange(6).reshape(2, 3), torch.tensor([True, False]), normal(2, 2), torch.tensor(3))
    for spec in few:
        again = InputSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
        assert again == spec and again.values.dtype == spec.values.dtype and torch.equal(again.values, spec.values)
    for spec in specs(normal(100, 100), torch.tensor([1.0, float("inf")])):
        again = InputSpec.from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False)))
        assert again == spec and again.values is None


def test_constant_and_unsuitable_examples_give_random_values():
    model, images = nn.Conv2d(3, 4, 3).eval(), torch.ones(2, 3, 5, 5)
    forward = trace(model, images).forwards[0]

    def fail(model, batch):
        raise KeyError("no such batch")

    for example in (Example.of(images), Example.of(images.double()), Example(images, fail)):
        (spec,) = input_specs(forward, model, example)
        assert spec.values is None
    assert not model._forward_pre_hooks


def test_a_detector_whose_equal_scores_are_ordered_by_rounding():
    (good, broken), _ = pruned(Detector(), x=normal(2, 3, 6, 6))
    assert sorted(group.size for group in good) == [12, 16] and not broken


def test_a_wrong_model_behind_discrete_outputs_is_refused():
    class Wrong(Detector):
        def forward(self, x):
            found = super().forward(x)
            return {**found, "boxes": found["boxes"] * self.features[2].weight.shape[0]}

    class WrongScores(Detector):
        def forward(self, x):
            hidden = self.features(x)
            scores = hidden[:, 0].flatten(1) if hidden.shape[1] == 16 else hidden[:, 1].flatten(1)
            return self.box(hidden).flatten(2).gather(2, scores.topk(5)[1][:, None].expand(-1, 4, -1))

    for cls in (Wrong, WrongScores):
        torch.manual_seed(0)
        model, x = cls().eval(), normal(2, 3, 6, 6)
        found = trace(model, x)
        group = next(group for group in channel_groups(found).groups if group.size == 16)
        gone = {2, 3, 5}
        mask(model, [(group, gone)])
        with pytest.raises(ShrinkError, match="computes something else"):
            prove(model, shrinkage(model, [(group, gone)]), input_specs(found.forwards[0]))


def test_decisions_on_other_values_are_not_replayed():
    recorded = Decisions()
    with recorded, torch.no_grad():
        torch.tensor([3.0, 1.0, 2.0]).argsort()
        torch.tensor([1.0, 1.0]).max(0)
    with Decisions(recorded.found, torch.allclose), torch.no_grad():
        assert torch.tensor([1.0, 2.0, 3.0]).argsort().tolist() == [0, 1, 2]
        assert torch.tensor([1.0, 1.0 + 1e-7]).max(0)[1] == recorded.found["aten.max.dim"][0].results[1]


def test_a_model_without_ties_is_compared_as_it_is(monkeypatch):
    from compress_core.channels import proof

    monkeypatch.setattr(proof, "Decisions", None)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Softmax(1))
    (good, broken), _ = pruned(model, input=normal(2, 3, 5, 5))
    assert len(good) == 1 and not broken


def test_running_means_that_are_zero_but_for_rounding():
    torch.manual_seed(0)
    # What a batch norm has centred is still centred after a convolution without bias, as in MobileNetV2.
    layers = [nn.Conv2d(3, 160, 3, padding=1), nn.BatchNorm2d(160), nn.Conv2d(160, 320, 1, bias=False)]
    layers += [nn.BatchNorm2d(320), nn.ReLU(), nn.Conv2d(320, 4, 1)]
    (good, broken), _ = pruned(nn.Sequential(*layers), input=normal(4, 3, 1, 1))
    assert [group.size for group in good] == [160, 320] and not broken


def test_running_means_that_differ_are_refused():
    class Wrong(nn.Sequential):
        def forward(self, x):
            hidden = self[1](self[0](x) + (self[0].out_channels if self.training else 0))
            return self[2](hidden)

    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
    (good, broken), _ = pruned(Wrong(*layers), x=normal(4, 3, 6, 6))
    assert not good and "running statistics" in broken[0][1]


class Written(nn.Module):
    """Twelve layers one after the other; the sizes of three of them are written in the code."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6 if index else 3, 6) for index in range(13))

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x).relu()
            if index in (2, 7) or (index == 10 and self.training):
                x = x.view(-1, 2, 3).flatten(1)
        return x


def test_few_trials_find_the_sizes_that_are_written_in_the_code(monkeypatch):
    trials, real = [], prove

    def counted(*args, training=True):
        trials.append(training)
        return real(*args, training=training)

    monkeypatch.setattr("compress_core.channels.trials.prove", counted)
    (good, broken), _ = pruned(Written(), x=normal(4, 3))
    names = [group.members[0].parameter for group, _ in broken]
    assert names == [f"layers.{index}.weight" for index in (2, 7, 10)] and len(good) == 9
    assert "eval mode" in broken[0][1] and "training mode" in broken[2][1]
    # All, then three times at most four halvings and all that are left; halvings in eval mode where it fails there.
    assert len(trials) <= 1 + 3 * (4 + 1) and trials.count(False) >= 6
