import time

import pytest
import torch

from benchmarks.support import profiling


@pytest.mark.parametrize(
    ("spans", "expected"),
    [([], 0), ([(0, 2), (5, 6)], 3), ([(5, 6), (0, 2), (1, 4)], 5), ([(0, 10), (2, 3), (10, 11)], 11)],
)
def test_the_union_of_spans(spans, expected):
    assert profiling.covered(spans) == expected


def test_operators_within_operators_count_once():
    x = torch.randn(400, 400)
    busy = profiling.occupation(lambda: [x @ x for _ in range(5)], torch.device("cpu"))
    assert 0.5 < busy.share < 2

    def idle():
        time.sleep(0.05)
        return x + 1

    assert profiling.occupation(idle, torch.device("cpu")).share < 0.5


def test_a_call_without_operators_has_no_share():
    share = profiling.occupation(lambda: None, torch.device("cpu")).share
    assert share != share
