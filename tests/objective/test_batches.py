"""Claim: batches of any form are counted, described and moved without changing what they are."""

import re
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, Objective, predict_barrier
from lmc_curvature.errors import LoaderError
from lmc_curvature.objective.batches import (
    Batch,
    check_first_axes,
    count_examples,
    describe,
    first_rows,
    map_tensors,
    place_data,
    tensors_in,
    to_device,
)
from tests.support.networks import randomized

Pair = namedtuple("Pair", ["x", "y"])
X, Y = torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)


def test_long_mappings_are_described_by_their_first_keys():
    assert describe({str(key): key for key in range(9)}) == "a mapping with keys '0', '1', '2', '3', '4', '5'"


def test_mapping_keeps_the_form_and_touches_only_tensors():
    data = {"pair": Pair(X, "text"), "list": [Y, (1.5, None)], "user": UserDict(x=X)}
    moved = map_tensors(lambda tensor: tensor + 1, data)
    assert type(moved["pair"]) is Pair
    assert moved["pair"].y == "text"
    assert moved["list"][1] == (1.5, None)
    assert isinstance(moved["list"], list)
    assert type(moved["user"]) is UserDict
    for tensor in (moved["pair"].x, moved["list"][0], moved["user"]["x"]):
        assert (tensor == 1).all()
    assert (data["pair"].x == 0).all()


@dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    note: str = "text"


