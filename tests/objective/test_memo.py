"""Claim: a memo makes a value once, keeps what was asked for lately, and nothing that could not be made."""

import pytest

from lmc_curvature.objective.memo import Memo


def _never():
    pytest.fail("made again")


def test_a_value_is_made_once():
    memo = Memo()
    assert memo("a", lambda: [1]) is memo("a", _never)


def test_none_is_a_value_too():
    memo = Memo()
    assert memo("a", lambda: None) is None
    assert memo("a", _never) is None


def test_what_make_raises_is_raised_and_nothing_is_kept():
    memo = Memo()
    with pytest.raises(ZeroDivisionError):
        memo("a", lambda: 1 / 0)
    assert memo("a", lambda: 2) == 2


def test_a_value_may_be_replaced():
    memo = Memo()
    memo("a", lambda: 1)
    assert memo.replace("a", 2) == 2
    assert memo("a", _never) == 2


def test_the_value_that_was_asked_for_least_recently_goes():
    memo = Memo(most=2)
    memo("a", lambda: 1)
    memo("b", lambda: 2)
    memo("a", _never)
    memo.replace("c", 3)
    assert memo("a", _never) == 1
    assert memo("c", _never) == 3
    assert memo("b", lambda: "anew") == "anew"


def test_make_may_ask_the_memo_itself():
    memo = Memo()
    assert memo("sum", lambda: memo("a", lambda: 1) + memo("b", lambda: 2)) == 3
    assert memo("b", _never) == 2
