"""The examples and directions that are swept together: cut to a budget of memory, and to the cache of a CPU."""

import functools
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch

from lmc_curvature.curvature.problem import Tiling
from lmc_curvature.curvature.sweep.capture import value_of
from lmc_curvature.curvature.sweep.program import Program
from lmc_curvature.errors import MemoryBudgetError
from lmc_curvature.objective.network import State

# On a CPU, tangents in its last cache are several times faster to work on than those in main memory. Half of it is left
# to values and weights; tiles larger than the most hardly save calls. The least is for where none is reported.
_LEAST_CACHE_BYTES, _MOST_CACHE_BYTES = 32 * 2**20, 128 * 2**20
_DEFAULT_BUDGET_GIB = 4.0


def budget_bytes(device: torch.device, memory_gib: float | None) -> float:
    """Bytes that values and tangents may take: by default half of a CUDA device's free memory, or 4 GiB."""
    if memory_gib is not None:
        return memory_gib * 2**30
    if device.type == "cuda":
        # What torch has taken and does not use is free, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + unused) / 2
    return _DEFAULT_BUDGET_GIB * 2**30


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
    reach = program.prelude.reached(
        {
            node: frozenset(i for i, direction in enumerate(directions) if name in direction)
            for name, node in program.entries.items()
        }
    )
    # The graph of a forward and backward pass holds about three times the values themselves.
    values = 3 * program.body.value_bytes / probe
    keeps = values * size <= budget / 2
    least = size if whole else 1
    together = len(directions)
    while True:
        tangents = program.body.tangent_bytes(reach, together) / probe
        of_loss = _loss_bytes(loss, together)
        each = tangents if keeps else tangents + values
        left = budget - of_loss - (values * size if keeps else 0)
        if each * least <= left:
            break
        if together <= 2:
            raise MemoryBudgetError(
                f"Sweeping {min(2, together)} of {len(directions)} directions, {size if whole else 1} of {size} "
                f"examples at a time, takes about {((tangents + values) * least + of_loss) / 2**30:.3g} GiB, more than "
                f"the budget of {budget / 2**30:.3g} GiB: raise memory_gib, or use smaller batches."
            )
        together = max(2, together // 2)
    if whole:
        return Tiling(size, together, keeps)
    # Nothing may be reached at all.
    most = left / max(each, 1.0)
    if device.type == "cpu":
        most = min(most, max(1.0, _cache_bytes() / max(tangents, 1.0)))
    # Of one size where that is possible: every size of tile is captured for itself.
    tiles = -(-size // max(1, min(size, int(most))))
    return Tiling(-(-size // tiles), together, keeps)


def _loss_bytes(loss: Program | None, together: int) -> int:
    """Bytes that the loss takes, which sees the outputs of all examples at once."""
    if loss is None or loss.argument is None:
        return 0
    tangents = loss.body.tangent_bytes({loss.argument: frozenset(range(together))}, together)
    # Tangents of the output come in tiles, which are joined, so for a moment there are two of each.
    output = value_of(loss.argument)
    return 3 * loss.body.value_bytes + tangents + 2 * together * output.numel() * output.element_size()


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
