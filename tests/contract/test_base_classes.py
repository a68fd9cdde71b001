"""What base classes leave to a third party's class is named when it is missing."""

import pytest

from compress_core import AlgorithmConfig
from compress_core.contract.levels import LevelAlgorithm
from compress_core.contract.masked_weights import MaskingAlgorithm
from compress_core.contract.scheduled_sparsity import ScheduledSparsity


@pytest.mark.parametrize(
    ("base", "method", "arguments"),
    [
        (LevelAlgorithm, "level", ()),
        (LevelAlgorithm, "set_level", (0.5,)),
        (MaskingAlgorithm, "kept", ("fc.weight",)),
        (ScheduledSparsity, "follow_schedule", (0.5, (0, 0))),
        (ScheduledSparsity, "set_sparsity_level", (0.5,)),
    ],
)
def test_a_method_that_is_missing_is_named(base, method, arguments):
    mine = type("Mine", (base,), {"name": "mine"})
    with pytest.raises(NotImplementedError, match=rf"^Mine must implement {method}\("):
        getattr(mine(AlgorithmConfig(algorithm="mine")), method)(*arguments)
