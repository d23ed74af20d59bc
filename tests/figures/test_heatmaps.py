"""Heat maps show the table, a row a layer and a column an epoch; hatched is what is not known."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, SymLogNorm, to_rgba
from numpy.testing import assert_allclose, assert_array_equal

from lmc_curvature.errors import OptionError
from lmc_curvature.figures import draw_layer_heatmaps
from lmc_curvature.plotting.text import short_number

COLUMNS = ("measured", "predicted", "hessian_energy", "distance")
SIGNS = ["above the chord", "below the chord (no barrier)"]


def meshes(figure):
    """Column to its mesh; bars of colours have meshes, too."""
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    found = [next(each for each in axes.collections if isinstance(each, QuadMesh)) for axes in panels]
    anchored = ("measured", "predicted_anchored", *COLUMNS[1:])
    return dict(zip(COLUMNS if len(panels) == len(COLUMNS) else anchored, found, strict=True))


def bar_labels(figure):
    """Labels of the bars of colours, from the left."""
    return [axes.get_xlabel() for axes in figure.axes if not axes.get_title(loc="left")]


def matrix(rows, column):
    return rows.pivot(index="position", columns="epoch", values=column).to_numpy()


def seen(mesh):
    """Colours of the cells, (layers, epochs, 4)."""
    mesh.update_scalarmappable()
    return mesh.get_facecolor().reshape(*mesh.get_array().shape, 4)


def legend(figure):
    return [text.get_text() for each in figure.legends for text in each.get_texts()]


def put(table, column, value, **where):
    chosen = np.logical_and.reduce([table[name] == wanted for name, wanted in where.items()])
    return table.assign(**{column: table[column].mask(chosen, value)})


@pytest.mark.check
def test_cells_are_those_of_the_table(traces, pick, saved, uncut):
    figure = draw_layer_heatmaps(traces.layers, fork=0)
    saved(figure)
    uncut(figure)
    rows = pick(traces.layers, fork=0)
    for column, mesh in meshes(figure).items():
        assert_array_equal(mesh.get_array(), matrix(rows, column))
        axes = mesh.axes
        assert axes.yaxis_inverted()
        assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "4", "8"]
        assert axes.get_xlabel() == "epoch"
    names = [label.get_text() for label in meshes(figure)["measured"].axes.get_yticklabels()]
    assert names == ["conv", "block.0.conv1", "block.0.conv2", "linear"]
    assert figure.get_suptitle() == "fork at epoch 0"
    assert legend(figure) == SIGNS


def test_anchored_barriers_stand_beside_those_of_second_order(anchored, pick, uncut):
    figure = draw_layer_heatmaps(anchored.layers, fork=2)
    uncut(figure)
    found, rows = meshes(figure), pick(anchored.layers, fork=2)
    assert_array_equal(found["predicted_anchored"].get_array(), matrix(rows, "predicted_anchored"))
    assert found["predicted_anchored"].norm is found["predicted"].norm is found["measured"].norm
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[1:3] == ["predicted barrier\nanchored", "predicted barrier\nsecond order"]
    assert found["measured"].norm.vmax == rows[["measured", "predicted_anchored", "predicted"]].to_numpy().max()


@pytest.mark.parametrize(("ratio", "name"), [(2.0, "linear scale"), (100.0, "log scale")])
def test_every_bar_of_colours_says_its_scale(ratio, name, traces):
    table = traces.layers.assign(distance=np.where(traces.layers["position"] == 0, ratio, 1.0))
    figure = draw_layer_heatmaps(table, fork=0)
    barriers, energies, distances = bar_labels(figure)
    width = meshes(figure)["measured"].norm.linthresh
    assert barriers == f"units of the loss, symlog scale: linear within ±{short_number(width)}"
    assert energies.startswith("symlog scale:")
    assert distances == name


def test_the_two_barriers_share_a_signed_scale_and_a_bar(traces, pick):
    figure = draw_layer_heatmaps(traces.layers, fork=0)
    found = meshes(figure)
    limits = {column: (mesh.norm.vmin, mesh.norm.vmax) for column, mesh in found.items()}
    rows = pick(traces.layers, fork=0)
    highest = rows[["measured", "predicted"]].to_numpy().max()
    assert limits["measured"] == limits["predicted"] == (-highest, highest)
    assert limits["hessian_energy"] == (-rows["hessian_energy"].max(), rows["hessian_energy"].max())
    assert limits["distance"] == (0, rows["distance"].max())
    assert [isinstance(mesh.norm, SymLogNorm) for mesh in found.values()] == [True, True, True, False]
    figure.draw_without_rendering()
    bar, left, right = (
        axes.get_window_extent()
        for axes in (found["predicted"].colorbar.ax, found["measured"].axes, found["predicted"].axes)
    )
    assert_allclose([bar.x0, bar.x1], [left.x0, right.x1], atol=1)
    assert found["measured"].colorbar is None
    # The panels are aligned, whatever bars stand below them.
    heights = [(mesh.axes.get_window_extent().y0, mesh.axes.get_window_extent().y1) for mesh in found.values()]
    assert_allclose(heights, np.broadcast_to(heights[0], (4, 2)), atol=1)


@pytest.mark.check
def test_what_sinks_below_the_chord_is_blue(traces, saved, uncut):
    table = put(put(traces.layers, "measured", 0.0, position=1), "measured_lowest", -0.5, position=1)
    # Both ends curve downwards, so the second-order curve sinks: an eighth of the energy, at α = ½.
    table = put(put(table, "predicted", 0.0, position=2), "hessian_energy", -8.0, position=2)
    # A curve that rises and sinks has a barrier.
    table = put(table, "measured_lowest", -0.1, position=3)
    figure = draw_layer_heatmaps(table, fork=0)
    saved(figure)
    uncut(figure)
    found = meshes(figure)
    assert_allclose(found["measured"].get_array()[1], -0.5)
    assert_allclose(found["predicted"].get_array()[2], -1.0)
    assert_allclose(found["hessian_energy"].get_array()[2], -8.0)
    assert (found["measured"].get_array()[3] > 0).all()
    for column, row in (("measured", 1), ("predicted", 2), ("hessian_energy", 2)):
        red, _, blue, _ = np.moveaxis(seen(found[column]), -1, 0)
        assert_array_equal((blue > red).all(axis=1), np.arange(4) == row)


def test_zero_is_white_and_marked_on_the_bar(traces):
    table = traces.layers.assign(hessian_energy=0.03 * (traces.layers["position"] - 1))
    figure = draw_layer_heatmaps(table, fork=0)
    mesh = meshes(figure)["hessian_energy"]
    assert seen(mesh)[1].min() > 0.95
    figure.draw_without_rendering()
    labels = [label.get_text() for label in mesh.colorbar.ax.get_xticklabels()]
    assert labels == ["−0.01", "0", "0.01"]


@pytest.mark.check
def test_what_is_not_known_is_hatched(traces, saved):
    table = put(traces.layers, "measured", np.nan, epoch=4)
    # A row that the table lacks is not known either.
    table = table[(table["fork"] != 0) | (table["epoch"] != 2) | (table["position"] != 3)]
    figure = draw_layer_heatmaps(table, fork=0)
    saved(figure)
    found = meshes(figure)
    unknown = np.zeros((4, 3), dtype=bool)
    unknown[3, 0] = True
    assert_array_equal(np.ma.getmaskarray(found["predicted"].get_array()), unknown)
    unknown[:, 1] = True
    assert_array_equal(np.ma.getmaskarray(found["measured"].get_array()), unknown)
    # The hatching shows through them, and nowhere else.
    assert_array_equal(seen(found["measured"])[..., 3] == 0, unknown)
    for mesh in found.values():
        (behind,) = (patch for patch in mesh.axes.patches if patch.get_hatch())
        assert behind.get_zorder() < mesh.get_zorder()
        assert_array_equal(behind.get_bbox().extents, [-0.5, -0.5, 2.5, 3.5])
    assert legend(figure) == [*SIGNS, "not measured"]


def test_layers_that_were_never_measured_leave_the_scale_to_the_predictions(traces, pick):
    found = meshes(draw_layer_heatmaps(traces.layers.assign(measured=np.nan), fork=2))
    assert np.ma.getmaskarray(found["measured"].get_array()).all()
    assert found["predicted"].norm.vmax == pick(traces.layers, fork=2)["predicted"].max()


@pytest.mark.parametrize(("ratio", "logarithmic"), [(29, False), (31, True)])
def test_a_scale_is_logarithmic_from_a_factor_of_30(ratio, logarithmic, traces):
    distance = 1.0 + (ratio - 1) * (traces.layers["position"] == 2)
    mesh = meshes(draw_layer_heatmaps(traces.layers.assign(distance=distance), fork=0))["distance"]
    assert isinstance(mesh.norm, LogNorm) == logarithmic
    assert (mesh.norm.vmin, mesh.norm.vmax) == (1 if logarithmic else 0, ratio)


@pytest.mark.parametrize("small", [0.0, 0.9e-4])
def test_what_is_below_a_logarithmic_scale_is_white(small, traces):
    table = traces.layers.assign(distance=np.where(traces.layers["position"] == 0, small, 1.0))
    # Something on the axis must span the factor from which a scale is logarithmic.
    table = put(table, "distance", 0.01, position=3)
    figure = draw_layer_heatmaps(table, fork=0)
    mesh = meshes(figure)["distance"]
    assert isinstance(mesh.norm, LogNorm)
    assert_allclose([mesh.norm.vmin, mesh.norm.vmax], [1e-4 if small > 0 else 0.01, 1])
    white = (seen(mesh) == to_rgba("white")).all(axis=-1)
    assert_array_equal(white, np.repeat([[True], [False], [False], [False]], 3, axis=1))
    assert legend(figure) == [*SIGNS, "distance of zero, or over 1e4 times below the largest"]
    assert mesh.colorbar.extend == "min"


def test_names_are_shortened_at_the_front_and_only_some_are_written(traces, uncut):
    # 70 layers, of which every second is named.
    one = traces.layers[(traces.layers["fork"] == 0) & (traces.layers["position"] == 0)]
    copies = [
        one.assign(position=number, layer=f"a.very.long.prefix.of.stage{number:02d}.conv") for number in range(70)
    ]
    table = pd.concat(copies)
    figure = draw_layer_heatmaps(table, fork=0)
    uncut(figure)
    names = [label.get_text() for label in meshes(figure)["measured"].axes.get_yticklabels()]
    assert len(names) == 35
    assert names[1].startswith("…")
    assert names[1].endswith("stage02.conv")
    assert max(map(len, names)) == 24


def test_many_epochs_have_few_ticks(traces):
    one = traces.layers[(traces.layers["fork"] == 2) & (traces.layers["epoch"] == 4)]
    table = pd.concat([one.assign(epoch=epoch) for epoch in range(4, 24)])
    axes = meshes(draw_layer_heatmaps(table, fork=2))["predicted"].axes
    ticks = dict(zip(axes.get_xticks().tolist(), [label.get_text() for label in axes.get_xticklabels()], strict=True))
    assert ticks == {0: "4", 4: "8", 8: "12", 12: "16", 16: "20"}


def test_an_unknown_fork_is_named(traces):
    with pytest.raises(OptionError, match="table of layers has no fork 7; it has 0, 2, 5"):
        draw_layer_heatmaps(traces.layers, fork=7)
