"""Figures leave matplotlib's global settings alone, and colours and line styles tell curves apart."""

import threading

import matplotlib as mpl
import numpy as np
import pytest

from lmc_curvature.plotting.style import look, new_figure, pens, sequential_colors


@look()
def simple_figure():
    new_figure(1.0, 1.0).add_subplot().legend(handles=[])


def test_global_settings_come_back_after_drawing_also_from_threads():
    with mpl.rc_context({"font.size": 17.0, "axes.grid": True}):
        before = dict(mpl.rcParams)
        threads = [threading.Thread(target=simple_figure) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert dict(mpl.rcParams) == before


def test_settings_come_back_after_an_error():
    before = dict(mpl.rcParams)
    with pytest.raises(ZeroDivisionError), look():
        raise ZeroDivisionError
    assert dict(mpl.rcParams) == before


def test_notebooks_show_a_figure():
    assert new_figure(1.0, 1.0)._repr_png_().startswith(b"\x89PNG")


def test_sequences_go_from_dark_to_light():
    colors = sequential_colors([0, 3, 8, 20])
    brightness = [np.dot(color[:3], [0.2126, 0.7152, 0.0722]) for color in colors.values()]
    assert list(colors) == [0, 3, 8, 20]
    assert brightness == sorted(brightness)
    assert len(sequential_colors([5])) == 1


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_every_colour_of_a_sequence_is_legible_on_white(count):
    for color in sequential_colors(range(count)).values():
        # Relative luminance and contrast as WCAG 2.1 defines them.
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color[:3]]
        assert 1.05 / (np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05) >= 3


@pytest.mark.parametrize(("count", "styles"), [(4, 4), (5, 5), (7, 5)])
def test_pens_differ_in_colour_and_up_to_five_in_line_style(count, styles):
    found = pens({number: str(number) for number in range(count)})
    assert [pen.label for pen in found.values()] == [str(number) for number in range(count)]
    assert len({pen.color for pen in found.values()}) == count
    assert len({pen.linestyle for pen in found.values()}) == styles
