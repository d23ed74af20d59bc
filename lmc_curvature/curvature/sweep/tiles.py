"""The tiles of a batch: cut from its data, and joined where their outputs meet the loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmc_curvature.curvature.sweep.compiled import CompiledBatch
from lmc_curvature.curvature.sweep.program import Program
from lmc_curvature.curvature.sweep.tree import BatchTree
from lmc_curvature.errors import CaptureError
from lmc_curvature.objective.batches import Batch


@dataclass(frozen=True, eq=False)
class Tile:
    """Examples of a batch that are swept together, from `start` to `stop`: their program and their data."""

    program: Program
    start: int
    stop: int
    data: BatchTree


def tiles_of(compiled: CompiledBatch, batch: Batch) -> list[Tile]:
    """The tiles of a batch, in order."""
    data = compiled.data_of(batch)
    starts = range(0, batch.size, compiled.tiling.examples)
    ranges = [(start, min(start + compiled.tiling.examples, batch.size)) for start in starts]
    return [
        Tile(compiled.networks[stop - start], start, stop, data.rows(start, stop, batch.size).laid_out())
        for start, stop in ranges
    ]


def joined(tiles: Sequence[Tile], results: Sequence[Tensor]) -> Tensor:
    """The results of all tiles as one tensor.

    Raises:
        CaptureError: They cannot be joined, because the network looks at the number of examples.
    """
    if len(tiles) == 1:
        return results[0]
    rest = results[0].shape[1:]
    for tile, result in zip(tiles, results, strict=True):
        expected = (tile.stop - tile.start, *rest)
        if tuple(result.shape) != expected:
            raise CaptureError(
                f"The network's output has shape {tuple(result.shape)} for {tile.stop - tile.start} examples of a "
                f"batch; expected {expected}, as for the others."
            )
    return torch.cat(list(results))
