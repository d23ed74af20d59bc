"""Claim: on quadratics, predicted and measured curves are their closed forms, for every set of layers."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmc_curvature import measure_barrier, predict_barrier
from lmc_curvature.landscapes import Quadratic, QuadraticProduct, landscape_loss, origin

ALPHAS = np.linspace(0.0, 1.0, 7)


@st.composite
def quadratic_pairs(draw):
    """Two positions on one quadratic, its layers, a set of them, and examples in batches of drawn sizes."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    layers = {f"layer{i}": size for i, size in enumerate(sizes)}
    chosen = draw(st.lists(st.sampled_from(sorted(layers)), min_size=1, unique=True))
    batch_sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    d = sum(sizes)
    root = rng.normal(size=(d, d))
    # Definite, indefinite and singular Hessians all occur.
    hessian = torch.from_numpy(root + root.T if draw(st.booleans()) else root @ root.T)
    minimum = torch.from_numpy(rng.normal(size=d))
    ends = [
        Quadratic(hessian, minimum=minimum, layers=layers, position=torch.from_numpy(rng.normal(size=d)), offset=0.7)
        for _ in range(2)
    ]
    shifts = torch.from_numpy(rng.normal(size=(sum(batch_sizes), d)))
    loader = [(part, part) for part in torch.split(shifts, batch_sizes)]
    return ends, hessian.numpy(), minimum.numpy(), shifts.numpy(), loader, layers, chosen


@pytest.mark.check
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(quadratic_pairs())
def test_curves_equal_their_closed_forms(drawn):
    ends, A, minimum, shifts, loader, layers, chosen = drawn
    options = {"loss_fn": landscape_loss, "progress": False}
    prediction = predict_barrier(*ends, loader, **options)
    first, second = (end.position().detach().numpy() for end in ends)
    delta = second - first
    owner = np.repeat(list(layers), list(layers.values()))

    sets = [list(layers), chosen, *([name] for name in layers)]
    measurement = measure_barrier(*ends, loader, sets=sets, alphas=ALPHAS, metrics=("loss",), **options)
    curves = measurement.layer_curves()
    np.testing.assert_allclose(measurement.curve(), curves[0], rtol=0, atol=1e-10)

    for members, curve in zip(sets, curves, strict=True):
        moved = np.where(np.isin(owner, members), delta, 0.0)
        c = moved @ A @ moved
        slopes = [moved @ A @ (end - minimum - shifts.mean(0)) for end in (first, second)]
        scale = max(1.0, abs(c), *map(abs, slopes))
        # Proposition 1 (all layers) and 2 (one layer), and the truth, of which the slopes are the rest.
        second_order = ALPHAS * (1 - ALPHAS) / 2 * c
        truth = second_order + ALPHAS * (1 - ALPHAS) * (slopes[0] - slopes[1])
        np.testing.assert_allclose(
            prediction.curve(ALPHAS, members, "second-order"), second_order, rtol=0, atol=1e-10 * scale
        )
        np.testing.assert_allclose(curve, truth, rtol=0, atol=1e-10 * scale)
        np.testing.assert_allclose(prediction.curve(ALPHAS, members, "with-slopes"), truth, rtol=0, atol=1e-10 * scale)
        shared = ALPHAS * (1 - ALPHAS) / 2 * c
        np.testing.assert_allclose(
            prediction.curve(ALPHAS, members, "shared-hessian"), shared, rtol=0, atol=1e-10 * scale
        )

    whole = delta @ A @ delta
    assert prediction.interactions.sum() == pytest.approx(whole / 8, abs=1e-10 * max(1, abs(whole)))
    np.testing.assert_allclose(
        prediction.curve(ALPHAS, None, "hermite"), measurement.curve(), rtol=0, atol=1e-9 * scale
    )
    # Along the whole segment ⟨∇L(θ₂) − ∇L(θ₁), Δ⟩ = ΔᵀAΔ, so truth and second order have opposite signs.
    np.testing.assert_allclose(
        measurement.curve(), -prediction.curve(ALPHAS, None, "second-order"), rtol=0, atol=1e-10 * scale
    )


