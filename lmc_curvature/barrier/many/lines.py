"""Straight lines between networks and means of them, predicted in one pass over the data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

from lmc_curvature.barrier.blending import Positions
from lmc_curvature.barrier.evaluation import ErrorWatch
from lmc_curvature.barrier.predict import prediction_of
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.curvature.problem import Method, Problem
from lmc_curvature.curvature.projection.project import project_problems
from lmc_curvature.objective import Objective
from lmc_curvature.segment import Hull
from lmc_curvature.segment.hull import place_key

# A vector is a combination of others if so little of it is left over; and a coefficient that is so near to a whole
# number is that, so that a line's own directions are taken as they are.
_REST, _WHOLE = 1e-9, 1e-12


@dataclass(frozen=True, eq=False)
class Line:
    """A segment between two places of a hull, each for all layers alike, and the anchors on it.

    Attributes:
        start: Place of its start: what each network has a share of, (N,).
        end: Place of its end.
        positions: Positions of the anchors, rising from 0 to 1.
        ends: What the two ends are called.
    """

    start: Float[np.ndarray, " N"]
    end: Float[np.ndarray, " N"]
    positions: Positions
    ends: tuple[str, str]

    @property
    def direction(self) -> Float[np.ndarray, " N"]:
        """From its start to its end."""
        return self.end - self.start

    def at(self, alpha: float) -> Float[np.ndarray, " N"]:
        """The place at a position."""
        return (1 - alpha) * self.start + alpha * self.end

    def describe(self, alpha: float) -> str:
        """What the state at a position is called."""
        return {0.0: self.ends[0], 1.0: self.ends[1]}.get(
            alpha, f"alpha={alpha:.3g} between {self.ends[0]} and {self.ends[1]}"
        )


@dataclass(frozen=True, eq=False)
class Station:
    """A place where the loss is differentiated, once for all lines that meet there.

    Along lines whose directions are combinations of others' nothing is differentiated: what is known along those tells
    it, layer by layer.

    Attributes:
        place: Its place in the hull, (N,).
        name: What it is called.
        basis: Numbers of the lines that it is differentiated along.
        combinations: Number of each line through it to its direction as a combination of theirs, (basis,).
    """

    place: Float[np.ndarray, " N"]
    name: str
    basis: tuple[int, ...]
    combinations: Mapping[int, Float[np.ndarray, " basis"]]


def pair_lines(names: Sequence[str], positions: Positions) -> list[Line]:
    """The lines between all pairs of networks, with anchors at the same positions."""
    corners = np.eye(len(names))
    return [
        Line(corners[i], corners[j], positions, (names[i], names[j])) for i, j in combinations(range(len(names)), 2)
    ]


def spoke_lines(names: Sequence[str], weights: Float[np.ndarray, " N"]) -> list[Line]:
    """The line from each network k through the mean of all, θ̄ = Σ w_k θ_k, to the mean of the others.

    That mean is (θ̄ − w_k θ_k) / (1 − w_k), and θ̄ lies at 1 − w_k: the middle one of three anchors.
    """
    corners = np.eye(len(names))
    return [
        Line(
            corner,
            np.where(corner == 1, 0.0, weights) / weights[corner == 0].sum(),
            np.array([0.0, 1 - weight, 1.0]),
            (name, f"the mean of all but {name}"),
        )
        for corner, name, weight in zip(corners, names, weights, strict=True)
    ]


def stations_of(lines: Sequence[Line]) -> list[Station]:
    """The places of all anchors, each once, with what is differentiated there."""
    visits: dict[bytes, list[tuple[int, float]]] = {}
    for number, line in enumerate(lines):
        for alpha in line.positions.tolist():
            visits.setdefault(place_key(line.at(alpha)), []).append((number, alpha))
    return [_station(lines, each) for each in visits.values()]


def _station(lines: Sequence[Line], visits: Sequence[tuple[int, float]]) -> Station:
    first, alpha = visits[0]
    basis: list[int] = []
    for number, _ in visits:
        if _combination([lines[each] for each in basis], lines[number]) is None:
            basis.append(number)
    found = {number: _combination([lines[each] for each in basis], lines[number]) for number, _ in visits}
    combinations = {number: each for number, each in found.items() if each is not None}
    return Station(lines[first].at(alpha), lines[first].describe(alpha), tuple(basis), combinations)


def _combination(basis: Sequence[Line], line: Line) -> Float[np.ndarray, " basis"] | None:
    """The direction of a line as a combination of others'; None if it is none."""
    if not basis:
        return None
    columns = np.stack([each.direction for each in basis], axis=1)
    found = np.linalg.lstsq(columns, line.direction, rcond=None)[0]
    found = np.where(np.abs(found - np.round(found)) < _WHOLE, np.round(found), found)
    return found if np.abs(columns @ found - line.direction).max() < _REST else None


def predict_on_lines(
    objective: Objective,
    hull: Hull,
    lines: Sequence[Line],
    *,
    method: Method = "auto",
    memory_gib: float | None = None,
    progress: bool | None = None,
) -> list[BarrierPrediction]:
    """Predict the barriers along several lines of a hull, in one pass over the data.

    Every station is visited once a batch, along the lines that meet there.

    Args:
        objective: The loss, of a network of the hull's architecture and under its policy.
        hull: The hull, on its device and of its type.
        lines: The lines.
        method: Method to compute curvature; see `project_hessian`.
        memory_gib: Memory to compute it in, in GiB; see `project_hessian`.
        progress: Show a progress bar over batches; by default on a terminal and in notebooks.

    Returns:
        The prediction on each line, whose `model_a` is its start and `model_b` its end.
    """
    stations = stations_of(lines)
    segments = [hull.line(line.start, line.end) for line in lines]
    along = {each for station in stations for each in station.basis}
    directions = {each: segments[each].directions() for each in along}
    states = [hull.at(station.place[None]) for station in stations]
    problems = [
        Problem.of(
            objective,
            {station.name: state},
            {f"{layer} of line {each}": d for each in station.basis for layer, d in directions[each].items()},
            memory_gib=memory_gib,
        )
        for station, state in zip(stations, states, strict=True)
    ]
    # Two that are near to each other may have one name.
    watch = ErrorWatch(objective, {str(number): state for number, state in enumerate(states)})
    projections = project_problems(problems, method=method, watch=watch, progress=progress)
    errors = watch.errors()
    numbers = {place_key(station.place): number for number, station in enumerate(stations)}
    found, layers = [], np.eye(len(hull.layers))
    for number, (line, segment) in enumerate(zip(lines, segments, strict=True)):
        stops = [numbers[place_key(line.at(alpha))] for alpha in line.positions.tolist()]
        # The same combination of every layer's directions.
        along_line = [np.kron(stations[stop].combinations[number][:, None], layers) for stop in stops]
        found.append(
            prediction_of(
                objective,
                segment,
                line.positions,
                [projections[stop].along(each) for stop, each in zip(stops, along_line, strict=True)],
                None if errors is None else errors[stops],
                method,
            )
        )
    return found
