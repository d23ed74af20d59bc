"""Tables of an experiment with known numbers."""

import numpy as np
import pandas as pd
import pytest

from lmc_curvature.tracing import Traces


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
def anchored(traces):
    """The same tables with anchored predictions, which those of earlier versions do not have."""
    second = traces.predictions[traces.predictions["expansion"] == "second-order"]
    rows = second.assign(expansion="anchored", barrier=0.55 * second["barrier"], expansion_error=second["barrier"] / 8)
    return Traces(
        **{
            **vars(traces),
            "predictions": pd.concat([traces.predictions, rows]),
            "layers": traces.layers.assign(predicted_anchored=traces.layers["measured"] + 0.5),
            "cumulative": traces.cumulative.assign(predicted_anchored=1.1 * traces.cumulative["measured"]),
        }
    )


@pytest.fixture
def pick():
    """Rows of a table with given values, by epoch: an independent way to what a figure should show."""

    def pick(table, **values):
        for column, value in values.items():
            table = table[table[column] == value]
        return table.sort_values("epoch", kind="stable")

    return pick


@pytest.fixture(autouse=True)
def without_pyplot_figures():
    """No test may leave a figure with pyplot."""
    yield
    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.get_all_fig_managers()
