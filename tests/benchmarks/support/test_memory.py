import pytest
import torch

from benchmarks.support import memory

CPU = torch.device("cpu")


@pytest.mark.check
def test_peak_is_what_lives_at_once():
    count, size = 1000, 4 * 1000

    def three_at_once():
        first = torch.zeros(count)
        second = torch.zeros(count)
        del first
        third, fourth = torch.zeros(count), torch.zeros(count)
        return second, third, fourth

    kept = torch.zeros(10 * count)
    assert memory.peak_bytes(lambda: torch.zeros(count), CPU) == size
    assert memory.peak_bytes(three_at_once, CPU) == 3 * size
    assert len(kept) == 10 * count


@pytest.mark.check
def test_columns_are_cut_to_the_memory_that_is_free():
    def work(columns):
        return torch.zeros(columns, 1000)

    assert memory.columns_that_fit(work, 100, CPU, free=30 * 4000.0) == 20
    assert memory.columns_that_fit(work, 7, CPU, free=30 * 4000.0) == 7
    assert memory.columns_that_fit(work, 7, CPU) == 7


def test_what_graphs_keep_is_in_pools_of_their_own(monkeypatch):
    segments = [(100, (0, 0), 0), (7, (0, 1), 0), (5, (3, 0), 0), (1000, (0, 2), 1)]
    keys = ("total_size", "segment_pool_id", "device")
    snapshot = [dict(zip(keys, segment, strict=True)) for segment in segments]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: snapshot)
    assert memory.graph_pool_bytes(torch.device("cuda")) == 12
    assert memory.graph_pool_bytes(torch.device("cuda:1")) == 1000
    assert memory.graph_pool_bytes(CPU) == 0


def test_of_what_fails_a_single_column_is_tried():
    def fails(columns):
        raise RuntimeError("no such kernel")

    assert memory.columns_that_fit(fails, 10, CPU) == 1
