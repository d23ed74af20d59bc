"""Claim: a value is made once, and what was asked for least recently makes room."""

import pytest

from lmc_curvature.objective.memo import Memo


def test_a_value_is_made_once():
    memo, made = Memo(), []
    for _ in range(2):
        assert memo("key", lambda: made.append(1)) is None
    assert made == [1]
    assert memo(("key", 2), lambda: "another") == "another"


def test_a_value_that_cannot_be_made_is_tried_again():
    memo = Memo()
    with pytest.raises(ZeroDivisionError):
        memo("key", lambda: 1 / 0)
    assert memo("key", lambda: 3) == 3


def test_what_was_asked_for_least_recently_goes():
    memo = Memo(most=2)
    for key in "abac":
        memo(key, lambda key=key: key)
    assert memo("a", lambda: "made again") == "a"
    assert memo("b", lambda: "made again") == "made again"


def test_a_value_is_replaced():
    memo = Memo()
    memo("key", lambda: 1)
    assert memo.replace("key", 2) == 2
    assert memo("key", lambda: 3) == 2
