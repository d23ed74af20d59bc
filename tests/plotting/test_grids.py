"""Panels lie in rows of at most three, and share a scale where one serves all."""

import pytest

from lmc_curvature.plotting.grids import panel_cells, share_scale
from lmc_curvature.plotting.style import TEXT_WIDTH, new_figure


@pytest.mark.parametrize(
    ("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3)), (9, (3, 3))]
)
def test_panels_fill_rows_from_the_left(count, shape):
    figure, cells, spare = panel_cells(count, 2.0, margin=0.5, legend=0.25)
    assert cells[0].get_gridspec().get_geometry() == shape
    places = [(cell.rowspan.start, cell.colspan.start) for cell in cells]
    assert places == [divmod(number, shape[1]) for number in range(count)]
    full = count == shape[0] * shape[1]
    assert (spare is None) == full
    if spare is not None:
        assert [*range(count, spare.num2 + 1)] == [*range(spare.num1, shape[0] * shape[1])]
    # Room for a legend is needed above panels that leave none beside them.
    assert figure.get_figheight() == 2.0 * shape[0] + 0.5 + 0.25 * full
    assert figure.get_figwidth() <= TEXT_WIDTH


@pytest.mark.parametrize(("highest", "shared"), [(10.0, True), (10.1, False)])
def test_a_scale_is_shared_up_to_ten_times_the_range(highest, shared):
    panels = list(new_figure(4.0, 2.0).subplots(1, 2))
    for axes, high in zip(panels, (1.0, highest), strict=True):
        axes.set_ylim(0, high)
    share_scale(panels)
    assert panels[0].get_ylim() == ((0, highest) if shared else (0, 1))
    assert panels[1].get_ylim() == (0, highest)
