"""Figures of spectra show the densities and eigenvalues that they are given."""

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from lmc_curvature.curvature.spectra.density import WIDTH_SHARE, SpectralDensity, spectral_density
from lmc_curvature.curvature.spectra.drawing import draw_spectral_density
from lmc_curvature.curvature.spectra.eigenpairs import top_eigenpairs
from lmc_curvature.errors import OptionError
from lmc_curvature.plotting.style import new_figure


def matrix(*outliers):
    """A diagonal matrix with a bulk near zero."""
    bulk = torch.linspace(-1, 1, 300 - len(outliers), dtype=torch.float64) ** 3
    return torch.diag(torch.cat([bulk, torch.tensor(outliers, dtype=torch.float64)]))


@pytest.fixture(scope="module")
def parent():
    return spectral_density(matrix(5.0, 9.0), probes=3, steps=30, distribution="gaussian")


@pytest.fixture(scope="module")
def child():
    return spectral_density(matrix(4.0, -3.0, 20.0), probes=3, steps=30, distribution="gaussian")


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.check
def test_one_density_is_its_curve_on_a_logarithmic_scale(parent, saved, lines):
    figure = parent.plot()
    saved(figure)
    (axes,) = figure.axes
    grid, curve = lines(axes)["_density"]
    assert axes.get_yscale() == "log"
    expected = parent.curve(grid)
    shown = expected > axes.get_ylim()[0]
    assert shown.mean() > 0.2
    assert_allclose(curve[shown], expected[shown])
    assert (curve > 0).all()
    assert legend(axes) == ["height of one eigenvalue"]
    assert axes.get_xlabel() == "eigenvalue λ"
    assert axes.get_ylabel() == "share of eigenvalues per unit of λ"


@pytest.mark.check
def test_densities_share_the_kernel_and_cover_all_eigenvalues(parent, child, saved, lines):
    figure = draw_spectral_density({"parent": parent, "child": child})
    saved(figure)
    drawn = lines(figure.axes[0])
    width = WIDTH_SHARE * (max(parent.support[1], child.support[1]) - min(parent.support[0], child.support[0]))
    assert width > parent.default_width
    for name, density in {"parent": parent, "child": child}.items():
        grid, curve = drawn[name]
        expected = density.curve(grid, width=width)
        shown = expected > figure.axes[0].get_ylim()[0]
        assert_allclose(curve[shown], expected[shown])
        assert grid[0] < min(parent.support[0], child.support[0])
        assert grid[-1] > max(parent.support[1], child.support[1])
    assert legend(figure.axes[0])[:2] == ["parent", "child"]


def test_densities_differ_in_colour_and_in_line_style(parent):
    axes = draw_spectral_density({str(number): parent for number in range(4)}).axes[0]
    curves = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert len({line.get_color() for line in curves}) == len({line.get_linestyle() for line in curves}) == 4
    many = draw_spectral_density({str(number): parent for number in range(6)}).axes[0]
    colors = {str(line.get_color()) for line in many.get_lines() if not line.get_label().startswith("_")}
    assert len(colors) == 6


def test_the_dotted_line_is_as_high_as_one_eigenvalue_alone(lines):
    """An eigenvalue far from all others has a peak of just that height."""
    exact = spectral_density(matrix(9.0))
    axes = draw_spectral_density(exact).axes[0]
    grid, curve = lines(axes)["_density"]
    (height,) = set(lines(axes)["_one eigenvalue"][1])
    assert curve[np.abs(grid - 9) < 0.5].max() == pytest.approx(height, rel=1e-2)
    assert axes.get_ylim()[0] < height / 5


def test_the_width_can_be_chosen(parent, lines):
    axes = draw_spectral_density(parent, width=0.5).axes[0]
    grid, curve = lines(axes)["_density"]
    high = curve > axes.get_ylim()[0]
    assert_allclose(curve[high], parent.curve(grid, width=0.5)[high])
    assert any("width 0.50" in text.get_text() for text in axes.texts)


@pytest.mark.check
def test_eigenvalues_are_marked_in_the_colour_of_their_density(parent, child, saved):
    pairs = {"child": top_eigenpairs(matrix(4.0, -3.0, 20.0), 3), "parent": top_eigenpairs(matrix(5.0, 9.0), 2)}
    figure = draw_spectral_density({"parent": parent, "child": child}, eigenpairs=pairs)
    saved(figure)
    axes = figure.axes[0]
    colors = {line.get_label(): line.get_color() for line in axes.get_lines()}
    marks = [line for line in axes.get_lines() if line.get_label() == "_eigenvalues"]
    assert len(marks) == 2
    for line, (name, found) in zip(marks, pairs.items(), strict=True):
        assert_allclose(line.get_xdata(), found.values)
        assert line.get_color() == colors[name]
    assert marks[0].get_ydata()[0] != marks[1].get_ydata()[0]
    assert legend(axes)[-1] == "eigenvalue found"


def test_eigenvalues_outside_the_nodes_are_still_in_the_picture(parent):
    axes = draw_spectral_density(parent, eigenpairs=top_eigenpairs(matrix(40.0), 1)).axes[0]
    assert axes.get_xlim()[1] > 40


@pytest.mark.check
def test_a_density_at_a_single_point_is_drawn(saved):
    saved(draw_spectral_density(SpectralDensity(np.zeros((1, 3)), np.full((1, 3), 1 / 3), 3, exact=True)))


def test_it_draws_into_axes_that_are_given(parent):
    figure = new_figure(4.0, 3.0)
    left, right = figure.subplots(1, 2)
    assert draw_spectral_density(parent, axes=right, title="child") is figure
    assert isinstance(figure, Figure)
    assert right.get_title(loc="left") == "child"
    assert not left.get_lines()


def test_settings_are_left_alone(parent):
    before = dict(mpl.rcParams)
    draw_spectral_density(parent)
    assert dict(mpl.rcParams) == before


def test_bad_options_are_refused(parent):
    pairs = top_eigenpairs(matrix(5.0), 1)
    with pytest.raises(OptionError, match="no density to draw"):
        draw_spectral_density({})
    with pytest.raises(OptionError, match="width=-1.0: expected a positive"):
        draw_spectral_density(parent, width=-1.0)
    with pytest.raises(OptionError, match="'parnt', which is not among the densities: did you mean 'parent'"):
        draw_spectral_density({"parent": parent}, eigenpairs={"parnt": pairs})
    with pytest.raises(OptionError, match="Whose are the eigenpairs.*'a', 'b'"):
        draw_spectral_density({"a": parent, "b": parent}, eigenpairs=pairs)
