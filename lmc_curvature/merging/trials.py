"""Merges that were measured: what was predicted of each, and what was found."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn

from lmc_curvature.averages import with_error
from lmc_curvature.barrier import BarrierMeasurement, BarrierPrediction, measure_barrier
from lmc_curvature.errors import LoaderError, OptionError
from lmc_curvature.merging.rises import Base
from lmc_curvature.segment import Segment

# Relative to each other, what equal numbers may differ by that were computed on another device or in another precision.
_SAME = 1e-3


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A merge that was measured. A rise is its loss minus the mean loss of the two networks.

    Attributes:
        predicted: The rise by the prediction.
        expected: The rise that was expected when it was chosen, from the prediction and the trials before.
        rise: The measured rise.
        standard_error: Its standard error, from the spread between batches; NaN for a single batch.
    """

    predicted: float
    expected: float
    rise: float
    standard_error: float

    @property
    def known_error(self) -> float:
        """The standard error, or 0 where a single batch does not tell it."""
        return float(np.nan_to_num(self.standard_error))

    def __str__(self) -> str:
        return f"{with_error(self.rise, self.standard_error)}, expected {self.expected:.4g}"


@dataclass(frozen=True, kw_only=True)
class SetTrial(Trial):
    """A set of layers that was averaged and measured; see `Trial`.

    Attributes:
        members: Names of the layers.
        base: Whose the others were.
        weight: Weight of the set.
    """

    members: tuple[str, ...]
    base: Base
    weight: float


@dataclass(frozen=True, kw_only=True)
class PointTrial(Trial):
    """A point of the cube of layers that was measured; see `Trial`.

    Attributes:
        alphas: Position of every layer.
    """

    alphas: dict[str, float]


@dataclass(frozen=True, eq=False)
class Bench:
    """Two networks, data and options, to measure points of the cube of layers with, as often as is asked.

    Attributes:
        prediction: The prediction.
        model_a: The network at α = 0.
        model_b: The network at α = 1.
        loader: The data that is chosen on, and on which statistics are re-estimated if no other is given for that.
        options: Options of `measure_barrier`.
    """

    prediction: BarrierPrediction
    model_a: nn.Module
    model_b: nn.Module
    loader: Iterable[Any]
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.prediction.groups is not None:
            policy = self.options.get("batch_norm", self.prediction.batch_norm)
            options = self.prediction.segment_options(self.model_a, policy)
            check_networks(self.prediction, Segment(self.model_a, self.model_b, batch_norm=policy, **options))

    def measure(self, points: Float[np.ndarray, "n L"], held_out: Iterable[Any] | None = None) -> BarrierMeasurement:
        """The points, the ends and the midpoint between them, on the data that is chosen on or on other data.

        Raises:
            OptionError: The networks are the other way round than in the prediction.
        """
        named = [dict(zip(self.prediction.layers, point, strict=True)) for point in points.tolist()]
        options = {"batch_norm": self.prediction.batch_norm, "metrics": ("loss",), **self.options}
        options |= self.prediction.segment_options(self.model_a, options["batch_norm"])
        if held_out is not None and options["batch_norm"] == "recalibrate":
            # The network is the one that was chosen, whose statistics are not those of the held-out data.
            options = {"recalibration": self.loader, **options}
        loader = self.loader if held_out is None else held_out
        found = measure_barrier(self.model_a, self.model_b, loader, points=named, alphas=[0.5], **options)
        expected = [end.loss for end in self.prediction.endpoints]
        if np.allclose(found.ends(), expected[::-1], rtol=_SAME) and not np.allclose(*expected, rtol=2 * _SAME):
            raise OptionError(
                f"The networks have losses {found.ends()[0]:.6g} and {found.ends()[1]:.6g}, those of the prediction "
                "the other way round: pass model_a and model_b as they were predicted."
            )
        return found


def check_networks(prediction: BarrierPrediction, segment: Segment) -> None:
    """Refuse two networks that are not those of a prediction, by the distances between them.

    Raises:
        OptionError: The distances are others.
    """
    by_layer = dict(zip(segment.layers, segment.distances(), strict=True))
    found = np.array([by_layer[name] for name in prediction.layers])
    if not np.allclose(found, prediction.distances, rtol=_SAME):
        worst = int(np.abs(found - prediction.distances).argmax())
        raise OptionError(
            f"These are not the networks of the prediction: layer {prediction.layers[worst]!r} has moved by "
            f"{found[worst]:.6g} between them, by {prediction.distances[worst]:.6g} in the prediction."
        )


def check_trials(measurements: object, loader: object, options: Mapping[str, Any]) -> None:
    """Raise unless a loader can be visited as often as is asked for, and the options leave the points alone.

    Raises:
        OptionError: `measurements` is no positive number, or an option is chosen here.
        LoaderError: The loader can be visited only once.
    """
    if isinstance(measurements, bool) or not isinstance(measurements, (int, np.integer)) or measurements < 1:
        raise OptionError(f"measurements={measurements!r}: expected a number of at least 1.")
    for name in ("sets", "points", "alphas"):
        if name in options:
            raise OptionError(f"{name}={options[name]!r}: what is measured is chosen here; leave it out.")
    if "loss" not in options.get("metrics", ("loss",)):
        raise OptionError(f"metrics={options['metrics']!r}: the loss is needed; add 'loss'.")
    if isinstance(loader, Iterator):
        raise LoaderError(
            f"{type(loader).__name__} can be visited only once, and every measurement visits the loader: pass a list "
            "or a DataLoader."
        )
