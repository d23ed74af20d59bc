"""Ridges show the curves of the table, at most 24 a fork, the nearest in front."""

import numpy as np
import pandas as pd
import pytest
from mpl_toolkits.mplot3d import proj3d
from numpy.testing import assert_allclose, assert_array_equal

from lmc_curvature.errors import OptionError
from lmc_curvature.figures import draw_ridges
from lmc_curvature.figures.ridges import shown_epochs
from lmc_curvature.plotting.text import short_number


def drawn(axes):
    """Epoch to line, from the back to the front."""
    ordered = sorted(axes.get_lines(), key=lambda line: line.get_zorder())
    return {line.get_data_3d()[1][0]: line for line in ordered}


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def details(figure):
    return [axes.texts[0].get_text() for axes in figure.axes]


@pytest.mark.check
@pytest.mark.parametrize(
    ("metric", "quantity", "split"),
    [("error", "value", "train"), ("loss", "barrier", "test"), ("loss", "value", "test")],
)
def test_curves_are_those_of_the_table(metric, quantity, split, traces, pick, uncut):
    figure = draw_ridges(traces.curves, metric=metric, quantity=quantity, split=split)
    uncut(figure)
    assert titles(figure) == ["fork at epoch 0", "fork at epoch 2", "fork at epoch 5"]
    for fork, axes in zip((0, 2, 5), figure.axes, strict=True):
        rows = pick(traces.curves, fork=fork, metric=metric, split=split)
        lines = drawn(axes)
        assert set(lines) == set(rows["epoch"])
        for epoch, line in lines.items():
            curve = rows[rows["epoch"] == epoch].sort_values("alpha")
            alphas, epochs, heights = line.get_data_3d()
            assert_array_equal([alphas, epochs], curve[["alpha", "epoch"]].to_numpy().T)
            is_logarithmic = (metric, quantity) == ("loss", "value")
            assert_allclose(10**heights if is_logarithmic else heights, curve[quantity])
        label = f"{metric} (log scale)" if is_logarithmic else metric
        assert axes.get_zlabel() == (label if quantity == "value" else "barrier")
    title = figure.get_suptitle()
    assert title.startswith(f"{split} {'barrier of the ' if quantity == 'barrier' else ''}{metric}")


@pytest.mark.parametrize(("height", "own"), [(2.9, False), (3.1, True)])
def test_panels_of_values_have_one_scale_while_they_are_alike(height, own, traces):
    curves = traces.curves.assign(value=np.where(traces.curves["fork"] == 0, height, 1.0))
    figure = draw_ridges(curves, split="test", metric="error")
    assert [axes.get_zlim()[1] for axes in figure.axes] == ([height, 1, 1] if own else [height] * 3)
    assert figure.get_suptitle().endswith("each panel has its own scale") == own
    first, *others = figure.axes
    assert set(first.get_ylim()) == {2, 8}
    for other in others:
        assert other.get_ylim() == first.get_ylim()
        assert drawn(other)[8].get_color() == drawn(first)[8].get_color()
    assert drawn(first)[4].get_color() != drawn(first)[8].get_color()


def test_each_panel_of_barriers_has_its_own_scale_and_a_sheet_at_zero(traces, pick):
    figure = draw_ridges(traces.curves, metric="loss", quantity="barrier")
    assert figure.get_suptitle().endswith("each panel has its own scale")
    for fork, axes in zip((0, 2, 5), figure.axes, strict=True):
        heights = pick(traces.curves, fork=fork, split="train", metric="loss")["barrier"]
        assert axes.get_zlim() == pytest.approx((0, heights.max()))
        (sheet,) = (each for each in axes.collections if each.get_label() == "_chord")
        assert sheet.get_zorder() < min(line.get_zorder() for line in axes.get_lines())


def numbers_at_ticks(axes):
    """Value at each tick of the heights, by what is written there."""
    axes.figure.draw_without_rendering()
    written = [label.get_text() for label in axes.get_zticklabels()]
    return dict(zip(written, axes.get_zticks(), strict=True))


def value_of(text):
    return float(text.replace("−", "-"))


