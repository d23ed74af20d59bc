"""Figures are written whole, in both formats, and alike whatever the caller's settings."""

import matplotlib as mpl
import pytest

from lmc_curvature.figures import save_figure
from lmc_curvature.figures.files import figure_suffixes, write_figure
from lmc_curvature.plotting.style import look, new_figure


@look()
def simple_figure():
    figure = new_figure(1.5, 1.5)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], label="line")
    axes.set(title="title", xlabel="α")
    axes.legend()
    return figure


def test_the_look_does_not_depend_on_the_callers_settings(tmp_path):
    plain, _ = save_figure(simple_figure(), tmp_path / "plain")
    with mpl.rc_context({"font.size": 17.0, "axes.grid": True, "axes.facecolor": "black", "lines.linewidth": 9}):
        other, _ = save_figure(simple_figure(), tmp_path / "other")
    assert plain.read_bytes() == other.read_bytes()


def test_both_formats_are_written_and_a_dot_is_no_suffix(tmp_path):
    png, pdf = save_figure(new_figure(3.0, 2.0), tmp_path / "new folder" / "fork-0.5")
    assert (png.name, pdf.name) == ("fork-0.5.png", "fork-0.5.pdf")
    assert sorted(path.name for path in png.parent.iterdir()) == ["fork-0.5.pdf", "fork-0.5.png"]
    # The width of a PNG stands at byte 16.
    assert int.from_bytes(png.read_bytes()[16:20], "big") >= 150 * 3.0


def test_the_same_figure_is_the_same_file(tmp_path):
    first, second = (save_figure(simple_figure(), tmp_path / name) for name in ("a", "b"))
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_figure_that_cannot_be_drawn_leaves_the_old_file(tmp_path):
    png, _ = save_figure(new_figure(1.0, 1.0), tmp_path / "figure")
    before = png.read_bytes()
    broken = new_figure(1.0, 1.0)
    broken.text(0.5, 0.5, r"$\nothing$")
    with pytest.raises(ValueError, match="nothing"):
        save_figure(broken, tmp_path / "figure")
    assert png.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.pdf", "figure.png"]


@pytest.mark.check
def test_one_file_has_the_format_that_its_suffix_names(tmp_path):
    png, _ = save_figure(simple_figure(), tmp_path / "both")
    for name in ("new folder/alone.png", "capitals.PNG"):
        write_figure(simple_figure(), tmp_path / name)
        assert (tmp_path / name).read_bytes() == png.read_bytes()
    for name, beginning in (
        ("one.pdf", b"%PDF"),
        ("other.pdf", b"%PDF"),
        ("one.svg", b"<?xml"),
        ("one.jpg", b"\xff\xd8"),
    ):
        write_figure(simple_figure(), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(beginning)
    assert (tmp_path / "one.pdf").read_bytes() == (tmp_path / "other.pdf").read_bytes()
    assert {".png", ".pdf", ".svg", ".jpg"} <= set(figure_suffixes())
