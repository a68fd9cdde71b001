"""What has been read of a config, and what it did."""

import json

from pydantic import Field

from compress_core import (
    Section,
    create_compressed_model,
)
from tests.config.document_helpers import section
from tests.zoo import ResidualNet


def test_ledger_tells_for_each_value_what_it_did():
    config = section(ignored_scopes=["{re}fc"], sparsity_init=0.25) | {"input_info": {"sample_size": [1, 3, 8, 8]}}
    controller, _ = create_compressed_model(ResidualNet(), config)
    entry = controller.ledger["compression.magnitude_sparsity.sparsity_init"]
    assert entry.modules == ("conv1.weight", "conv2.weight")
    assert controller.ledger["compression.magnitude_sparsity.ignored_scopes.0"].modules == ("fc",)
    assert controller.ledger["input_info.0.sample_size"].effect == "no algorithm of this config uses it"
    assert json.loads(json.dumps(controller.statistics().to_dict()))["ledger"]["input_info.0.sample_size"]["value"] == [
        1,
        3,
        8,
        8,
    ]
    assert "compression.magnitude_sparsity.sparsity_init" in controller.statistics().to_str()


# What has been read.


class Item(Section):
    size: int = 1
    name: str = ""


class Whole(Section):
    items: list[Item] = Field(default_factory=list)
    named: dict[str, Item] = Field(default_factory=dict)
    pairs: list[tuple[int, str]] = Field(default_factory=list)
    groups: list[list[str]] = Field(default_factory=list)
    plain: list[int] = Field(default_factory=list)
    one: Item = Item()


WHOLE = {
    "items": [{"size": 2, "name": "a"}, {"size": 3}],
    "named": {"x": {"size": 4}, "y.z": {"name": "b"}},
    "pairs": [(4, "a"), (8, "b")],
    "groups": [["a", "b"], ["c"]],
    "plain": [1, 2],
    "one": {"size": 5},
}


def read_leaves(section):
    return {leaf for leaf, _, read in section.given_leaves() if read}


def test_leaves_in_lists_and_dicts_are_told_apart():
    whole = Whole.model_validate(WHOLE)
    assert {leaf: value for leaf, value, _ in whole.given_leaves()} == {
        "items.0.size": 2,
        "items.0.name": "a",
        "items.1.size": 3,
        "named.x.size": 4,
        "named.y.z.name": "b",
        "pairs.0": (4, "a"),
        "pairs.1": (8, "b"),
        "groups.0": ["a", "b"],
        "groups.1": ["c"],
        "plain": [1, 2],
        "one.size": 5,
    }
    assert whole.items[1].size == 3
    assert whole.named["y.z"].name == "b"
    assert read_leaves(whole) == {"items.1.size", "named.y.z.name"}


def test_looking_at_a_copy_leaves_no_trace_on_the_section():
    whole = Whole.model_validate(WHOLE)
    _ = whole.plain, whole.items[0].size
    copy = whole.unread()
    assert read_leaves(copy) == set()
    for item in (*copy.items, *copy.named.values(), copy.one):
        _ = item.size, item.name
    _ = copy.pairs, copy.groups, copy.plain
    assert read_leaves(copy) == {leaf for leaf, _, _ in whole.given_leaves()}
    assert read_leaves(whole) == {"plain", "items.0.size"}
    assert copy.model_dump() == whole.model_dump()
