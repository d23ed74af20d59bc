"""The examples and directions that are swept together: cut to a budget of memory, and to the cache of a CPU."""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch

from lmc_curvature.curvature.problem import Tiling
from lmc_curvature.curvature.sweep.memory import free_bytes
from lmc_curvature.curvature.sweep.plan import bytes_of
from lmc_curvature.curvature.sweep.program import Program
from lmc_curvature.errors import MemoryBudgetError
from lmc_curvature.objective.network import State

# On a CPU, tangents in its last cache are several times faster to work on than those in main memory. Half of it is left
# to values and weights; tiles larger than the most hardly save calls. The least is for where none is reported.
_LEAST_CACHE_BYTES, _MOST_CACHE_BYTES = 32 * 2**20, 128 * 2**20
# Of what a gradient takes, what a sweep may take on a CUDA device by default, and what it may take in any case; and the
# share of a budget that is for values and tangents there.
_GRADIENTS, _LEAST_BYTES, _SHARE = 3, 256 * 2**20, 0.9


def budget_bytes(device: torch.device, memory_gib: float | None, gradient: float) -> float:
    """Bytes that values and tangents may take.

    By default half of what is free; on a CUDA device, where larger tiles are no faster and what is recorded stays
    taken, no more than three gradients take, or 256 MiB. There a tenth of any budget is left to what is recorded
    besides: copies of what comes in, and kernels' workspaces.

    Args:
        device: The device.
        memory_gib: GiB that are given.
        gradient: Bytes that a gradient of the first batch keeps.
    """
    on_gpu = device.type == "cuda"
    given = free_bytes(device) / 2 if memory_gib is None else memory_gib * 2**30
    if memory_gib is None and on_gpu:
        given = min(given, max(_GRADIENTS * gradient, _LEAST_BYTES))
    return _SHARE * given if on_gpu else given


def choose_tiling(
    program: Program,
    loss: Program | None,
    directions: Sequence[State],
    *,
    probe: int,
    size: int,
    whole: bool,
    budget: float,
    device: torch.device,
) -> Tiling:
    """Choose the examples and directions to sweep together.

    Args:
        program: The network, or the whole loss, captured for `probe` examples.
        loss: The loss of an output, captured for the whole batch, if it is apart.
        directions: All directions.
        probe: Examples that memory is estimated from.
        size: Examples of the batch.
        whole: Whether the batch must not be cut into tiles.
        budget: Bytes that values and tangents may take.
        device: The device of values and tangents.

    Raises:
        MemoryBudgetError: Two directions of as few examples as possible need more than the budget.
    """
    together = len(directions)
    while True:
        needs = needs_of(program, loss, directions, probe=probe, together=together, device=device)
        least = Tiling(size if whole else 1, together, keeps_values=needs.values * size <= budget / 2)
        if needs.total(least, size) > budget:
            least = replace(least, keeps_values=False)
        taken = needs.total(least, size)
        if taken <= budget:
            break
        if together <= 2:
            raise MemoryBudgetError(
                f"Sweeping {min(2, together)} of {len(directions)} directions, {least.examples} of {size} examples at "
                f"a time, takes about {taken / 2**30:.3g} GiB, more than the budget of {budget / 2**30:.3g} GiB: raise "
                "memory_gib, or use smaller batches."
            )
        together = max(2, together // 2)
    if whole:
        return least
    # The more examples, the more memory, though not in proportion: where the loss takes most, a few more cost nothing.
    most: float = bisect.bisect_right(
        range(1, size + 1), budget, key=lambda examples: needs.total(replace(least, examples=examples), size)
    )
    if device.type == "cpu":
        most = min(most, max(1.0, _cache_bytes() / max(needs.at_work, 1.0)))
    # Of one size where that is possible: every size of tile is captured for itself.
    tiles = -(-size // max(1, min(size, int(most))))
    return replace(least, examples=-(-size // tiles))


@dataclass(frozen=True)
class Needs:
    """Bytes that the sweep of a batch takes for some directions together.

    All values of a tile are kept for its adjoints, and both for the tangents, which meet them operation by operation.
    The loss comes last, when nothing of a tile is left but the tangents of its output. Exact sizes of tensors, as they
    were captured; what kernels take for themselves is not known.

    Attributes:
        values: Values, for an example.
        adjoints: Adjoints of what can contribute curvature, for an example.
        tangents: Tangents, and what is contracted with them, for an example.
        at_work: Tangents alone, for an example.
        data: Data, for an example: all images are laid out anew.
        chunk: What is swept in chunks of rows, after all other tangents.
        outputs: Tangents of the output of all examples, and values and adjoints of the loss, which are held all along.
        loss: Tangents of the loss, and those of the output once more.
    """

    values: float
    adjoints: float
    tangents: float
    at_work: float
    data: float
    chunk: float
    outputs: float
    loss: float

    def total(self, tiling: Tiling, size: int) -> float:
        """All bytes at the peak, in some tiles of a batch of `size`."""
        kept = size if tiling.keeps_values else tiling.examples
        network = self.values * kept + self.adjoints * tiling.examples
        network += max(self.tangents * tiling.examples, self.chunk)
        return self.data * size + self.outputs + max(network, self.loss)


def needs_of(
    program: Program,
    loss: Program | None,
    directions: Sequence[State],
    *,
    probe: int,
    together: int,
    device: torch.device,
) -> Needs:
    """The bytes that a sweep takes, from programs that were captured.

    Args:
        program: The network, or the whole loss, captured for `probe` examples.
        loss: The loss of an output, captured for the whole batch, if it is apart.
        directions: All directions.
        probe: Examples that memory is estimated from.
        together: Most directions that are swept together.
        device: The device of values and tangents.
    """
    body, in_parts = program.body, device.type == "cpu"
    reach = program.prelude.reached(
        {
            node: frozenset(i for i, direction in enumerate(directions) if name in direction)
            for name, node in program.entries.items()
        }
    )
    outputs, of_loss = 0, 0
    if loss is not None and loss.argument is not None:
        outputs = loss.body.value_bytes + loss.body.adjoint_bytes + together * bytes_of(loss.argument)
        # Tangents of the output come in tiles, which are joined, so for a moment there are two of each.
        of_loss = together * bytes_of(loss.argument)
        reach_of_loss = {loss.argument: frozenset(range(together))}
        of_loss += loss.body.tangent_bytes(reach_of_loss, together, contracted=True, in_parts=in_parts)
    return Needs(
        values=body.value_bytes / probe,
        adjoints=body.adjoint_bytes / probe,
        tangents=body.tangent_bytes(reach, together, contracted=True, in_parts=in_parts) / probe,
        at_work=body.tangent_bytes(reach, together) / probe,
        data=program.argument_bytes / probe,
        chunk=body.chunk_bytes(reach, together, in_parts=in_parts),
        outputs=float(outputs),
        loss=float(of_loss),
    )


def groups(count: int, together: int) -> list[list[int]]:
    """Sets of directions, none larger than `together`, that between them hold every pair."""
    if count <= together:
        return [list(range(count))]
    half = together // 2
    parts = [list(range(start, min(start + half, count))) for start in range(0, count, half)]
    return [first + second for first, second in combinations(parts, 2)]


@functools.cache
def _cache_bytes() -> int:
    """Bytes that tangents may take of a CPU's last cache, which Linux reports in KiB."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = path.read_text().strip()[:-1], path.read_text().strip()[-1:]
        sizes.append(int(number) * 2**10 if unit == "K" and number.isdigit() else 0)
    return min(max(max(sizes) // 2, _LEAST_CACHE_BYTES), _MOST_CACHE_BYTES)
