"""Panels and colours of forks, in the order of the epochs."""

import pytest

from lmc_curvature.figures.panels import fork_legend, paired_forks
from lmc_curvature.plotting.style import look, new_figure, sequential_colors


def test_the_legend_of_many_forks_has_several_rows(uncut):
    with look():
        figure = new_figure(3.3, 3.0)
        figure.add_subplot()
        fork_legend(figure, sequential_colors(range(0, 200, 10)))
        uncut(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [str(fork) for fork in range(0, 200, 10)]


@pytest.mark.check
@pytest.mark.parametrize(("labels", "ordered"), [([8, 0, 3], [0, 3, 8]), (["warm", "cold"], ["warm", "cold"])])
def test_epochs_are_sorted_and_other_labels_keep_their_order(labels, ordered, predictions, measurements):
    pairs = paired_forks(dict.fromkeys(labels, predictions[0]), dict.fromkeys(labels, measurements[0]))
    assert list(pairs) == ordered
