"""Dense matrices and diagonals, as weighted sums over batches of products with unit vectors."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from jaxtyping import Float64
from torch import Tensor

from lmc_curvature.curvature.products import BatchProducts, UnitVectors, places_of, unit_vectors
from lmc_curvature.objective.network import State

# Columns that are computed in one pass over the loader, at least and at most, and how many numbers they may have.
_COLUMNS = (64, 4096)
_ELEMENTS = 2**24

Visit = Callable[[Callable[[BatchProducts], None]], float]
"""A function that visits the loader once, calls a function with the products of each batch, and sums their weights."""


def add_columns(transposed: Float64[Tensor, "columns rows"], rows: State, columns: State, visit: Visit) -> float:
    """Add up the columns of a matrix, with one pass over the loader per 64 to 4,096 of them.

    Args:
        transposed: The weighted sum over batches, zero before. Columns are computed one after the other, so they are
            what lies together in memory.
        rows: Entries along the rows, to tensors of their shapes.
        columns: Entries along the columns, to tensors of their shapes; the same ones, if the matrix is symmetric.
        visit: Visits the loader.

    Returns:
        The sum of the batches' weights.
    """
    row_places, column_places = places_of(rows), places_of(columns)
    symmetric = list(rows) == list(columns)
    # Of a symmetric matrix half is enough: each product for the entries that come no earlier, so that the largest
    # entries, which have the most products, need least of each.
    order = sorted(columns, key=lambda name: columns[name].numel()) if symmetric else list(columns)
    later = {name: order[number:] if symmetric else list(rows) for number, name in enumerate(order)}
    weight = 1.0
    for units in _passes({name: columns[name] for name in order}, transposed.shape[1]):

        def add(products: BatchProducts, units: UnitVectors = units) -> None:
            for group in _groups(products, units, later):
                for done, found in products.of(group, later[group.entries[0]]):
                    for entry, vectors, coordinates in group.within(done.start, done.stop):
                        part = transposed[column_places[entry]][coordinates]
                        for name in later[entry]:
                            if name in found:
                                part[:, row_places[name]].add_(found[name][vectors], alpha=products.batch.weight)

        weight = visit(add)
    if symmetric:
        for name in order:
            for other in later[name][1:]:
                here, there = row_places[name], row_places[other]
                transposed[there, here] = transposed[here, there].T
    return weight


def add_diagonal(diagonal: Float64[Tensor, " n"], entries: State, visit: Visit) -> float:
    """Add up the diagonal of a matrix, with one product for each coordinate.

    Args:
        diagonal: The weighted sum over batches, zero before.
        entries: Entries along rows and columns, to tensors of their shapes.
        visit: Visits the loader.

    Returns:
        The sum of the batches' weights.
    """
    places = places_of(entries)
    weight = 1.0
    for units in _passes(entries, 1):

        def add(products: BatchProducts, units: UnitVectors = units) -> None:
            for part in units.by_entry():
                (entry,) = part.entries
                for done, found in products.of(part, [entry]):
                    first, last = part.start + done.start, part.start + done.stop
                    own = found[entry].diagonal(first)
                    diagonal[places[entry]][first:last].add_(own, alpha=products.batch.weight)

        weight = visit(add)
    return weight


def _passes(entries: State, rows: int) -> Iterator[UnitVectors]:
    """The unit vectors of some entries, as many at a time as share a pass over the loader."""
    least, most = _COLUMNS
    size = max(least, min(most, _ELEMENTS // max(rows, 1)))
    count = len(unit_vectors(entries))
    return (UnitVectors(entries, start, min(start + size, count)) for start in range(0, count, size))


def _groups(products: BatchProducts, units: UnitVectors, rows: Mapping[str, Sequence[str]]) -> list[UnitVectors]:
    """The unit vectors that are multiplied together: all of a pass where they fit, else each entry's by themselves.

    An entry by itself takes less of the graph, and needs fewer rows.
    """
    alone = len(units.entries) == 1
    return [units] if alone or products.fit_together(units, rows[units.entries[0]]) else units.by_entry()
