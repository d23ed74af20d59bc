"""How often do 95 % intervals from a few batches hold the barrier of all data?

    python scripts/study_coverage.py --out runs/study

The pairs are those of `study_expansions.py`, cut into batches of 64 examples. All batches together give the barriers at
α = 1/2, with their signs: of the whole network, of each layer, and of random sets, predicted and measured. Then some of
the batches are drawn, with replacement, many times over, and each time it is seen whether the interval that they give
holds the barrier of all. Shares of the draws are printed in Markdown.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from jaxtyping import Int
from study_expansions import Only, Out, Pair, Threads, make_pairs, random_sets
from tqdm.auto import tqdm

from lmc_curvature import BarrierMeasurement, BarrierPrediction, LayerPartition, Projection, measure_barrier
from lmc_curvature import predict_barrier as predict
from lmc_curvature.averages import interval, weighted_mean
from lmc_curvature.barrier.cube import Anchor

Intervals = list[tuple[float, float]]

PAIRS = ("digits, fork 0", "digits, fork 2", "no normalisation, late fork")
BATCHES = (3, 5, 10, 30)
EXAMPLES, BATCH, SETS = 1437, 64, 10


def main(
    out: Out = Path("runs/study"),
    only: Only = None,
    draws: Annotated[int, typer.Option(help="How often batches are drawn.")] = 1000,
    threads: Threads = 1,
) -> None:
    """Predict and measure once, draw batches, and count."""
    torch.set_num_threads(threads)
    pairs = make_pairs(out, None, None, list(only or PAIRS), EXAMPLES)
    print(f"| pair | barriers | {' | '.join(f'{count} batches' for count in BATCHES)} |")
    print("|" + " --- |" * (2 + len(BATCHES)))
    for name, make in pairs.items():
        for kind, shares in coverage(make, draws).items():
            print(f"| {name} | {kind} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |")


def coverage(make: Callable[[], Pair], draws: int) -> dict[str, list[float]]:
    """For predicted and measured barriers, the shares of draws whose intervals hold them, for every number of batches.

    The share of the whole network, then the median and the smallest among layers and sets.
    """
    networks, loader = make()
    batches = [part for x, y in loader for part in zip(x.split(BATCH), y.split(BATCH), strict=True)]
    names = np.array(LayerPartition.of(networks[0]).names)
    sets = [tuple(names[row]) for row in (*np.eye(len(names), dtype=bool), *random_sets(len(names))[:SETS])]
    prediction = predict(*networks, batches, progress=False)
    measurement = measure_barrier(*networks, batches, sets=sets, alphas=[0, 0.5, 1], metrics=("loss",), progress=False)
    generator = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for kind, truth, of_rows in (
        ("predicted", _predicted_of_all(prediction, sets), partial(_predicted, prediction)),
        ("measured", _measured_of_all(measurement, sets), partial(_measured, measurement)),
    ):
        for count in BATCHES:
            inside = np.zeros(len(truth))
            for _ in tqdm(range(draws), desc=f"{kind}, {count} batches", leave=False):
                rows = generator.integers(len(batches), size=count)
                intervals = zip(truth, of_rows(rows, sets), strict=True)
                inside += [low <= value <= high for value, (low, high) in intervals]
            shares = inside / draws
            for which, share in {
                "whole network": shares[0],
                "the median layer or set": np.median(shares[1:]),
                "the layer or set held least often": shares[1:].min(),
            }.items():
                found.setdefault(f"{kind}, {which}", []).append(float(share))
    return found


def _predicted(prediction: BarrierPrediction, rows: Int[np.ndarray, " rows"], sets: list[Any]) -> Intervals:
    """Intervals of the whole network and of the sets, from some of the batches."""
    anchors = []
    for alpha, projection in prediction.anchors:
        fields = {field.name: getattr(projection, field.name) for field in dataclasses.fields(projection)}
        anchors.append(Anchor(alpha, Projection(**{n: None if v is None else v[rows] for n, v in fields.items()})))
    drawn = dataclasses.replace(prediction, anchors=tuple(anchors))
    members = drawn._cube.sets([None, *sets])
    batches = drawn._cube.pseudo_barriers(members, 0.5, drawn.expansion)
    return [interval(values, drawn.endpoints[0].weights) for values in batches.T]


def _measured(measurement: BarrierMeasurement, rows: Int[np.ndarray, " rows"], sets: list[Any]) -> Intervals:
    curves = measurement._batch_curves("loss")[rows][:, :, 1]
    weights = measurement.weights()[rows]
    return [interval(curves[:, number], weights) for number in range(1 + len(sets))]


def _predicted_of_all(prediction: BarrierPrediction, sets: list[Any]) -> list[float]:
    return prediction.set_barriers([prediction.layers, *sets]).tolist()


def _measured_of_all(measurement: BarrierMeasurement, sets: list[Any]) -> list[float]:
    means = weighted_mean(measurement._batch_curves("loss")[:, :, 1], measurement.weights())
    return [float(value) for value in means[: 1 + len(sets)]]


if __name__ == "__main__":
    typer.run(main)
