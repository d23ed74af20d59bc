"""Tables of a forking experiment, as the figures take them: checked, and cut to the rows that are drawn."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float64

from lmc_curvature.errors import OptionError, suggest


def checked(table: pd.DataFrame, name: str, columns: Sequence[str], **values: str) -> pd.DataFrame:
    """The rows of a table that a figure draws, by fork and epoch.

    Args:
        table: A row a fork, an epoch, and whatever else the columns say.
        name: The table's name in messages.
        columns: Those that the figure reads, besides `fork` and `epoch`.
        values: Columns that must have one value: `split="train"`.

    Raises:
        OptionError: A column is missing, or no row has the values.
    """
    for column in ("fork", "epoch", *values, *columns):
        if column not in table.columns:
            present = ", ".join(map(str, table.columns)) or "none"
            raise OptionError(f"The table of {name} has no column {column!r}; it has {present}.")
    if table.empty:
        raise OptionError(f"The table of {name} has no rows, so there is nothing to draw.")
    for column, value in values.items():
        choices = sorted({str(choice) for choice in table[column]})
        if value not in choices:
            raise OptionError(f"The table of {name} has no rows with {column}={value!r}: {suggest(value, choices)}")
        table = having(table, column, value)
    return table.sort_values(["fork", "epoch"], kind="stable")


def known(rows: pd.DataFrame, name: str, column: str) -> pd.DataFrame:
    """The rows that have a number in a column.

    Raises:
        OptionError: None has.
    """
    finite = np.isfinite(numbers(rows, column))
    if not finite.any():
        raise OptionError(f"The table of {name} has no number in column {column!r}, so there is nothing to draw.")
    return _where(rows, finite)


def any_known(rows: pd.DataFrame, column: str) -> bool:
    """Whether there is a column, and a number in it."""
    return column in rows and bool(np.isfinite(numbers(rows, column)).any())


def having(rows: pd.DataFrame, column: str, value: object, *, by: str | None = None) -> pd.DataFrame:
    """The rows with a value in a column, in increasing order of another column if one is named."""
    chosen = _where(rows, np.asarray(rows[column] == value))
    return chosen if by is None else chosen.sort_values([by], kind="stable")


def by_fork(rows: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """Fork to its rows, in increasing order of the forks."""
    return {int(fork): having(rows, "fork", fork) for fork in np.unique(rows["fork"])}


def of_fork(rows: pd.DataFrame, name: str, fork: int) -> pd.DataFrame:
    """The rows of one fork.

    Raises:
        OptionError: There are none.
    """
    forks = by_fork(rows)
    if fork not in forks:
        raise OptionError(f"The table of {name} has no fork {fork}; it has {', '.join(map(str, forks))}.")
    return forks[fork]


def at_epoch(rows: pd.DataFrame, name: str, epoch: int | None) -> pd.DataFrame:
    """The rows of one epoch; for None, those of the last epoch that each fork has.

    Raises:
        OptionError: No fork has that epoch.
    """
    epochs = np.asarray(rows["epoch"])
    if epoch is None:
        return _where(rows, epochs == np.asarray(rows.groupby("fork")["epoch"].transform("max")))
    if epoch not in epochs:
        present = ", ".join(str(int(each)) for each in np.unique(epochs))
        raise OptionError(f"The table of {name} has no rows at epoch {epoch}; it has epochs {present}.")
    return _where(rows, epochs == epoch)


def numbers(rows: pd.DataFrame, column: str) -> Float64[np.ndarray, " rows"]:
    """A column as an array."""
    return np.asarray(rows[column], dtype=np.float64)


def _where(rows: pd.DataFrame, chosen: np.ndarray) -> pd.DataFrame:
    return rows.iloc[np.flatnonzero(chosen)]