class Frames(OrderedDict):
    """As outputs of transformers are: keys that are attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class Fixed(Mapping):
    """It can be copied and not filled."""

    def __getitem__(self, key):
        return {"x": X}[key]

    def __iter__(self):
        return iter(["x"])

    def __len__(self):
        return 1


OBJECTS = {
    "dataclass": lambda: Frozen(X),
    "namespace": lambda: SimpleNamespace(x=X, note="text"),
    "mapping": lambda: Frames(x=X, note="text"),
    "output": lambda: pytest.importorskip("transformers").modeling_outputs.BaseModelOutput(X),
    "encoding": lambda: pytest.importorskip("transformers").BatchEncoding({"x": X}),
}


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_objects_with_tensors_stay_what_they_are(make):
    data = make()
    moved = map_tensors(lambda tensor: tensor + 1, [data])[0]
    name = "x" if hasattr(data, "x") else "last_hidden_state"
    assert type(moved) is type(data)
    assert (getattr(moved, name) == 1).all()
    assert (getattr(data, name) == 0).all()
    assert getattr(moved, "note", "text") == "text"
    assert tensors_in(data)[0] is X
    if isinstance(data, Mapping):
        assert (moved[name] == 1).all()
        assert (data[name] == 0).all()


class Listed(list):
    scale = 1.0


class Tupled(tuple):
    def __new__(cls, items, scale=1.0):
        made = super().__new__(cls, items)
        made.scale = scale
        return made


class Named(Pair):
    scale = 1.0


class User(UserDict):
    scale = 1.0


class Within(Mapping):
    """Its items are in an attribute, and it cannot be filled."""

    def __init__(self, *pairs, scale=1.0):
        self._items, self.scale = dict(pairs), scale

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class Doubling(list):
    def __init__(self, items):
        super().__init__(2 * item for item in items)

    def append(self, item):
        super().append(2 * item)

    def __setitem__(self, key, item):
        super().__setitem__(key, 2 * item)


class Tripled(tuple):
    def __new__(cls, items):
        return super().__new__(cls, (3 * item for item in items))


class Putting(dict):
    def __setitem__(self, key, item):
        super().__setitem__(key, 2 * item)


class Getting(dict):
    def __getitem__(self, key):
        return 2 * super().__getitem__(key)


class Owned(list):
    def __init__(self, owner, items):
        super().__init__(items)
        self.owner = owner


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (Doubling([X + 1]), 3),
        (Tripled([X + 1]), 4),
        (Putting({0: X}), 1),
        (Getting({0: X + 1}), 4),
        (Owned("me", [X]), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_classes_that_change_what_they_are_given_are_copied_as_they_are(data, expected):
    moved = map_tensors(lambda tensor: tensor + 1, map_tensors(torch.clone, data))
    assert type(moved) is type(data)
    assert (moved[0] == expected).all()


class Computed(Fixed):
    scale = 1.0


@pytest.mark.parametrize(
    "make",
    [lambda: Listed([X]), lambda: Tupled([X]), lambda: Named(X, 1), lambda: User({0: X}), lambda: Within((0, X))],
)
def test_attributes_of_users_own_classes_are_kept(make):
    data = make()
    data.scale = 2.0
    moved = map_tensors(lambda tensor: tensor + 1, {"x": data})["x"]
    assert (type(moved), moved.scale) == (type(data), 2.0)
    assert (moved[0] == 1).all()
    assert (data[0] == 0).all()


def test_what_stands_for_missing_items_is_kept():
    moved = map_tensors(lambda tensor: tensor + 1, defaultdict(lambda: 2.0, x=X))
    assert (moved["x"] == 1).all()
    assert moved["scale"] == 2.0


def test_attributes_that_would_be_lost_are_refused():
    data = Computed()
    assert type(map_tensors(torch.clone, data)) is dict
    data.scale = 2.0
    with pytest.raises(LoaderError, match="A Computed cannot be copied"):
        map_tensors(torch.clone, data)


class Marked(torch.Tensor):
    """A class of tensors whose instances have attributes."""


@pytest.mark.parametrize("kind", [torch.Tensor, Marked])
@pytest.mark.parametrize(
    "function", [torch.clone, lambda t: t[:2], lambda t: t.to(torch.float64), lambda t: t.detach()]
)
def test_attributes_of_tensors_are_kept(function, kind):
    tensor = X.clone().as_subclass(kind)
    tensor.lengths, tensor.note = [3, 2], "text"
    moved = map_tensors(function, {"x": (tensor, X)})["x"]
    assert (moved[0].lengths, moved[0].note) == ([3, 2], "text")
    assert not vars(moved[1])
    assert not vars(X)


def test_a_network_sees_the_attributes_of_its_inputs():
    class Scaling(nn.Linear):
        def forward(self, input):
            return getattr(input, "k", 1.0) * super().forward(input)

    model = Scaling(2, 3)
    batches = [(torch.randn(4, 2), torch.arange(4) % 3) for _ in range(2)]
    for k, (x, _) in enumerate(batches):
        x.k = 2.0 + k
    with torch.no_grad():
        expected = sum(F.cross_entropy(x.k * F.linear(x, model.weight, model.bias), y).item() for x, y in batches) / 2
    assert Objective(model, batches).loss() == pytest.approx(expected, rel=1e-6)


def test_mappings_that_take_no_values_become_dicts():
    assert map_tensors(lambda tensor: tensor.shape, Fixed()) == {"x": X.shape}
    assert map_tensors(lambda tensor: tensor, Frozen) is Frozen


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
        (torch.int64, torch.int64),
        (torch.bool, torch.bool),
        (torch.complex64, torch.complex64),
    ],
)
def test_only_floating_point_tensors_change_type(dtype, expected):
    assert to_device(torch.ones(2, dtype=dtype), torch.device("cpu"), torch.float64).dtype == expected


def test_tensors_are_found_in_their_order():
    assert [tensor.shape for tensor in tensors_in({"a": [Y, "text"], "b": Pair(3, X)})] == [Y.shape, X.shape]
    assert Batch(4, 5, (X, Y)).kind == (X.shape, Y.shape)
    assert Batch(4, 5, ["text"]).kind == (4,)


@pytest.mark.parametrize(
    "data",
    [(X, Y), [X, Y], Pair(X, Y), ({"mask": None, "ids": X}, Y), ((["text"], X), Y), ("five words", Y)],
)
def test_pairs_count_their_first_tensor(data):
    assert count_examples(data, 0) == 5


@pytest.mark.parametrize("data", [X, {"name": "a", "ids": X}, [X, Y, Y], UserDict(ids=X)])
def test_other_forms_count_their_first_tensor(data):
    assert count_examples(data, 0, any_form=True) == 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            X,
            r"Batch 3 of the loader is a tensor of shape \(5, 2\) and type torch.float32; expected an \(x, y\) pair",
        ),
        ((X, Y, Y), r"is a tuple of length 3; expected an \(x, y\) pair.*loss_fn=BatchLoss\(fn\)"),
        ([X], "is a list of length 1; expected"),
        ({"x": X, "y": Y}, "is a mapping with keys 'x', 'y'; expected"),
        ("xy", "is an object of type str; expected"),
        (None, "is an object of type NoneType; expected"),
        (("a", "b"), "is a tuple of length 2, without a tensor whose leading dimension.*size="),
        ((torch.tensor(1.0), Y), "without a tensor whose leading dimension"),
        ((X[:0], Y[:0]), "Batch 3 of the loader holds 0 examples; expected at least one"),
    ],
)
def test_what_is_no_pair_of_examples_is_described(data, message):
    with pytest.raises(LoaderError, match=message):
        count_examples(data, 3)


@pytest.mark.parametrize(
    ("data", "message"), [({"a": [1, 2]}, "mapping with keys 'a', without"), (3, "type int, with")]
)
def test_what_cannot_be_counted_is_described(data, message):
    with pytest.raises(LoaderError, match=f"Batch 2 .*{message}.*BatchLoss"):
        count_examples(data, 2, any_form=True)


@pytest.mark.parametrize(
    "data",
    [
        (torch.zeros(6, 11, 3), torch.zeros(11)),
        (X, torch.zeros(10)),
        ({"mask": None, "ids": X}, {"y": torch.zeros(4, 2)}),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], [{"boxes": torch.zeros(2, 4)}, {"boxes": torch.zeros(1, 4)}]),
        ((torch.zeros(2, 12), X), Y),
    ],
)
def test_first_axes_that_are_not_the_examples_are_refused(data):
    x, y = (tuple(tensors_in(part)[0].shape) for part in data)
    message = f"Batch 3 .* x of shape {x} and y of shape {y}.*batch_first=True.*BatchLoss(fn, size=...)"
    with pytest.raises(LoaderError, match=re.escape(message).replace(re.escape(".*"), ".*")):
        count_examples(data, 3)
    # Nor is it known what counts in a batch of any form, unless it is seen in its loss.
    assert count_examples(data, 3, any_form=True) == x[0]
    with pytest.raises(LoaderError, match=rf"Batch 4 .* shapes {re.escape(str(x))}, .*BatchLoss\(fn, size="):
        check_first_axes(data, 4)


EDGES = torch.zeros(2, 30)


@pytest.mark.parametrize(
    "data",
    [
        {"x": X, "edge_index": EDGES, "batch": Y, "y": torch.zeros(3, 1)},
        (EDGES, X, Y),
        (X, torch.zeros(2)),
        (X, torch.zeros(2, 1)),
        (X, torch.zeros(1, 1)),
        (X, torch.zeros(3, 3)),
        SimpleNamespace(x=X, y=torch.zeros(1)),
    ],
)
def test_first_axes_that_differ_are_refused(data):
    with pytest.raises(LoaderError, match=r"Batch 2 .*first axes differ.*BatchLoss\(fn, size=\.\.\.\)"):
        check_first_axes(data, 2)


@pytest.mark.parametrize(
    "shared",
    [Y, torch.tensor(2.0), torch.zeros(7, 7), torch.zeros(1, 7), torch.zeros(1, 1, 7, 7)],
)
def test_what_belongs_to_all_examples_is_not_refused(shared):
    check_first_axes({"ids": torch.zeros(5, 7), "note": "text", "shared": shared}, 2)


def test_first_rows_are_those_of_a_batch_whose_tensors_have_as_many():
    few, count = first_rows({"x": X, "pair": (Y, "text")}, 5, 3)
    assert (len(few["x"]), len(few["pair"][0]), few["pair"][1], count) == (3, 3, "text", 3)
    assert first_rows((X, Y), 5, 8)[1] == 5
    # Edges would point to nodes that are not there.
    graph = ({"nodes": X, "edges": torch.tensor([[0, 4], [4, 0]])}, Y)
    assert first_rows(graph, 5, 3) == (graph, 5)


def test_one_graph_with_one_target_is_a_batch_of_one():
    assert count_examples((torch.zeros(1, 4), torch.zeros(())), 0) == 1


def test_a_batch_weighs_its_examples_unless_it_is_said():
    assert Batch(0, 5, None).weight == 5.0
    assert Batch(0, 5, None, 2.5).weight == 2.5
    assert Batch(0, 5, None).is_first
    assert not Batch(2, 5, None, skipped=1).is_first
    assert Batch(2, 5, None, skipped=2).is_first


@pytest.mark.parametrize(
    "column",
    {
        "names of rows": torch.arange(40).double() * 3 + 10**8 + 1,
        "seconds since 1970": 1.7e9 + 200 * torch.randn(40, generator=torch.Generator().manual_seed(0)).double(),
    }.values(),
)
def test_data_that_lose_what_tells_them_apart_are_refused(column):
    data = torch.stack([torch.linspace(-1, 1, 40).double(), column], 1)
    device = torch.device("cpu")
    with pytest.raises(LoaderError, match="in float64, which float32 makes .*dtype=torch.float64"):
        place_data(data, device, torch.float32)
    assert place_data(data, device, torch.float64) is data


def test_data_in_float64_are_otherwise_rounded():
    data = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    data[0, 0], data[:, 1] = torch.nan, 7.3
    placed = place_data(data, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(placed.double(), data, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert place_data(torch.tensor(0.1).double(), torch.device("cpu"), torch.float32).dtype == torch.float32


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_neighbours_give_what_dense_ones_do(layout):
    torch.manual_seed(0)
    pair = [randomized(torch.nn.Linear(4, 3), seed).double() for seed in (0, 1)]
    x, near = torch.randn(8, 4, dtype=torch.float64), torch.eye(8, dtype=torch.float64).roll(1, 0)
    loss = BatchLoss(lambda network, batch: F.cross_entropy(batch[0] @ network(batch[1]), batch[2]), size=lambda _: 8)
    dense, sparse = (
        predict_barrier(*pair, [(given, x, torch.arange(8) % 3)], loss_fn=loss, progress=False).curve([0.5])
        for given in (near, getattr(near, layout)())
    )
    assert sparse == pytest.approx(dense, rel=1e-9)
