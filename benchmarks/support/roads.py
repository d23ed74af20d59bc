"""Rows of tables for the roads to a result, and bars between them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from benchmarks.support.problems import Problem
from benchmarks.support.report import Bar
from benchmarks.support.timing import Measurement, Road, Spread


def eager_forward(problem: Problem) -> list[Road]:
    """On CUDA, where F is the replay of a graph, the road that launches it from Python; none elsewhere."""
    if problem.device.type != "cuda":
        return []
    return [Road("forward pass, eager", problem.eager_forward, problem.forward)]


def road_row(measurement: Measurement, problem: Problem, *, error: float | None = None) -> dict[str, Any]:
    """The row of a road: time, memory, error.

    Args:
        measurement: The road's.
        problem: The problem whose gradient is the unit of peaks.
        error: Relative error of the road's result.
    """
    notes = [measurement.road.note, measurement.failure, "first call only" if measurement.first_call_only else ""]
    time, peak = measurement.time, measurement.peak
    row: dict[str, Any] = {
        "road": measurement.road.name,
        "ms": Spread(1000 * time.median, 1000 * time.low, 1000 * time.high),
        "F": measurement.in_forwards,
        "peak_mib": None if peak is None else peak / 2**20,
        "peak_gradients": None if peak is None or not problem.gradient_peak else peak / problem.gradient_peak,
        "error": error,
        "samples": len(measurement.seconds),
        "note": "; ".join(note for note in notes if note),
    }
    return {key: value for key, value in row.items() if value is not None}


def road_rows(
    roads: Iterable[Road],
    found: Mapping[str, Measurement],
    problem: Problem,
    errors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Rows of some roads, with measurements and relative errors by name."""
    return [road_row(found[road.name], problem, error=(errors or {}).get(road.name)) for road in roads]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest |found − expected| over the largest |expected|, in float64."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).abs().max() / expected.abs().max())


def fastest(measurements: Iterable[Measurement]) -> Measurement | None:
    """The road with the smallest median in F; None if none was timed."""
    timed = [measurement for measurement in measurements if measurement.multiples]
    return min(timed, key=lambda measurement: measurement.in_forwards.median, default=None)


def bar_against_fastest(what: str, ours: Measurement, peers: Iterable[Measurement]) -> list[Bar]:
    """The bar that ours takes at most as long as the fastest peer; none without peers."""
    peer = fastest(peers)
    if peer is None:
        return []
    ratio = ours.in_forwards.over(peer.in_forwards)
    return [Bar(f"{what}: ours / the fastest peer ({peer.road.name})", ratio, "at most", 1.0)]
