"""The whole path on real images: train siblings, predict and measure barriers, draw both, choose what to average."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from lmc_curvature import (
    BarrierMeasurement,
    BarrierPrediction,
    Objective,
    Segment,
    figures,
    forking,
    measure_barrier,
    select_layers,
)
from lmc_curvature.averages import rank_correlation
from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.barrier.predict import predict_on_segment
from lmc_curvature.merging import Verification

CONFIG = forking.ForkConfig(
    data="digits",
    model="digits-resnet",
    # Narrow, and trained with a high learning rate and strong decay: digits are easy, and wide networks trained gently
    # have hardly a barrier between them.
    model_options={"width": 4},
    training=forking.TrainingConfig(
        epochs=16, learning_rate=0.3, milestones=(11, 14), weight_decay=0.001, batch_size=32, warmup_epochs=3
    ),
    fork_epochs=(0, 1, 2, 4, 8),
    # One thread is as fast for so small a network, and gives the same bits whatever the number of cores.
    threads=1,
)
"""A parent trained for 16 epochs on 1,437 digits, and two children from each of five of its epochs."""

BUDGET = 0.05
"""By how many nats the loss may rise where layers are averaged."""

_BATCH_SIZE, _MEASUREMENTS = 256, 5
# Errors are relative to no less, in nats: a barrier of zero has no relative error.
_LEAST = 1e-4


@dataclass(frozen=True)
class DemoResult:
    """Predictions and measurements of the demo by fork epoch, and the figures drawn from them.

    Attributes:
        predictions: Fork epoch to the prediction for its two children.
        measurements: Fork epoch to the measurement: the whole network, each layer, then the sets of `layer_sets`.
        selections: Fork epoch to the layers that can be averaged within `BUDGET`, measured and held out.
        figures: The files drawn.
    """

    predictions: Mapping[int, BarrierPrediction]
    measurements: Mapping[int, BarrierMeasurement]
    selections: Mapping[int, Verification]
    figures: tuple[Path, ...]


def run_demo(
    out_dir: str | PathLike[str], *, device: torch.device | str = "cpu", progress: bool | None = None
) -> DemoResult:
    """Fork, predict, measure, choose and draw, under one directory; networks that it holds are not trained again.

    Args:
        out_dir: Where everything goes: networks under `forks/`, results under `barriers/`, figures beside them.
        device: Where to compute.
        progress: Show progress bars; by default on a terminal and in notebooks.

    Raises:
        ConfigurationError: The directory holds another experiment.
        OSError: The directory cannot be written.
    """
    out_dir = Path(out_dir)
    forking.run_forks(CONFIG, out_dir / "forks", device=device, progress=progress)
    loader, held_out = (
        forking.load_fork_data(out_dir / "forks", split, progress=False).to(device).batches(_BATCH_SIZE)
        for split in ("train", "test")
    )
    predictions, measurements, selections = {}, {}, {}
    with forking.cpu_threads(CONFIG.threads):
        # One for all forks: the network is captured once.
        objective = Objective(forking.initial_model(CONFIG).to(device), loader)
        off = None if progress is None else not progress
        for fork in tqdm(CONFIG.fork_epochs, desc="barriers", unit="fork", disable=off):
            first, second = (forking.load_child(out_dir / "forks", fork, child).to(device) for child in (0, 1))
            prediction = predict_on_segment(objective, Segment(first, second), progress=False)
            sets = [*([name] for name in prediction.layers), *layer_sets(prediction.layers).values()]
            measurement = measure_barrier(first, second, loader, sets=sets, keep_partial=False, progress=False)
            folder = out_dir / "barriers" / f"fork-{fork:04d}"
            prediction.save(folder / "predicted.safetensors")
            measurement.save(folder / "measured.safetensors")
            selections[fork] = select_layers(prediction, BUDGET).verify(
                first, second, loader, measurements=_MEASUREMENTS, held_out=held_out, progress=False
            )
            predictions[fork], measurements[fork] = prediction, measurement
    return DemoResult(predictions, measurements, selections, _draw(predictions, measurements, out_dir))


def layer_sets(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Sets of layers that the demo predicts and measures besides each layer alone, with a title each."""
    half = len(names) // 2
    return {
        f"first {half} layers": names[:half],
        f"last {len(names) - half} layers": names[half:],
        "all but the last layer": names[:-1],
        "first and last layer": (names[0], names[-1]),
    }


def layer_rank_correlations(prediction: BarrierPrediction, measurement: BarrierMeasurement) -> dict[str, float]:
    """Spearman correlation, over layers, of what is known before measuring with the measured layer barriers."""
    measured = measurement.layer_barriers()[: len(prediction.layers)]
    rankings = {
        "predicted_anchored": prediction.layer_barriers("anchored"),
        "predicted": prediction.layer_barriers("second-order"),
        "predicted_with_slopes": prediction.layer_barriers("with-slopes"),
        "distance": prediction.distances,
    }
    return {name: rank_correlation(ranking, measured) for name, ranking in rankings.items()}


def median_errors(result: DemoResult, expansion: Expansion) -> tuple[float, float]:
    """Median |predicted − measured| / measured barrier, over forks, of single layers and of the demo's other sets."""
    single, several = [], []
    for fork, prediction in result.predictions.items():
        measurement = result.measurements[fork]
        for members, measured in zip(measurement.sets, measurement.layer_barriers(), strict=True):
            error = abs(prediction.barrier(members, expansion) - measured) / max(measured, _LEAST)
            (single if len(members) == 1 else several).append(error)
    return float(np.median(single)), float(np.median(several))


def _draw(
    predictions: Mapping[int, BarrierPrediction], measurements: Mapping[int, BarrierMeasurement], out_dir: Path
) -> tuple[Path, ...]:
    names = next(iter(predictions.values())).layers
    titles = {members: title for title, members in layer_sets(names).items()}
    drawn = {
        "barrier-curves": figures.draw_barrier_curves(predictions, measurements),
        "predicted-against-measured": figures.draw_predicted_against_measured(predictions, measurements),
        "layer-barriers": figures.draw_layer_bars(predictions, measurements, titles=titles),
        "toy-landscapes": figures.draw_toy_landscapes(),
        "barrier-kinds": figures.draw_barrier_kinds(),
    }
    return tuple(path for name, figure in drawn.items() for path in figures.save_figure(figure, out_dir / name))
