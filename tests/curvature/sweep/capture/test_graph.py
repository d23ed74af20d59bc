"""Claim: a captured graph computes what the function computes, in two stages."""

import torch

from tests.support.capturing import captured_right, counts, numbers


def test_what_the_state_alone_decides_is_a_stage_of_its_own():
    def function(v, g, x):
        return torch.tanh(x @ (v * (g / v.norm())).T)

    first, second = captured_right(function, [numbers(3, 5), numbers(1)], [numbers(4, 5)])
    assert counts(first)["aten.linalg_vector_norm.default"] == 1
    assert counts(second) == {"aten.mm.default": 1, "aten.tanh.default": 1}
    # Only what the network reads is handed on.
    assert len(first.outputs) == 1
    assert first.inputs[0] not in first.outputs


def test_a_state_that_nothing_reads_is_still_an_input():
    first, second = captured_right(lambda unused, w, x: x @ w, [numbers(2, 2), numbers(5, 3)], [numbers(4, 5)])
    assert len(first.inputs) == 2
    assert first.outputs == (first.inputs[1],)
    assert len(second.operations) == 1


def test_data_may_have_no_part_in_the_result():
    captured_right(lambda w, x: w.sin().sum(), [numbers(3)], [numbers(4, 5)])


def test_a_shape_that_depends_on_constants_alone_is_fine():
    kept = torch.tensor([True, False, True])

    def function(w, x):
        return (x @ w)[:, kept]

    captured_right(function, [numbers(5, 3)], [numbers(4, 5)])
