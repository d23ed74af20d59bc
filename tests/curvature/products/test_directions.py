"""Claim: ranges of unit vectors hold every coordinate of their entries, once and in order."""

import pytest
import torch

from lmc_curvature.curvature.products import StackedDirections, UnitVectors, places_of, unit_vectors

TENSORS = {"a": torch.zeros(2, 3), "none": torch.zeros(0), "b": torch.zeros(()), "c": torch.zeros(5).double()}


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_ranges_hold_every_coordinate_once(size):
    rows = []
    for start in range(0, 12, size):
        units = UnitVectors(TENSORS, start, min(start + size, 12))
        stacked = units.stacked(0, len(units))
        assert tuple(stacked) == units.entries
        assert all(stacked[name].dtype == TENSORS[name].dtype for name in stacked)
        parts = [
            stacked.get(name, torch.zeros(len(units), *t.shape)).flatten(1) for name, t in TENSORS.items() if t.ndim
        ]
        b = stacked.get("b", torch.zeros(len(units))).view(-1, 1)
        rows.append(torch.cat([parts[0], b, parts[2].float()], dim=1))
    torch.testing.assert_close(torch.cat(rows), torch.eye(12))
    assert len(unit_vectors(TENSORS)) == 12


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (0, 3), (2, 5), (4, 5), (4, 8), (6, 7)])
def test_a_range_of_a_range(start, stop):
    tensors = {"w": torch.zeros(2, 3), "s": torch.zeros(()), "b": torch.zeros(4)}
    units = UnitVectors(tensors, 2, 10)
    chosen = torch.arange(2, 10)[start:stop]
    w, s, b = torch.eye(11)[chosen].split([6, 1, 4], dim=1)
    expected = {"w": w.reshape(-1, 2, 3), "s": s.reshape(-1), "b": b}
    torch.testing.assert_close(units.stacked(start, stop), expected)
    places = places_of(tensors)
    for name, vectors, coordinates in units.within(start, stop):
        first = places[name].start
        assert chosen[vectors].tolist() == list(range(first + coordinates.start, first + coordinates.stop))


def test_unit_vectors_of_each_entry_by_itself():
    parts = UnitVectors(TENSORS, 4, 9).by_entry()
    assert [(part.entries, part.start, part.stop) for part in parts] == [(("a",), 4, 6), (("b",), 0, 1), (("c",), 0, 2)]
    torch.testing.assert_close(parts[0].stacked(1, 2), {"a": torch.eye(6)[5:].view(1, 2, 3)})


def test_directions_that_are_stacked_already():
    directions = StackedDirections({"a": torch.arange(6.0).view(3, 2), "b": torch.arange(3.0)})
    assert (directions.entries, len(directions)) == (("a", "b"), 3)
    torch.testing.assert_close(directions.stacked(1, 2), {"a": torch.tensor([[2.0, 3.0]]), "b": torch.tensor([1.0])})