@pytest.mark.check
@pytest.mark.parametrize("depth", [3.0, 40.0])
def test_a_valley_deeper_than_the_ridge_is_whole_and_does_not_flatten_it(depth, traces):
    curves = traces.curves.assign(
        barrier=np.where(traces.curves["epoch"] < 8, -depth, 1.0)
        * traces.curves["alpha"]
        * (1 - traces.curves["alpha"])
    )
    figure = draw_ridges(curves, quantity="barrier")
    lowest = short_number(-depth / 4)
    assert details(figure) == [f"highest at epoch 8: 0.25; lowest: {lowest}"] * 3
    for axes in figure.axes:
        assert axes.get_zlabel() == "barrier (symlog scale)"
        floor, top = axes.get_zlim()
        heights = {epoch: line.get_data_3d()[2] for epoch, line in drawn(axes).items()}
        # Nothing is cut, and the ridge has more than its share.
        assert min(each.min() for each in heights.values()) == pytest.approx(floor)
        assert all(len(each) == 5 and np.isfinite(each).all() for each in heights.values())
        assert top / (top - floor) > 1.4 / (1 + depth)
        # Ticks stand where the curves have their values: at α = ½ and ¼, a quarter and 3/16 of the depth.
        ticks = numbers_at_ticks(axes)
        places = np.array(list(ticks.values()))
        assert_allclose(np.sinh(places) * 0.25 / 3, [value_of(text) for text in ticks], atol=1e-9)
        assert_allclose(np.sinh(heights[8][2]) * 0.25 / 3, 0.25)
        assert 0 in places
        assert (places < 0).any()
        assert (places > 0).any()


@pytest.mark.check
def test_losses_are_logarithmic_so_that_one_early_epoch_does_not_flatten_the_others(traces):
    # A thousand times as high at the first epoch.
    value = np.where(traces.curves["epoch"] == 2, 20.0, 0.02 * (1 + traces.curves["alpha"]))
    figure = draw_ridges(traces.curves.assign(value=value), metric="loss")
    assert len({axes.get_zlim() for axes in figure.axes}) == 1
    for axes in figure.axes:
        assert axes.get_zlabel() == "loss (log scale)"
        low, high = axes.get_zlim()
        last = drawn(axes)[8].get_data_3d()[2]
        assert_allclose(10**last, 0.02 * (1 + np.linspace(0, 1, 5)))
        assert np.ptp(last) / (high - low) > 0.05
        for text, place in numbers_at_ticks(axes).items():
            assert 10**place == pytest.approx(value_of(text))


@pytest.mark.parametrize("least", [0.0, -1.0])
def test_losses_without_a_logarithm_have_a_linear_scale(least, traces):
    curves = traces.curves.assign(value=np.where(traces.curves["epoch"] == 8, least, 20.0))
    for axes in draw_ridges(curves, metric="loss").axes:
        assert axes.get_zlabel() == "loss"
        assert axes.get_zlim() == (least, 20)


def test_epochs_have_their_ticks_at_snapshots(traces):
    for axes in draw_ridges(traces.curves).axes:
        assert set(axes.get_yticks()) <= {2, 4, 6, 8}
        assert 8 in axes.get_yticks()


@pytest.mark.check
def test_in_the_place_that_panels_leave_stand_the_epochs_in_their_colours(traces, uncut):
    curves = pd.concat([traces.curves[traces.curves["fork"] == 0].assign(fork=fork) for fork in range(5)])
    figure = draw_ridges(curves)
    uncut(figure)
    (legend,) = figure.subfigs[0].legends
    entries = zip(legend.get_texts(), legend.legend_handles, strict=True)
    lines = drawn(figure.axes[0])
    assert {int(text.get_text()): line.get_color() for text, line in entries} == {
        epoch: line.get_color() for epoch, line in lines.items()
    }


@pytest.mark.check
@pytest.mark.parametrize("quantity", ["value", "barrier"])
def test_the_last_epoch_is_in_front_and_what_is_nearest_covers_what_is_behind(quantity, traces, saved):
    figure = draw_ridges(traces.curves, quantity=quantity)
    saved(figure)
    axes = figure.axes[0]
    lines = drawn(axes)
    assert list(lines)[-1] == 8
    # Seen from above, what is nearer stands lower in the picture.
    _, lower, _ = proj3d.proj_transform(np.zeros(3), np.array(list(lines)), np.zeros(3), axes.get_proj())
    assert (np.diff(lower) < 0).all()
    faces = sorted(face.get_zorder() for face in axes.collections if face.get_label() != "_chord")
    order = [line.get_zorder() for line in lines.values()]
    assert all(face < line for face, line in zip(faces, order, strict=True))
    assert all(line < face for line, face in zip(order, faces[1:], strict=False))


