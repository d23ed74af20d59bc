"""The whole path on real images: train siblings, predict their barriers, measure them, draw both."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from lmc_curvature.averages import rank_correlation
from lmc_curvature.barrier.measurement import BarrierMeasurement, measure_barrier
from lmc_curvature.barrier.prediction import BarrierPrediction, predict_on_segment
from lmc_curvature.figures.agreement import draw_predicted_against_measured
from lmc_curvature.figures.barriers import draw_barrier_curves, draw_layer_bars
from lmc_curvature.figures.files import save_figure
from lmc_curvature.figures.kinds import draw_barrier_kinds
from lmc_curvature.figures.landscapes import draw_toy_landscapes
from lmc_curvature.forking.directory import initial_model, load_child
from lmc_curvature.forking.experiment import run_forks
from lmc_curvature.forking.plan import ForkConfig
from lmc_curvature.forking.provenance import load_fork_data
from lmc_curvature.forking.sharing import cpu_threads
from lmc_curvature.forking.training import TrainingConfig
from lmc_curvature.objective.risk import Objective
from lmc_curvature.segment.segment import Segment

CONFIG = ForkConfig(
    data="digits",
    model="digits-resnet",
    # Narrow, and trained with a high learning rate and strong decay: digits are easy, and wide networks trained gently
    # have hardly a barrier between them.
    model_options={"width": 4},
    training=TrainingConfig(
        epochs=16, learning_rate=0.3, milestones=(11, 14), weight_decay=0.001, batch_size=32, warmup_epochs=3
    ),
    fork_epochs=(0, 1, 2, 4, 8),
    # One thread is as fast for so small a network, and gives the same bits whatever the number of cores.
    threads=1,
)
"""A parent trained for 16 epochs on 1,437 digits, and two children from each of five of its epochs."""

_BATCH_SIZE = 256


@dataclass(frozen=True)
class DemoResult:
    """What the demo found, by fork epoch, and where the figures are.

    Attributes:
        predictions: Fork epoch to the prediction for its two children.
        measurements: Fork epoch to the measurement: the whole network, each layer, then the sets of `layer_sets`.
        figures: The files drawn.
    """

    predictions: Mapping[int, BarrierPrediction]
    measurements: Mapping[int, BarrierMeasurement]
    figures: tuple[Path, ...]


def run_demo(out_dir: str | PathLike[str], *, device: torch.device | str = "cpu", progress: bool = True) -> DemoResult:
    """Fork, predict, measure and draw, under one directory; networks that it already holds are not trained again.

    Args:
        out_dir: Where everything goes: networks under `forks/`, results under `barriers/`, figures beside them.
        device: Where to compute.
        progress: Show progress bars.

    Raises:
        ConfigurationError: The directory holds another experiment.
        OSError: The directory cannot be written.
    """
    out_dir = Path(out_dir)
    run_forks(CONFIG, out_dir / "forks", device=device, progress=progress)
    loader = load_fork_data(out_dir / "forks", progress=False).to(device).batches(_BATCH_SIZE)
    predictions, measurements = {}, {}
    with cpu_threads(CONFIG.threads):
        # One for all forks: the network is captured once.
        objective = Objective(initial_model(CONFIG).to(device), loader)
        for fork in tqdm(CONFIG.fork_epochs, desc="barriers", unit="fork", disable=not progress):
            first, second = (load_child(out_dir / "forks", fork, child).to(device) for child in (0, 1))
            prediction = predict_on_segment(objective, Segment(first, second), progress=False)
            sets = [*([name] for name in prediction.layers), *layer_sets(prediction.layers).values()]
            measurement = measure_barrier(first, second, loader, layers=sets, progress=False)
            prediction.save(out_dir / "barriers" / f"fork-{fork:04d}" / "predicted.safetensors")
            measurement.save(out_dir / "barriers" / f"fork-{fork:04d}" / "measured.safetensors")
            predictions[fork], measurements[fork] = prediction, measurement
    return DemoResult(predictions, measurements, _draw(predictions, measurements, out_dir))


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
    guesses: dict[str, np.ndarray] = {
        "second-order": prediction.layer_barriers("second-order"),
        "with-slopes": prediction.layer_barriers("with-slopes"),
        "distance": prediction.distances,
    }
    return {name: rank_correlation(guess, measured) for name, guess in guesses.items()}


def _draw(
    predictions: Mapping[int, BarrierPrediction], measurements: Mapping[int, BarrierMeasurement], out_dir: Path
) -> tuple[Path, ...]:
    names = next(iter(predictions.values())).layers
    figures = {
        "barrier-curves": draw_barrier_curves(predictions, measurements),
        "predicted-against-measured": draw_predicted_against_measured(predictions, measurements),
        "layer-barriers": draw_layer_bars(
            predictions, measurements, titles={members: title for title, members in layer_sets(names).items()}
        ),
        "toy-landscapes": draw_toy_landscapes(),
        "barrier-kinds": draw_barrier_kinds(),
    }
    return tuple(path for name, figure in figures.items() for path in save_figure(figure, out_dir / name))
