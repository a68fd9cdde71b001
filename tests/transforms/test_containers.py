"""Whatever kind of container or object a user keeps in a model, it is restored with equal content and identity."""

import argparse
import types
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress_core import create_compressed_model, hookimpl
from compress_core.transforms.containers import SavedContainer
from compress_core.transforms.snapshot import ModelSnapshot


class FrozenDict(OrderedDict):
    """As in diffusers: what it holds are attributes as well, and it refuses to be changed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for key, value in self.items():
            setattr(self, key, value)
        self.__frozen = True

    def _refuse(self, *args, **kwargs):
        raise TypeError("this dict is frozen")

    pop = update = setdefault = __delitem__ = _refuse

    def __setattr__(self, name, value):
        if hasattr(self, "_FrozenDict__frozen"):
            self._refuse()
        super().__setattr__(name, value)

    def __setitem__(self, name, value):
        if hasattr(self, "_FrozenDict__frozen"):
            self._refuse()
        super().__setitem__(name, value)


class FrozenList(list):
    append = extend = insert = clear = __setitem__ = __delitem__ = None


class AttributeDict(dict):
    """As Munch, EasyDict and many others: items are attributes."""

    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__

    def copy(self):
        raise TypeError("no copies")


class Slots:
    __slots__ = ("__weakref__", "unset", "value")

    def __init__(self, value):
        object.__setattr__(self, "value", value)

    def __setattr__(self, name, value):
        raise AttributeError("read-only")


@dataclass(frozen=True, slots=True)
class FrozenSlots:
    values: dict = field(default_factory=dict)


Pair = namedtuple("Pair", "left right")

# Each with how to read it, and how a forward or an algorithm may change it.
KINDS = {
    "dict": (lambda: {"a": 1, "b": 2}, lambda d: list(d.items()), lambda d: d.update(a=3, c=4)),
    "order": (lambda: {"a": 1, "b": 2}, lambda d: list(d.items()), lambda d: d.update(a=d.pop("a"))),
    "OrderedDict": (lambda: OrderedDict(a=1, b=2), lambda d: list(d.items()), lambda d: d.move_to_end("a")),
    "defaultdict": (lambda: defaultdict(list, a=[1]), lambda d: list(d.items()), lambda d: d["x"]),
    "Counter": (lambda: Counter("aab"), dict, lambda d: d.update("zz")),
    "list": (lambda: [1, 2], list, lambda c: c.append(3)),
    "set": (lambda: {1, 2}, sorted, lambda c: c.add(3)),
    "deque": (lambda: deque([1, 2], maxlen=2), list, lambda c: c.append(3)),
    "bytearray": (lambda: bytearray(b"ab"), bytes, lambda c: c.extend(b"c")),
    "FrozenDict": (lambda: FrozenDict(a=1, b=2), lambda d: (list(d.items()), d.a), lambda d: OrderedDict.clear(d)),
    "untouched": (lambda: FrozenDict(a=1, b=2), lambda d: (list(d.items()), d.a), lambda d: None),
    "FrozenList": (lambda: FrozenList([1, 2]), list, lambda c: list.append(c, 3)),
    "AttributeDict": (lambda: AttributeDict(a=1), lambda d: list(d.items()), lambda d: setattr(d, "a", 2)),
    "UserDict": (lambda: UserDict(a=1), dict, lambda d: d.update(b=2)),
    "UserList": (lambda: UserList([1]), list, lambda c: c.append(2)),
    "slots": (lambda: Slots([1]), lambda o: list(o.value), lambda o: object.__setattr__(o, "value", None)),
    "new slot": (lambda: Slots(1), lambda o: hasattr(o, "unset"), lambda o: object.__setattr__(o, "unset", 1)),
    "nested slots": (lambda: Slots([1]), lambda o: list(o.value), lambda o: o.value.append(2)),
    "frozen dataclass": (lambda: FrozenSlots({"a": 1}), lambda o: dict(o.values), lambda o: o.values.clear()),
    "namedtuple": (lambda: Pair([1], {2}), lambda o: (list(o.left), set(o.right)), lambda o: o.left.append(2)),
    "tuple in list": (lambda: [([1],)], lambda o: [list(i) for i, in o], lambda o: o[0][0].append(2)),
    "namespace": (lambda: types.SimpleNamespace(a=1), vars, lambda o: vars(o).update(a=2, b=3)),
    "arguments": (lambda: argparse.Namespace(a=[1]), lambda o: list(o.a), lambda o: o.a.append(2)),
    "tensors": (lambda: {"a": torch.zeros(2)}, lambda d: list(d), lambda d: d.update(a=torch.ones(2), b=1)),
}  # fmt: skip


class Holder(nn.Linear):
    """Keeps its container behind a property, which cannot be set."""

    def __init__(self, kept):
        super().__init__(4, 4)
        self._kept = kept

    @property
    def kept(self):
        return self._kept


class Changing:
    """An observer that changes the container when everything is committed, and fails if asked."""

    def __init__(self, change, fail):
        self.change, self.fail = change, fail

    @hookimpl
    def compress_initialize(self, model):
        self.change(model[0].kept)
        if self.fail:
            raise RuntimeError("injected")


@pytest.mark.parametrize("fail", [False, True], ids=["created", "rolled back"])
@pytest.mark.parametrize("kind", KINDS)
def test_content_and_identity_survive_creation_and_rollback(kind, fail):
    make, read, change = KINDS[kind]
    model = nn.Sequential(Holder(make()))
    kept, before = model[0].kept, read(model[0].kept)
    before = dict(before) if isinstance(before, dict) else before
    config = {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.3}}
    if fail:
        with pytest.raises(RuntimeError, match="injected"):
            create_compressed_model(model, config, observers=[Changing(change, fail)])
    else:
        create_compressed_model(model, config, observers=[Changing(change, fail)])
    assert model[0].kept is kept
    assert type(kept) is type(make())
    assert read(kept) == before


@pytest.mark.parametrize("kind", ["dict", "FrozenDict", "slots", "namespace"])
def test_rollback_by_the_snapshot_alone(kind):
    make, read, change = KINDS[kind]
    model = Holder(make())
    kept, before = model.kept, read(model.kept)
    before = dict(before) if isinstance(before, dict) else before
    snapshot = ModelSnapshot(model)
    change(kept)
    object.__setattr__(model, "_kept", None)
    snapshot.restore()
    assert model.kept is kept
    assert read(kept) == before


keys, values = st.integers(0, 5), st.integers()
CONTENTS = st.one_of(
    st.dictionaries(keys, values),
    st.dictionaries(keys, values).map(OrderedDict),
    st.lists(keys).map(Counter),
    st.lists(values),
    st.sets(values),
    st.lists(values).map(deque),
    st.binary().map(bytearray),
)


@given(CONTENTS, st.data())
def test_any_content_comes_back_after_any_change(container, data):
    def content():
        if isinstance(container, dict):
            return list(container.items())
        # The order of a set is not its content: it depends on what was in it before.
        return type(container), set(container) if isinstance(container, set) else list(container)

    before = content()
    saved = SavedContainer(container)
    assert saved.is_same()
    if isinstance(container, dict):
        for key in data.draw(st.lists(keys)):
            if key in container and data.draw(st.booleans()):
                del container[key]
            else:
                container[key] = data.draw(values)
    elif isinstance(container, set):
        container.symmetric_difference_update(data.draw(st.sets(values)))
    elif container and data.draw(st.booleans()):
        container.pop()
    else:
        container.append(data.draw(st.integers(0, 255)))
    saved.restore()
    assert saved.is_same()
    assert content() == before