@pytest.mark.check
def test_standard_error_is_that_of_the_barrier_over_batches():
    generator = torch.Generator().manual_seed(0)
    loader = [(torch.randn(4, 2, generator=generator, dtype=torch.float64),) * 2 for _ in range(8)]
    A = torch.tensor([[2.0, 0.3], [0.3, 1.0]])
    ends = [Quadratic(A, position=torch.tensor([x, 0.5 * x])) for x in (-1.0, 2.0)]
    prediction = predict_barrier(*ends, loader, loss_fn=landscape_loss, progress=False)
    # The curvature is the same in every batch; the slopes' difference too.
    assert prediction.standard_error() == pytest.approx(0.0, abs=1e-12)
    toys = [QuadraticProduct(torch.tensor([[1.0], [-1.0]]), position=torch.tensor([x])) for x in (-1.0, 1.0)]
    toy_loader = [(x[:, :1] / 10, y) for x, y in loader]
    varied = predict_barrier(*toys, toy_loader, loss_fn=landscape_loss, progress=False)
    fine = np.linspace(0, 1, 100001)
    peak = fine[varied.curve(fine).argmax()]
    each = [
        predict_barrier(*toys, [batch], loss_fn=landscape_loss, progress=False).curve([peak])[0] for batch in toy_loader
    ]
    assert varied.barrier() == pytest.approx(np.mean(each), rel=1e-8)
    assert varied.standard_error() == pytest.approx(np.std(each, ddof=1) / np.sqrt(8), rel=1e-3)


def test_the_toy_barrier_has_its_closed_form():
    # f = ¼ (θ−1)² (θ+1)² between its minima ±1: f(0) = ¼, f'' = 2, Δ = 2, so Proposition 1 predicts 4·2/8 = 1.
    ends = [QuadraticProduct(torch.tensor([[1.0], [-1.0]]), position=torch.tensor([x])) for x in (1.0, -1.0)]
    options = {"loss_fn": landscape_loss, "progress": False}
    prediction = predict_barrier(*ends, origin(1), **options)
    measurement = measure_barrier(*ends, origin(1), metrics=("loss",), alphas=101, **options)
    assert measurement.barrier() == pytest.approx(0.25, abs=1e-12)
    assert prediction.barrier(None, "second-order") == pytest.approx(1.0, abs=1e-12)
    assert prediction.barrier() == pytest.approx(0.25, abs=1e-12)
    np.testing.assert_allclose(
        measurement.curve(), 4 * measurement.alphas**2 * (1 - measurement.alphas) ** 2, atol=1e-12
    )
    # A quartic is inside the quintic's reach.
    np.testing.assert_allclose(prediction.curve(measurement.alphas, None, "hermite"), measurement.curve(), atol=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "measured", "predicted"),
    [
        # f = Π (θ−m)² / 16 over the four minima; f'' at a minimum is 2 Π_others (m−m')² / 16.
        (-1.0, 1.0, 2.25**2 / 16, 4 / 8 * 2 * (0.5 * 2 * 2.5) ** 2 / 16),
        (-1.5, 1.5, 2.25**2 / 16, 9 / 8 * 2 * (0.5 * 2.5 * 3) ** 2 / 16),
    ],
)
def test_the_toy_with_four_minima_has_its_closed_form(first, second, measured, predicted):
    minima = torch.tensor([[-1.5], [-1.0], [1.0], [1.5]])
    ends = [QuadraticProduct(minima, position=torch.tensor([x])) for x in (first, second)]
    options = {"loss_fn": landscape_loss, "progress": False}
    found = measure_barrier(*ends, origin(1), metrics=("loss",), alphas=101, **options)
    assert found.barrier() == pytest.approx(measured, abs=1e-12)
    assert predict_barrier(*ends, origin(1), anchors=2, **options).barrier() == pytest.approx(predicted, abs=1e-12)
    positions = first + found.alphas * (second - first)
    expected = np.prod([(positions - m) ** 2 / 2 for m in minima.squeeze().tolist()], axis=0)
    np.testing.assert_allclose(found.curve(), expected, atol=1e-12)


def test_the_toy_in_two_dimensions_has_its_closed_form():
    minima = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    ends = [QuadraticProduct(minima, position=minimum) for minimum in minima]
    found = measure_barrier(
        *ends, origin(2), metrics=("loss",), alphas=5, loss_fn=landscape_loss, layers="tensor", progress=False
    )
    assert found.barrier() == pytest.approx(0.25, abs=1e-12)
