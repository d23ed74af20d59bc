"""Fixtures of all tests of figures: small predictions and measurements, and what is asked of any figure."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

# The library is imported in the fixtures: it must not be there before its annotations are made to be checked.


def _two_sided(sets="each", alphas=11, anchors=3):
    """Two points of a convex landscape, the minimum between them: none in truth, and one predicted to second order."""
    from lmc_curvature import measure_barrier, predict_barrier
    from lmc_curvature.landscapes import Quadratic, landscape_loss, origin

    hessian = torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))
    ends = [Quadratic(hessian, position=sign * torch.ones(3), layers={"u": 1, "v": 2}) for sign in (-1, 1)]
    options = {"loss_fn": landscape_loss, "progress": False}
    prediction = predict_barrier(*ends, origin(3), layers="tensor", anchors=anchors, **options)
    options |= {"layers": "tensor", "sets": sets, "metrics": ("loss",), "alphas": alphas}
    return prediction, measure_barrier(*ends, origin(3), **options)


def _siblings(scale):
    """Two networks that far from a common one, on three batches of which one is short."""
    from lmc_curvature import measure_barrier, predict_barrier

    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    pair = [base, copy.deepcopy(base)]
    with torch.no_grad():
        for entries in zip(*(model.parameters() for model in pair), strict=True):
            entries[0].copy_(draw(*entries[0].shape))
            entries[1].copy_(entries[0] + scale * draw(*entries[0].shape))
    loader = [(draw(n, 4), torch.arange(n) % 3) for n in (8, 8, 5)]
    return (
        predict_barrier(*pair, loader, progress=False),
        measure_barrier(*pair, loader, sets="each", alphas=5, progress=False),
    )


@pytest.fixture(scope="session")
def forks():
    """Fork epoch to prediction and measurement, latest first: they are to be drawn in the order of the epochs."""
    return {epoch: _siblings(scale) for epoch, scale in ((8, 0.05), (3, 0.3), (0, 1.5))}


@pytest.fixture(scope="session")
def predictions(forks):
    return {epoch: prediction for epoch, (prediction, _) in forks.items()}


@pytest.fixture(scope="session")
def of_two_ends(predictions):
    """The same predictions without the anchors between the ends, as earlier versions made them."""
    ends = {epoch: (prediction.anchors[0], prediction.anchors[-1]) for epoch, prediction in predictions.items()}
    return {epoch: dataclasses.replace(predictions[epoch], anchors=anchors) for epoch, anchors in ends.items()}


@pytest.fixture(scope="session")
def measurements(forks):
    return {epoch: measurement for epoch, (_, measurement) in forks.items()}


@pytest.fixture(scope="session")
def two_sided():
    return _two_sided


@pytest.fixture(scope="session")
def convex():
    return _two_sided()


@pytest.fixture
def uncut():
    """Check that no label reaches over the edges of the figure."""

    def check(figure):
        figure.draw_without_rendering()
        box, size = figure.get_tightbbox(), figure.get_size_inches()
        assert min(box.x0, box.y0) >= 0, box
        assert (box.max <= size).all(), (box, size)

    return check


@pytest.fixture
def saved(tmp_path):
    """Write a figure in both formats and check that the files begin as such files do."""
    from lmc_curvature.figures import save_figure

    def save(figure):
        png, pdf = save_figure(figure, tmp_path / "figure")
        assert png.read_bytes().startswith(b"\x89PNG")
        assert pdf.read_bytes().startswith(b"%PDF")
        return png

    return save


@pytest.fixture
def lines():
    """Lines of axes by label; those of decoration have labels that begin with an underscore."""
    return lambda axes: {line.get_label(): np.array(line.get_data()) for line in axes.get_lines()}
