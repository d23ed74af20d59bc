"""Predictions and measurements between small networks and on landscapes; tables of an experiment with known numbers."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lmc_curvature import measure_barrier, predict_barrier
from lmc_curvature.landscapes import Quadratic, landscape_loss, origin
from lmc_curvature.tracing import Traces


def _two_sided(sets="each", alphas=11):
    """Two points of a convex landscape, the minimum between them: a predicted barrier, and none in truth."""
    hessian = torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))
    ends = [Quadratic(hessian, position=sign * torch.ones(3), layers={"u": 1, "v": 2}) for sign in (-1, 1)]
    options = {"loss_fn": landscape_loss, "progress": False}
    prediction = predict_barrier(*ends, origin(3), layers="tensor", **options)
    options |= {"layers": "tensor", "sets": sets, "metrics": ("loss",), "alphas": alphas}
    return prediction, measure_barrier(*ends, origin(3), **options)


def _siblings(scale):
    """Two networks that far from a common one, on three batches of which one is short."""
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
def measurements(forks):
    return {epoch: measurement for epoch, (_, measurement) in forks.items()}


@pytest.fixture(scope="session")
def two_sided():
    return _two_sided


@pytest.fixture(scope="session")
def convex():
    return _two_sided()


def _height(fork, epoch, split="train", metric="loss"):
    """The barrier: higher the earlier the fork and the later the epoch."""
    return epoch / (1 + fork) * {"train": 1, "test": 3}[split] * {"loss": 1, "error": 0.25}[metric]


def _rows(fork, epoch):
    """What the tables hold of a fork at an epoch: table, and values of its columns."""
    height = _height(fork, epoch)
    for split in ("train", "test"):
        for metric in ("loss", "error"):
            barrier = _height(fork, epoch, split, metric)
            which = {"split": split, "metric": metric}
            yield "barriers", {**which, "barrier": barrier, "standard_error": barrier / 10, "end_a": 1.0, "end_b": 1.0}
            for alpha in np.linspace(0, 1, 5):
                above = 4 * alpha * (1 - alpha) * barrier
                yield "curves", {**which, "alpha": alpha, "value": 4 / epoch + above, "barrier": above}
    for expansion, factor in (("second-order", 2), ("with-slopes", 1.5), ("shared-hessian", 3), ("hermite", 1.2)):
        yield "predictions", {"expansion": expansion, "barrier": factor * height, "standard_error": height / 5}
    # No two rankings of the layers are alike.
    columns = {
        "distance": [0.5, 2, 1, 3],
        "hessian_energy": [4, 6, 2, 1],
        "predicted": [3, 2, 4, 1],
        "predicted_with_slopes": [2, 1, 4, 3],
        "measured": [3, 1, 4, 2],
        "measured_lowest": [0, 0, 0, 0],
    }
    for position, layer in enumerate(("conv", "block.0.conv1", "block.0.conv2", "linear")):
        values = {name: height * factors[position] for name, factors in columns.items()}
        yield "layers", {"position": position, "layer": layer, **values}
        for side, factor in (("first", 1), ("last", 2)):
            grown = factor * (position + 1) * height
            row = {"side": side, "count": position + 1, "measured": grown, "predicted": 1.5 * grown}
            yield "cumulative", {**row, "predicted_with_slopes": 1.2 * grown, "predicted_shared": 2 * grown}
    cosines = {"cosine_origin": 1 - epoch / 16, "cosine_fork": -epoch / 16, "cosine_final": epoch / 8}
    yield "geometry", {"distance": height + 0.5, **cosines}


@pytest.fixture
def traces():
    """Tables of forks 0, 2 and 5, of which the later have fewer epochs; rows in no order, for none is promised."""
    tables = {}
    for fork, epochs in ((5, (6, 8)), (0, (2, 4, 8)), (2, (4, 8))):
        for epoch in epochs:
            for name, values in _rows(fork, epoch):
                tables.setdefault(name, []).append({"fork": fork, "epoch": epoch, **values})
    return Traces(**{name: pd.DataFrame(rows).sample(frac=1, random_state=0) for name, rows in tables.items()})


@pytest.fixture
def pick():
    """Rows of a table with given values, by epoch: an independent way to what a figure should show."""

    def pick(table, **values):
        for column, value in values.items():
            table = table[table[column] == value]
        return table.sort_values("epoch", kind="stable")

    return pick


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


@pytest.fixture(autouse=True)
def without_pyplot_figures():
    """No test may leave a figure with pyplot."""
    yield
    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.get_all_fig_managers()


@pytest.fixture
def lines():
    """Lines of axes by label; those of decoration have labels that begin with an underscore."""
    return lambda axes: {line.get_label(): np.array(line.get_data()) for line in axes.get_lines()}
