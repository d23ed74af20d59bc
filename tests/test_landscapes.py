"""Claim: the landscapes have the minima, values and Hessians they promise, through the library's own API."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc_curvature import HessianOperator, Objective, Segment
from lmc_curvature.errors import DataError
from lmc_curvature.landscapes import Quadratic, QuadraticProduct, landscape_loss, origin


def _hessian(landscape):
    dimension = landscape.position().numel()
    return HessianOperator(Objective(landscape, origin(dimension), loss_fn=landscape_loss)).to_dense()


@pytest.mark.check
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_product_of_quadratics_has_its_closed_form_hessian(minima, dimension, seed):
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(minima, dimension, dimension, generator=generator, dtype=torch.float64)
    centres = torch.randn(minima, dimension, generator=generator, dtype=torch.float64)
    position = torch.randn(dimension, generator=generator, dtype=torch.float64)
    hessians = roots @ roots.mT
    anywhere = QuadraticProduct(centres, hessians=hessians, position=position)
    torch.testing.assert_close(_hessian(anywhere), anywhere.hessian_at(position), rtol=1e-9, atol=1e-9)

    at_minimum = QuadraticProduct(centres, hessians=hessians)
    others = [0.5 * (centres[0] - centres[j]) @ hessians[j] @ (centres[0] - centres[j]) for j in range(1, minima)]
    expected = hessians[0] * torch.tensor(others, dtype=torch.float64).prod()
    torch.testing.assert_close(_hessian(at_minimum), expected, rtol=1e-9, atol=1e-9)


def test_product_of_quadratics_vanishes_at_its_minima_only():
    minima = torch.tensor([[-1.5], [-1.0], [1.0], [1.5]])
    for minimum in minima:
        landscape = QuadraticProduct(minima, position=minimum)
        objective = Objective(landscape, origin(1), loss_fn=landscape_loss)
        assert objective.loss() == 0
        assert objective.gradient()["theta"].abs().item() == 0
    assert Objective(QuadraticProduct(minima, position=torch.zeros(1)), origin(1), loss_fn=landscape_loss).loss() > 0


def test_quadratic_has_its_hessian_and_minimum_in_any_layers():
    A = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
    minimum = torch.tensor([1.0, -1.0, 2.0])
    landscape = Quadratic(A, minimum=minimum, layers={"a": 1, "b": 2}, offset=4.0)
    torch.testing.assert_close(_hessian(landscape), A.double())
    assert Objective(landscape, origin(3), loss_fn=landscape_loss).loss() == 4.0
    moved = Quadratic(A, minimum=minimum, layers={"a": 1, "b": 2}, position=torch.zeros(3))
    segment = Segment(landscape, moved)
    assert segment.layers == ("a", "b")
    assert segment.directions()["b"]["b"].tolist() == [1.0, -2.0]


def test_shifting_an_example_moves_the_landscape():
    landscape = Quadratic(torch.eye(2), position=torch.tensor([1.0, 0.0]))
    assert landscape(torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)).tolist() == [0.5, 0.0]


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="hold 3 coordinates; expected 2"):
        Quadratic(torch.eye(2), layers={"a": 1, "b": 2})
