"""Tables are cut to what is drawn, and what a table lacks is said by name, whichever figure asks."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from lmc_curvature import figures
from lmc_curvature.errors import OptionError
from lmc_curvature.figures.frames import at_epoch, by_fork, checked, known, of_fork

# Of each figure: how it is drawn, and the columns that its docstring asks of each table, besides fork and epoch.
FIGURES = {
    "ridges": (lambda t: figures.draw_ridges(t.curves), {"curves": "split metric alpha value"}),
    "barrier ridges": (
        lambda t: figures.draw_ridges(t.curves, quantity="barrier"),
        {"curves": "split metric alpha barrier"},
    ),
    "angles": (lambda t: figures.draw_sibling_angles(t.geometry), {"geometry": "cosine_origin cosine_fork"}),
    "planes": (lambda t: figures.draw_solution_planes(t.geometry), {"geometry": "cosine_final"}),
    "distances": (lambda t: figures.draw_sibling_distances(t.geometry), {"geometry": "distance"}),
    "by fork": (
        lambda t: figures.draw_barriers_by_fork(t.barriers, t.predictions),
        {"barriers": "split metric barrier standard_error", "predictions": "expansion barrier standard_error"},
    ),
    "growth": (
        lambda t: figures.draw_barrier_growth(t.barriers, t.predictions),
        {"barriers": "split metric barrier standard_error", "predictions": "expansion barrier standard_error"},
    ),
    "heat maps": (
        lambda t: figures.draw_layer_heatmaps(t.layers, fork=0),
        {"layers": "position layer measured measured_lowest predicted hessian_energy distance"},
    ),
    "ranks": (
        lambda t: figures.draw_rank_correlations(t.layers),
        {"layers": "measured predicted predicted_with_slopes hessian_energy distance"},
    ),
    "cumulative": (
        lambda t: figures.draw_cumulative_barriers(t.cumulative),
        {"cumulative": "side count measured predicted predicted_shared"},
    ),
}
TABLE_NAMES = {"cumulative": "cumulative barriers"}


@pytest.fixture(params=FIGURES)
def figure(request):
    draw, tables = FIGURES[request.param]
    return draw, {table: ["fork", "epoch", *columns.split()] for table, columns in tables.items()}


def with_table(traces, name, change):
    return dataclasses.replace(traces, **{name: change(getattr(traces, name))})


def test_the_columns_of_the_docstring_suffice(figure, traces):
    draw, tables = figure
    for name, columns in tables.items():
        traces = with_table(traces, name, lambda table, columns=columns: table[columns])
    assert draw(traces).axes


def test_a_missing_column_is_named(figure, traces):
    draw, tables = figure
    for name, columns in tables.items():
        for column in columns:
            lacking = with_table(traces, name, lambda table, column=column: table.drop(columns=column))
            with pytest.raises(OptionError, match=f"table of {TABLE_NAMES.get(name, name)} has no column '{column}'"):
                draw(lacking)


def test_an_empty_table_is_named(figure, traces):
    draw, tables = figure
    for name in tables:
        with pytest.raises(
            OptionError, match=f"table of {TABLE_NAMES.get(name, name)} has no rows, so there is nothing"
        ):
            draw(with_table(traces, name, lambda table: table.iloc[:0]))


@pytest.mark.parametrize(
    ("name", "table", "column"),
    [
        ("ridges", "curves", "value"),
        ("barrier ridges", "curves", "barrier"),
        ("angles", "geometry", "cosine_fork"),
        ("planes", "geometry", "cosine_final"),
        ("distances", "geometry", "distance"),
        ("by fork", "barriers", "barrier"),
        ("growth", "barriers", "barrier"),
        ("growth", "predictions", "barrier"),
        ("ranks", "layers", "measured"),
    ],
)
def test_a_column_without_a_number_is_named(name, table, column, traces):
    draw, _ = FIGURES[name]
    with pytest.raises(OptionError, match=f"table of {table} has no number in column '{column}'"):
        draw(with_table(traces, table, lambda rows: rows.assign(**{column: np.nan})))


TABLE = pd.DataFrame({"fork": [5, 0, 0, 0], "epoch": [6, 8, 2, 8], "split": ["test", "train", "test", "test"]})


def test_rows_are_those_with_the_values_in_order():
    rows = checked(TABLE, "barriers", [], split="test")
    assert rows[["fork", "epoch"]].to_numpy().tolist() == [[0, 2], [0, 8], [5, 6]]
    assert [(fork, len(each)) for fork, each in by_fork(rows).items()] == [(0, 2), (5, 1)]
    assert of_fork(rows, "barriers", 5)["epoch"].tolist() == [6]


def test_by_default_each_fork_has_its_last_epoch():
    assert at_epoch(TABLE, "barriers", None)["epoch"].tolist() == [6, 8, 8]
    assert at_epoch(TABLE, "barriers", 2)["split"].tolist() == ["test"]


def test_infinite_is_no_number():
    rows = pd.DataFrame({"barrier": [np.inf, 1.0, np.nan]})
    assert known(rows, "barriers", "barrier")["barrier"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: checked(TABLE, "curves", [], split="tset"), "curves has no rows with split='tset': did you mean"),
        (lambda: checked(TABLE, "curves", [], split="all"), "split='all': choose from 'test', 'train'"),
        (lambda: checked(TABLE, "curves", ["alpha"]), "no column 'alpha'; it has fork, epoch, split"),
        (lambda: checked(pd.DataFrame(), "curves", []), "no column 'fork'; it has none"),
        (lambda: of_fork(TABLE, "layers", 3), "of layers has no fork 3; it has 0, 5"),
        (lambda: at_epoch(TABLE, "layers", 7), "of layers has no rows at epoch 7; it has epochs 2, 6, 8"),
    ],
)  # fmt: skip
def test_messages_name_what_is_asked_for_and_what_there_is(ask, message):
    with pytest.raises(OptionError, match=message):
        ask()
