"""The question that the engine is asked, placed and checked once, and its answer for one batch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Float

from lmc_curvature.errors import DirectionError, NonFiniteError, check_budget, counted
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.losses import finite_loss
from lmc_curvature.objective.memo import Memo
from lmc_curvature.objective.network import State, check_finite
from lmc_curvature.objective.numerics import largest_values, outside_inference
from lmc_curvature.objective.risk import Objective

Method = Literal["auto", "sweep", "hvp", "differences", "losses"]
"""A way to project a Hessian; see `project_hessian`."""

BatchValues = tuple[float, Float[np.ndarray, " k"], Float[np.ndarray, "k k"]]
"""Loss, slopes and curvature of one batch."""


@dataclass(frozen=True, eq=False)
class Point:
    """A complete state on the objective's device, and where it is, to end a sentence with.

    Attributes:
        state: Entry name to tensor.
        place: Where it is; no two of a problem are at one place.
        memo: `memo(key, make)` keeps what is as large as the state, such as folded weights, as long as it.
    """

    state: State
    place: str = ""
    memo: Memo = field(default_factory=Memo)


class Points(Sequence[Point]):
    """The states of a problem by their numbers: all held on the objective's device, or each made when it is asked for.

    Args:
        objective: The loss.
        states: The states by name.
        held: Whether they are held; else what is asked for is the caller's alone.

    Raises:
        DirectionError: A state has an unknown entry, a wrong shape or a type that cannot move.
        NonFiniteError: A state is not finite.
    """

    def __init__(self, objective: Objective, states: Mapping[str, State], *, held: bool):
        self._objective, self._states, self._names = objective, states, tuple(states)
        self._held: dict[str, Point] = {}
        for name in self._names:
            point = self._make(name)
            check_finite({entry: point.state[entry] for entry in objective.snapshot}, name or "the state")
            if held:
                self._held[name] = point

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, number: int) -> Point: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Point]: ...
    def __getitem__(self, number: int | slice) -> Point | Sequence[Point]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        name = self._names[number]
        return self._held[name] if name in self._held else self._make(name)

    def _make(self, name: str) -> Point:
        return Point(self._objective.complete(self._states[name]), f" at {name}" if name else "")


@dataclass(frozen=True)
class Tiling:
    """The examples and directions that are swept together.

    Attributes:
        examples: Examples in a tile.
        directions: Directions in a group.
        keeps_values: Whether the values of all tiles are kept until their turn, or computed anew.
    """

    examples: int
    directions: int
    keeps_values: bool


@dataclass(frozen=True, eq=False)
class Problem:
    """Slopes and curvature of an objective along k directions, at one state or several.

    Attributes:
        objective: The loss and its data.
        points: The states.
        directions: k sparse states on the objective's device; each holds only the entries it moves.
        displaced: Names of the entries that a direction moves by more than zero; all that are moved if there are none.
        memory_gib: GiB that the sweep may take for values and tangents; None for the default.
        tiling: The tiles to sweep batches in that can be cut; None to choose them by memory and cache.
        memo: `memo(key, make)` keeps what is made once for this problem.
    """

    objective: Objective
    points: Sequence[Point]
    directions: Sequence[State]
    displaced: frozenset[str]
    memory_gib: float | None = None
    tiling: Tiling | None = None
    memo: Memo = field(default_factory=Memo)

    @classmethod
    @outside_inference()
    def of(
        cls,
        objective: Objective,
        states: Mapping[str, State] | Sequence[State],
        directions: Mapping[str, State] | Sequence[State],
        *,
        memory_gib: float | None = None,
        held: bool = True,
    ) -> "Problem":
        """Place states and directions on the objective's device, and check them.

        Args:
            objective: The loss and its data.
            states: The states, by name or in order.
            directions: The directions, by name or in order.
            memory_gib: GiB that the sweep may take.
            held: Whether all states are held on the device; else each is brought there, or made, when it is asked for.

        Raises:
            DirectionError: A state or direction has an unknown entry, a wrong shape or a type that cannot move; a
                direction moves what is fixed, or has values that are not finite; or there is no direction.
            NonFiniteError: A state is not finite.
            OptionError: `memory_gib` is not positive.
        """
        if memory_gib is not None:
            check_budget(memory_gib)
        named = dict(directions) if isinstance(directions, Mapping) else dict(enumerate(directions))
        if not named:
            raise DirectionError("There is no direction to project onto; expected at least one.")
        placed = [_place_direction(objective, name, direction) for name, direction in named.items()]
        displaced = _displaced(dict(zip(named, placed, strict=True)))
        if not isinstance(states, Mapping):
            number = len(states)
            states = {f"state {index} of {number}" if number > 1 else "": s for index, s in enumerate(states, 1)}
        return cls(objective, Points(objective, states, held=held), placed, displaced, memory_gib)

    @property
    def moved(self) -> frozenset[str]:
        """Names of the entries that a direction moves."""
        return frozenset(name for direction in self.directions for name in direction)


def check_values(values: BatchValues, batch: Batch, point: Point) -> None:
    """Refuse an answer that is not finite.

    Raises:
        NonFiniteError: Names the batch, and the state if there are several.
    """
    loss, slopes, curvature = values
    finite_loss(loss, batch, point.place)
    if not (np.isfinite(slopes).all() and np.isfinite(curvature).all()):
        raise NonFiniteError(
            f"The slopes or the curvature are not finite at batch {batch.index} "
            f"({counted(batch.size, 'example')}){point.place}. "
            "Does the network compute something without a second derivative, such as a square root at zero?"
        )


def _place_direction(objective: Objective, label: str | int, direction: State) -> dict[str, torch.Tensor]:
    if not direction:
        raise DirectionError(f"Direction {label!r} moves no entry.")
    try:
        placed = objective.place(direction)
    except DirectionError as error:
        raise DirectionError(f"Direction {label!r}: {error}") from error
    fixed = placed.keys() - objective.snapshot.keys()
    if fixed:
        raise DirectionError(
            f"Direction {label!r} moves {min(fixed)!r}, which is not part of the state under "
            f"batch_norm={objective.batch_norm!r}."
        )
    return placed


def _displaced(directions: Mapping[Any, State]) -> frozenset[str]:
    """Names of the entries that are moved by more than zero, or all of them.

    Raises:
        DirectionError: A direction has values that are infinite or not a number.
    """
    entries = [(label, name) for label, direction in directions.items() for name in direction]
    # The device is asked once.
    sizes = largest_values(tensor for direction in directions.values() for tensor in direction.values()).tolist()
    for (label, name), size in zip(entries, sizes, strict=True):
        if not math.isfinite(size):
            raise DirectionError(f"Direction {label!r} has values in {name!r} that are infinite or not a number.")
    return frozenset(name for (_, name), size in zip(entries, sizes, strict=True) if size) or frozenset(
        name for _, name in entries
    )
