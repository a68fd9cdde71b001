"""What a choice that needs data returns is checked."""

from types import SimpleNamespace

import pytest
import torch

from compress_core import PluginError
from compress_core.channels import ChannelGroup, Member
from compress_filter_pruning.importance import POINT
from compress_filter_pruning.measured import measured_importances

GROUP = ChannelGroup(3, (Member("conv.weight", 0, torch.arange(3).numpy()),))


def measured(*found):
    choice = SimpleNamespace(measure=lambda request: list(found))
    return measured_importances(choice, "mine", SimpleNamespace(groups=[GROUP]))


def test_one_number_for_each_channel_is_taken_as_float64():
    (values,) = measured(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16))
    assert values.dtype == torch.float64
    assert values.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ((), "'mine' returned 0 tensors for 1 groups"),
        ((torch.ones(2),), r"'mine' returned \(2,\) for the 3 channels of the group of 'conv.weight'"),
        ((torch.ones(3, 1),), r"'mine' returned \(3, 1\) for the 3 channels"),
        (([1, 2, 3],), "'mine' returned list for the 3 channels"),
        ((torch.tensor([1, float("nan"), 2]),), "'mine' returned NaN or infinity for the group of 'conv.weight'"),
    ],
)
def test_anything_else_is_refused(found, message):
    with pytest.raises(PluginError, match=message):
        measured(*found)


def test_a_choice_is_a_function_or_an_object_that_measures():
    assert POINT.check(abs) is None
    assert POINT.check(SimpleNamespace(measure=abs)) is None
    assert "callable" in str(POINT.check(3))
