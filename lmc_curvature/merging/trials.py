"""Merges that were measured: what was predicted of each, and what was found."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn

from lmc_curvature.averages import with_error
from lmc_curvature.barrier import BarrierMeasurement, BarrierPrediction, measure_barrier
from lmc_curvature.barrier.losses import DEFAULT_LOSS
from lmc_curvature.barrier.setup import segment_options
from lmc_curvature.errors import LoaderError, OptionError
from lmc_curvature.merging.rises import Base
from lmc_curvature.objective.memo import Memo
from lmc_curvature.segment import Segment

# Relative to each other, what equal numbers may differ by that were computed on another device or in another precision.
_SAME = 1e-3
# And on one device, in one precision.
_SAME_DATA = 1e-5


@dataclass(frozen=True, kw_only=True, repr=False)
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rise {self})"

    def __str__(self) -> str:
        return f"{with_error(self.rise, self.standard_error)}, expected {self.expected:.4g}"


@dataclass(frozen=True, kw_only=True, repr=False)
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


@dataclass(frozen=True, kw_only=True, repr=False)
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
    _memo: Memo = field(default_factory=Memo)

    def __post_init__(self) -> None:
        policy = self.options.get("batch_norm", self.prediction.batch_norm)
        if policy != self.prediction.batch_norm:
            raise OptionError(
                f"batch_norm={policy!r}: the prediction was made under {self.prediction.batch_norm!r}; leave it out, "
                "or predict again."
            )
        loss_option(self.prediction, self.options)
        if self.prediction.groups is not None:
            options = segment_options(self.prediction, self.model_a, policy)
            check_networks(self.prediction, Segment(self.model_a, self.model_b, batch_norm=policy, **options))

    def measure(self, points: Float[np.ndarray, "n L"], held_out: Iterable[Any] | None = None) -> BarrierMeasurement:
        """The points, the ends and the midpoint between them, on the data that is chosen on or on other data.

        Raises:
            LoaderError: The loader yields other data than at the first measurement.
        """
        named = [dict(zip(self.prediction.layers, point, strict=True)) for point in points.tolist()]
        options = {"batch_norm": self.prediction.batch_norm, "metrics": ("loss",), **self.options}
        options["keep_partial"] = False
        options |= loss_option(self.prediction, self.options)
        options |= segment_options(self.prediction, self.model_a, options["batch_norm"])
        if held_out is not None and options["batch_norm"] == "recalibrate" and options.get("recalibration") is None:
            # The network is the one that was chosen, whose statistics are not those of the held-out data.
            options["recalibration"] = self.loader
        loader = self.loader if held_out is None else held_out
        found = measure_barrier(self.model_a, self.model_b, loader, points=named, alphas=[0.5], **options)
        if held_out is None:
            first = self._memo("losses", lambda: self._of_the_prediction(found))
            if not np.allclose(found.ends(), first, rtol=_SAME_DATA):
                raise LoaderError(
                    f"The loader yields other data in every pass: the two networks had losses {first[0]:.6g} and "
                    f"{first[1]:.6g}, now {found.ends()[0]:.6g} and {found.ends()[1]:.6g}. Measurements are compared: "
                    "pass one that yields the same examples every time, such as list(loader)."
                )
        return found

    def _of_the_prediction(self, found: BarrierMeasurement) -> tuple[float, float]:
        """The losses of the two networks; it is said if the prediction has others of what may be the same data."""
        expected = self.prediction.endpoints
        losses = [end.loss for end in expected]
        # Under "recalibrate" a prediction normalises by batches.
        comparable = self.prediction.batch_norm != "recalibrate"
        comparable &= np.array_equal(found.batch_sizes, expected[0].batch_sizes)
        if comparable and not np.allclose(found.ends(), losses, rtol=_SAME, atol=_SAME * max(map(abs, losses))):
            warnings.warn(
                f"The two networks have losses {found.ends()[0]:.6g} and {found.ends()[1]:.6g} here, {losses[0]:.6g}, "
                f"{losses[1]:.6g} in the prediction, on as many examples: if the data are the same, an option such as "
                "loss_fn is not.",
                stacklevel=5,
            )
        return found.ends()


def loss_option(prediction: BarrierPrediction, options: Mapping[str, Any]) -> dict[str, Any]:
    """The prediction's loss, as an option of what evaluates networks; nothing where another is given or it is default.

    Raises:
        OptionError: It is known by its name alone, for the prediction was read from a file.
    """
    if options.get("loss_fn") is not None or (prediction.loss_fn is None and prediction.loss in (None, DEFAULT_LOSS)):
        return {}
    if prediction.loss_fn is None:
        raise OptionError(
            f"The prediction was made with the loss {prediction.loss!r}, which its file cannot hold: pass the same as "
            "loss_fn=…, as in verify(…, loss_fn=…)."
        )
    return {"loss_fn": prediction.loss_fn}


def check_networks(prediction: BarrierPrediction, segment: Segment) -> None:
    """Refuse two networks that are not those of a prediction, by the norms of their layers.

    Raises:
        OptionError: They are others, or the other way round.
    """
    found = np.stack([segment.distances(), *segment.norms()])[:, [segment.layers.index(n) for n in prediction.layers]]
    norms = found[1:] if prediction.norms is None else prediction.norms
    expected = np.stack([prediction.distances, *norms])
    if np.allclose(found, expected, rtol=_SAME):
        return
    if np.allclose(found, expected[[0, 2, 1]], rtol=_SAME):
        raise OptionError(
            "The networks are those of the prediction the other way round: pass model_a and model_b as they were "
            "predicted."
        )
    row, layer = np.unravel_index(np.abs(found - expected).argmax(), found.shape)
    what = ("the distance between them", "its norm in model_a", "its norm in model_b")[row]
    raise OptionError(
        f"These are not the networks of the prediction: of layer {prediction.layers[layer]!r} {what} is "
        f"{found[row, layer]:.6g}, {expected[row, layer]:.6g} in the prediction."
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
