"""Every kind of barrier curve is drawn."""

from typing import get_args

import pytest

from lmc_curvature.barrier.kinds import CurveKind
from lmc_curvature.figures import draw_barrier_kinds


@pytest.mark.check
def test_every_kind_is_drawn_once(saved):
    figure = draw_barrier_kinds()
    saved(figure)
    assert figure.get_suptitle() == "schematic: curves drawn for each kind, not measured"
    assert sorted(axes.get_title(loc="left") for axes in figure.axes) == sorted(get_args(CurveKind))
