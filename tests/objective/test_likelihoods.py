"""Claim: the Gaussian likelihood has torch's values and errors, and the derivatives of its values."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import Objective
from lmc_curvature.objective.differentiable import plain_calls
from tests.support.networks import randomized
from tests.support.sweeping import TwoLayers, assert_sweep_agrees, vectors

A, B = (torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1))
VARIANCES = {"each": A.exp(), "small": 1e-8 * A.exp(), "of rows": A[:, :1].exp(), "rows": A[:, 0].exp(), "one": 0.7}


@pytest.mark.parametrize("variance", VARIANCES.values(), ids=VARIANCES)
@pytest.mark.parametrize(
    "options", [{}, {"full": True}, {"reduction": "sum"}, {"reduction": "none", "eps": 0.5}], ids=str
)
def test_values_are_those_of_torch(variance, options):
    expected = F.gaussian_nll_loss(A, B, variance, **options)
    with plain_calls():
        torch.testing.assert_close(F.gaussian_nll_loss(A, B, variance, **options), expected)
        torch.testing.assert_close(nn.GaussianNLLLoss(**options)(A, B, variance), expected)


@pytest.mark.parametrize(
    ("variance", "options", "message"),
    [
        (A, {}, "negative"),
        (-1.0, {}, "negative"),
        (A[:, :2].exp(), {}, "incorrect size"),
        (A.exp()[None], {}, "incorrect size"),
        (A.exp(), {"reduction": "median"}, "not valid"),
    ],
)
def test_errors_are_those_of_torch(variance, options, message):
    with plain_calls(), pytest.raises(ValueError, match=message):
        F.gaussian_nll_loss(A, B, variance, **options)


def test_variances_that_are_lifted_have_no_slope():
    at = torch.tensor([0.2, 0.9], dtype=torch.float64)

    def loss(variance):
        return F.gaussian_nll_loss(A[0, :2], B[0, :2], variance, eps=0.5, reduction="sum")

    with plain_calls():
        slope, curvature = (
            f(loss, at) for f in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian)
        )
    assert slope[0] == 0
    assert torch.count_nonzero(curvature) == 1
    step = torch.tensor([0.0, 1e-4], dtype=torch.float64)
    assert slope[1].item() == pytest.approx((loss(at + step) - loss(at - step)).item() / 2e-4, rel=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_the_loss_goes_through_the_sweep(full):
    class Heads(TwoLayers):
        def forward(self, x):
            mean, variance = super().forward(x).split([1, 2], 1)
            return mean, F.softplus(variance[:, :1])

    def loss(output, target):
        return F.gaussian_nll_loss(output[0], target[:, None].double(), output[1], full=full, eps=0.3)

    assert_sweep_agrees(Objective(randomized(Heads().double()), vectors(4, 4, 3), loss_fn=loss))
