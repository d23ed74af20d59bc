"""How long does it take to select layers?

    python scripts/time_selection.py

Predictions of random numbers with indefinite curvature, at three anchors; the base that lets more be averaged is
chosen, too. With up to 20 layers every set is looked at; with more, a search is made. Seconds on this machine are
printed in Markdown, with the share of the weight that is selected.
"""

import time

import numpy as np
import typer

from lmc_curvature import BarrierPrediction, Projection, select_layers
from lmc_curvature.barrier.cube import Anchor

LAYERS, BUDGET = (12, 20, 40, 60), 1.0


def main(seed: int = 0) -> None:
    """Select, and print a table."""
    print("| layers | sets | seconds | selected |\n| --- | --- | --- | --- |")
    for count in LAYERS:
        prediction = random_prediction(count, np.random.default_rng(seed))
        begun = time.perf_counter()
        selection = select_layers(prediction, BUDGET)
        seconds = time.perf_counter() - begun
        print(f"| {count} | {'all' if selection.exact else 'a search'} | {seconds:.1f} | {selection.share:.0%} |")


def random_prediction(count: int, rng: np.random.Generator) -> BarrierPrediction:
    """A prediction whose losses, slopes and curvatures are random numbers."""
    anchors = []
    for alpha in (0.0, 0.5, 1.0):
        root = rng.normal(size=(1, count, count)) / count**0.5
        curvature = root + root.transpose(0, 2, 1) + np.eye(count)
        # A barrier in the middle, so that not all layers can be averaged.
        loss = rng.random(1) + (10.0 if alpha == 0.5 else 0.0)
        numbers = loss, rng.normal(size=(1, count)) / count**0.5, curvature
        anchors.append(Anchor(alpha, Projection(np.array([8]), *numbers)))
    layers, sizes = tuple(f"layer{number}" for number in range(count)), rng.integers(1, 100, count)
    return BarrierPrediction(layers, tuple(anchors), rng.random(count), "interpolate", parameters=sizes)


if __name__ == "__main__":
    typer.run(main)
