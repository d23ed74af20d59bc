"""The figure of toy landscapes shows what the library computes for them."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from lmc_curvature.figures import draw_toy_landscapes
from lmc_curvature.figures.landscapes import toys


@pytest.fixture(scope="module")
def figure():
    return draw_toy_landscapes()


@pytest.mark.check
def test_toy_landscapes(figure, saved):
    saved(figure)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title for title in titles if title] == [toy.title for toy in toys()]
    assert sum(axes.get_ylabel() == "barrier\n(units of the loss, log scale)" for axes in figure.axes) == 3


@pytest.mark.check
def test_the_first_toy_in_closed_form(figure, lines):
    """f = (θ² − 1)² / 4: a ridge of 1/4, and by Proposition 1, with a second derivative of 2 at ±1, of 1."""
    above, below = figure.axes[:2]
    theta, loss = above.get_lines()[0].get_data()
    assert_allclose(loss, (np.asarray(theta) ** 2 - 1) ** 2 / 4, atol=1e-12)
    alphas, measured = lines(below)["0.25; 1.0; 0.25"]
    assert_allclose(measured, ((2 * alphas - 1) ** 2 - 1) ** 2 / 4)
    alphas, predicted = lines(below)["_Proposition 1"]
    assert_allclose(predicted, 4 * alphas * (1 - alphas))
    # An anchor in the middle sees a quartic whole.
    alphas, anchored = lines(below)["_anchored"]
    assert_allclose(anchored, ((2 * alphas - 1) ** 2 - 1) ** 2 / 4, atol=1e-6)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "barrier curve, measured",
        "barrier curve, Proposition 1 (second order)",
        "barrier curve, anchored",
    ]


def test_segments_join_minima():
    for toy in toys():
        losses = toy.losses(toy.minima)
        assert_allclose(losses, 0)
        assert {index for *ends, _ in toy.segments for index in ends} <= set(range(len(toy.minima)))


@pytest.mark.check
def test_mirror_images_have_one_barrier():
    """The figure draws one curve for all segments of one colour."""
    for toy in toys():
        for color in {color for *_, color in toy.segments}:
            same = [toy.barriers(*ends) for *ends, other in toy.segments if other == color]
            assert_allclose([measured.barrier() for _, measured in same], same[0][1].barrier(), rtol=1e-12)
            assert_allclose([predicted.barrier() for predicted, _ in same], same[0][0].barrier(), rtol=1e-12)
