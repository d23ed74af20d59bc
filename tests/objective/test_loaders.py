"""Claim: what yields batches is a loader, is not started to look at it, and says how many it has if it knows."""

from itertools import count

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lmc_curvature import Objective
from lmc_curvature.errors import LoaderError
from lmc_curvature.objective.loaders import check_loader, loader_length, refuse_iterator
from tests.support.networks import rng_states

X, Y = torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (5, "loader is an object of type int; expected an iterable.*DataLoader"),
        ((X, Y), r"a pair of tensors; a single batch\? Put it into a list: \[\(x, y\)\]"),
        ((X, X[:, :1]), r"a pair of tensors; a single batch\?"),
        (TensorDataset(X, Y), r"data set \(TensorDataset\), which yields examples.*DataLoader\(dataset"),
    ],
)
def test_what_yields_no_batches_is_no_loader(loader, message):
    with pytest.raises(LoaderError, match=message):
        check_loader(loader, None)


@pytest.mark.parametrize(
    "loader",
    [
        [X],
        [(X, Y)],
        [X, Y],
        (X, X),
        (X, X[:3]),
        ((X, Y), (X, Y)),
        (x for x in X),
        Stream(),
        DataLoader(TensorDataset(X)),
    ],
)
def test_what_can_be_iterated_over_is_a_loader(loader):
    check_loader(loader, None)


@pytest.mark.parametrize(
    ("loader", "max_batches", "length"),
    [
        ([1, 2, 3], None, 3),
        ([1, 2, 3], 2, 2),
        ([1, 2, 3], 9, 3),
        (count(), None, None),
        (count(), 4, 4),
        (DataLoader(Stream()), None, None),
        (DataLoader(TensorDataset(X, Y), batch_size=2), None, 3),
    ],
)
def test_length_of_a_visit(loader, max_batches, length):
    assert loader_length(loader, max_batches) == length


@pytest.mark.parametrize("loader", [iter([X]), (x for x in X), map(len, X)])
def test_iterators_are_refused_with_the_reason(loader):
    with pytest.raises(LoaderError, match="^because, and an iterator can be visited only once: pass a list or a DataL"):
        refuse_iterator(loader, "because")


@pytest.mark.parametrize("loader", [[X], DataLoader(TensorDataset(X), shuffle=True), range(3)])
def test_what_can_be_visited_again_is_not_started(loader):
    before = rng_states()
    refuse_iterator(loader, "because")
    assert rng_states() == before


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_with_what_to_do(layout):
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=layout)
    with pytest.raises(LoaderError, match="Batch 0 of the loader holds nested tensors.*pad them"):
        Objective(torch.nn.Linear(3, 2), [(nested, torch.arange(2))]).loss()
