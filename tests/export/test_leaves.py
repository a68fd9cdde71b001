"""Exports of models that take and return what is no tensor with a batch dimension: scalars, numbers, strings, None."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import ExportError
from tests.onnx_helpers import Wired

pytestmark = pytest.mark.usefixtures("fast_exporter")

Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class Attributes(collections.UserDict):
    """A mapping that torch's trees do not know."""


def returning(outputs):
    """A model that returns what `outputs(x, y)` makes of its input and of a layer's output."""
    torch.manual_seed(0)
    return Wired(lambda self, x: outputs(x, self.layer(x)), layer=nn.Linear(8, 4))


def ids_and_labels():
    torch.manual_seed(0)
    return {"input_ids": torch.randint(0, 10, (4, 5)), "labels": torch.randint(0, 4, (4,))}


class Classifier(nn.Module):
    """Called as Hugging Face's models are: with labels, and further arguments that it takes by name."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, input_ids, labels=None, **more):
        hidden = self.embedding(input_ids)
        if "scale" in more:
            hidden = hidden * more["scale"] * more.get("factor", 1)
        if more.get("positions") is not None:
            hidden = hidden + self.embedding(more["positions"])
        logits = self.head(hidden.mean(1))
        found = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**found, "logits": logits}


def test_a_model_that_returns_its_loss(exported):
    batch = ids_and_labels()
    model = Classifier()
    report, file = exported(model, batch)
    assert report.inputs == ("input_ids", "labels") and not report.notes
    with torch.no_grad():
        expected = model(**batch)
    loss, logits = file.run(*batch.values())
    assert loss.shape == ()
    np.testing.assert_allclose(loss, expected["loss"].numpy(), rtol=1e-5)
    np.testing.assert_allclose(logits, expected["logits"].numpy(), rtol=1e-4, atol=1e-6)


def test_tensors_of_any_kind_and_container_are_outputs(exported):
    def outputs(x, y):
        return {
            "mean": y.mean(),
            "any": (y > 0).any(),
            "best": y.argmax(),
            "classes": [y.argmax(-1), (y > 0, Pair(y, y * 2))],
            "object": Output(y + 1),
            "mapping": Attributes(a=x.view(-1), b={"c": torch.tensor(2.5)}),
            "none": None,
            "empty": [(), {}, y[:, :0]],
        }

    model, x = returning(outputs), torch.randn(4, 8)
    report, file = exported(model, x)
    found = file.run(x)
    with torch.no_grad():
        made = model(x)
    given, classes = made["mapping"], made["classes"]
    expected = [made["mean"], made["any"], made["best"], classes[0], classes[1][0], *classes[1][1]]
    expected += [made["object"].logits, given["a"], given["b"]["c"], made["empty"][2]]
    assert not report.notes and len(found) == len(expected)
    for actual, tensor in zip(found, expected, strict=True):
        assert actual.shape == tuple(tensor.shape)
        np.testing.assert_allclose(actual, tensor.numpy(), rtol=1e-5, atol=1e-6)


def test_the_input_itself_and_one_tensor_twice_are_outputs(exported):
    x = torch.randn(4, 8)
    _, file = exported(returning(lambda x, y: (y, x, y, x[:, 1:3])), x)
    first, own, again, part = file.run(x)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(own, x.numpy())
    np.testing.assert_array_equal(part, x[:, 1:3].numpy())


def test_what_is_no_tensor_is_left_out_and_said(exported):
    report, file = exported(returning(lambda x, y: {"y": y, "n": 3, "s": ["name", x.shape[0], True]}), torch.ones(4, 8))
    (note,) = report.notes
    assert note.startswith("leaves out what is no tensor")
    for text in ("output['n'] = 3", "output['s'][0] = 'name'", "output['s'][1] = 4", "output['s'][2] = True"):
        assert text in note
    assert note in report.to_str() and len(file.graph.output) == 1


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda x, y: 3, r"Wired returns no tensor \(output = 3\)"),
        (lambda x, y: None, r"Wired returns no tensor \(nothing\)"),
        (lambda x, y: torch.complex(y, y), "returns a complex tensor.*view_as_real"),
    ],
)
def test_outputs_that_no_file_can_hold(exported, outputs, message):
    with pytest.raises(ExportError, match=message):
        exported(returning(outputs), torch.ones(4, 8))


def test_arguments_without_a_batch_dimension(exported):
    batch = {
        "positions": torch.arange(5)[None],
        "input_ids": ids_and_labels()["input_ids"],
        "scale": torch.tensor(2.0),
        "factor": 1.5,
    }
    model = Classifier()
    report, file = exported(model, batch)
    assert report.notes == ("holds as constants what is no tensor: argument ['factor'] = 1.5",)
    assert {agreement.batch_size for agreement in report.agreements} == {4, 1}
    assert set(report.inputs) == {"input_ids", "positions", "scale"}
    order = {name: batch[name] for name in report.inputs}
    order["input_ids"] = order["input_ids"].repeat(2, 1)
    with torch.no_grad():
        expected = model(**order, factor=1.5)["logits"]
    np.testing.assert_allclose(file.run(*order.values())[0], expected.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (np.ones(3), r"cannot export Wired to ONNX with argument \[1\] \(ndarray\): arguments have to be tensors"),
        (Output(torch.ones(4, 8)), r"with argument \[1\] \(Output\)"),
    ],
)
def test_arguments_that_cannot_be_exported_are_named(exported, argument, message):
    model = Wired(lambda self, x, other: self.layer(x), layer=nn.Linear(8, 4))
    with pytest.raises(ExportError, match=message):
        exported(model, (torch.ones(4, 8), argument))


def test_without_a_tensor_among_the_arguments_their_types_are_said(exported):
    model = Wired(lambda self, given: self.layer(given.logits), layer=nn.Linear(8, 4))
    with pytest.raises(ExportError, match=r"without a tensor, but with argument \[0\] \(Output\)"):
        exported(model, (Output(torch.ones(4, 8)),))


def test_a_model_that_writes_to_arguments_without_dimensions(exported):
    scale = torch.tensor(2.0)
    model = Wired(lambda self, scale, x: self.layer(x) * scale.mul_(2), layer=nn.Linear(8, 4))
    exported(model, (scale, torch.randn(4, 8)))
    assert scale == 2