def test_of_many_epochs_24_are_drawn_the_ends_among_them():
    epochs = np.arange(3, 100)
    curves = pd.DataFrame({"fork": 0, "epoch": np.repeat(epochs, 2), "alpha": np.tile([0.0, 1.0], len(epochs))})
    curves = curves.assign(split="train", metric="error", value=1.0 / curves["epoch"])
    shown = list(drawn(draw_ridges(curves).axes[0]))
    assert len(shown) == 24
    assert (shown[0], shown[-1]) == (3, 99)
    # Evenly chosen of 97: every fourth, or now and then every fifth.
    assert set(np.diff(shown)) == {4, 5}
    assert_array_equal(shown_epochs(np.array([9, 1, 9, 4])), [1, 4, 9])


@pytest.mark.parametrize("quantity", ["value", "barrier"])
def test_the_small_print_is_the_maximum_at_the_last_epoch(quantity, traces):
    figure = draw_ridges(traces.curves, metric="loss", quantity=quantity)
    # At α = 1/2, epoch 8: 8 / (1 + fork), and 4 / 8 for the chord.
    expected = {"value": ["8.5", "3.2", "1.8"], "barrier": ["8.0", "2.7", "1.3"]}[quantity]
    assert details(figure) == [f"highest at epoch 8: {value}" for value in expected]


def test_the_noise_of_a_zero_barrier_is_not_shown(traces):
    curves = traces.curves.assign(barrier=np.where(traces.curves["alpha"] == 0.5, -0.25, 7e-17))
    figure = draw_ridges(curves, quantity="barrier")
    assert details(figure) == ["highest at epoch 8: 0; lowest: −0.25"] * 3
    # Convex: the whole height is for what lies below.
    assert_allclose([axes.get_zlim() for axes in figure.axes], [(-0.25, 0)] * 3)


@pytest.mark.parametrize("forks", [[0], [0, 5]])
def test_few_panels_are_narrow_yet_nothing_is_cut(forks, traces, uncut):
    curves = traces.curves[traces.curves["fork"].isin(forks)]
    figure = draw_ridges(curves, quantity="barrier")
    uncut(figure)
    # Labels of one panel reach into the next, whose background would cover them.
    assert not any(axes.patch.get_visible() for axes in figure.axes)


def test_one_epoch_and_no_height_can_be_drawn(traces, uncut):
    curves = traces.curves[traces.curves["epoch"] == 8].assign(value=0.0)
    figure = draw_ridges(curves)
    uncut(figure)
    assert figure.axes[0].get_zlim() == (0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, "table of curves has no rows with split='tset': did you mean 'test'"),
        ({"metric": "accuracy"}, "table of curves has no rows with metric='accuracy': choose from 'error', 'loss'"),
        ({"quantity": "bariers"}, "quantity='bariers' is not a choice: did you mean 'barrier'"),
    ],
)
def test_unknown_options_are_named(options, message, traces, untyped):
    with pytest.raises(OptionError, match=message):
        draw_ridges(traces.curves, **options)


@pytest.mark.check
@pytest.mark.parametrize(("low", "high"), [(0, 4), (0, 0.6), (-0.0251, 0.0154)])
def test_the_label_of_the_heights_stands_clear_of_their_numbers(low, high, traces):
    figure = draw_ridges(
        traces.curves.assign(barrier=np.where(traces.curves["alpha"] == 0.5, low, high)), quantity="barrier"
    )
    figure.draw_without_rendering()
    axis = figure.axes[0].zaxis
    numbers = [tick.label1.get_window_extent() for tick in axis.get_major_ticks() if tick.label1.get_text()]
    assert len(numbers) >= 3
    assert max(box.x1 for box in numbers) < axis.label.get_window_extent().x0
