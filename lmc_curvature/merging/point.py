"""The point of the cube of layers with the least loss: a position between the two networks for every layer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn

from lmc_curvature.averages import with_error
from lmc_curvature.barrier import BarrierPrediction
from lmc_curvature.merging.merge import merge_predicted
from lmc_curvature.merging.residuals import Correction
from lmc_curvature.merging.rises import point_rises, rise_in_words, sampling_error
from lmc_curvature.merging.summaries import point_summary, point_verification_summary
from lmc_curvature.merging.trials import Bench, PointTrial, check_trials
from lmc_curvature.plotting.summary import Display, Summary

# Random starts beside the anchors, and the step of differences.
_RANDOM, _STEP = 8, 1e-6
# Points this near to a measured one are not measured again.
_NEAR = 1e-3


@dataclass(frozen=True, eq=False, repr=False)
class BestPoint(Display):
    """The point of the cube of layers with the least predicted loss: θ(x) = θ₁ + Σ_ℓ x_ℓ Δ_ℓ.

    Attributes:
        alphas: x_ℓ, the position of every layer between `model_a` at 0 and `model_b` at 1.
        rise: Predicted loss there, minus the mean loss of the two networks.
        loss: Predicted loss there.
        expansion_error: Expansion error of both: nine points in ten on related networks are off by less.
        standard_error: Sampling error of the rise; NaN for a single batch.
        prediction: The prediction.
    """

    alphas: dict[str, float]
    rise: float
    loss: float
    expansion_error: float
    standard_error: float
    prediction: BarrierPrediction = field(repr=False)

    @classmethod
    def of(cls, prediction: BarrierPrediction, x: Float[np.ndarray, " L"]) -> "BestPoint":
        """A point, with what is predicted there."""
        return cls(
            alphas=dict(zip(prediction.layers, x.tolist(), strict=True)),
            rise=float(point_rises(prediction, x[None])[0]),
            loss=float(prediction.loss_at(x[None])[0]),
            expansion_error=float(prediction.loss_errors(x[None])[0]),
            standard_error=sampling_error(prediction, [x]),
            prediction=prediction,
        )

    def merge(self, model_a: nn.Module, model_b: nn.Module, **options: Any) -> nn.Module:
        """The network at this point, as it was predicted; options as in `Selection.merge`."""
        return merge_predicted(self.prediction, self.alphas, model_a, model_b, **options)

    def verify(
        self,
        model_a: nn.Module,
        model_b: nn.Module,
        loader: Iterable[Any],
        *,
        measurements: int = 10,
        held_out: Iterable[Any] | None = None,
        **options: Any,
    ) -> "PointVerification":
        """Measure the point, and look for a better one by what is learned.

        Each trial measures the point with the least rise by the prediction, corrected by the trials before, see
        `Correction`. Trials end where that point is known already. The two networks and their midpoint are measured
        beside the first, at no cost.

        Args:
            model_a: The network at α = 0.
            model_b: The network at α = 1.
            loader: Yields batches; every trial visits it once.
            measurements: The largest number of trials.
            held_out: Other data, on which the point is measured in the end.
            **options: Options of `measure_barrier`, the same as those of the prediction, which itself tells the layers
                and what is frozen.

        Raises:
            LMCCurvatureError: The networks, a loader or an option are not what they should be; the subclasses of
                `lmc_curvature.errors` tell which.
        """
        check_trials(measurements, loader, options)
        bench, correction = Bench(self.prediction, model_a, model_b, loader, options), Correction.of(self.prediction)
        point, trials, found = np.array(list(self.alphas.values())), [], []
        while len(trials) < measurements and not (np.abs(correction.points - point).max(axis=1) < _NEAR).any():
            points = np.stack([point, *(() if trials else np.outer([0.0, 0.5, 1.0], np.ones_like(point)))])
            measured, correction = _measured(bench, points, correction)
            trials.append(measured[0])
            found += measured
            best = np.array(list(min(found, key=lambda each: each.rise).alphas.values()))
            point = _lowest(lambda x, known=correction: known.at(x)[0], [point, best, *_starts(self.prediction)])
        chosen = min(found, key=lambda each: each.rise)
        x = np.array(list(chosen.alphas.values()))
        again = None if held_out is None else _measured(bench, x[None], correction, held_out)[0][0]
        return PointVerification(BestPoint.of(self.prediction, x), tuple(trials), chosen, again)

    def _summary(self) -> Summary:
        return point_summary(self)

    def __str__(self) -> str:
        ends = " and ".join(f"{end.loss:.4g}" for end in self.prediction.endpoints)
        width = max(map(len, self.alphas))
        corners = ((0.0, "model_a"), (1.0, "model_b"))
        itself = [name for end, name in corners if all(abs(alpha - end) < _STEP for alpha in self.alphas.values())]
        strange = self.loss < 0 <= min(anchor.projection.loss for anchor in self.prediction.anchors)
        lines = [
            f"Point with the least predicted loss, {self.loss:.4g}; the two networks have {ends}",
            f"  predicted rise  {rise_in_words(self.prediction, self.rise, self.standard_error, self.expansion_error)}",
            *(f"  this is {name} itself" for name in itself),
            *(["  the loss is predicted below zero, where it may never be"] if strange else []),
            *(f"  {layer:<{width}}  {alpha:.3f}" for layer, alpha in self.alphas.items()),
        ]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False, repr=False)
class PointVerification(Display):
    """A point of the cube that was measured, and improved by what was learned.

    Attributes:
        point: The measured point with the least rise, with what is predicted there.
        trials: Every measured point, in order.
        chosen: What was measured there.
        held_out: What was measured there on the held-out data; None without such data.
    """

    point: BestPoint
    trials: tuple[PointTrial, ...]
    chosen: PointTrial
    held_out: PointTrial | None = None

    def _summary(self) -> Summary:
        return point_verification_summary(self)

    def __str__(self) -> str:
        lines = [str(self.point), f"  measured rise   {with_error(self.chosen.rise, self.chosen.standard_error)}"]
        if self.held_out is not None:
            lines.append(f"  on held-out     {with_error(self.held_out.rise, self.held_out.standard_error)}")
        return "\n".join(
            [
                *lines,
                "  all measured points:",
                *(f"  {number:>3}. {each}" for number, each in enumerate(self.trials, 1)),
            ]
        )


def best_point(prediction: BarrierPrediction) -> BestPoint:
    """Find the point of the cube of layers with the least predicted loss, a position for every layer.

    The loss is minimised under the bounds 0 and 1 by L-BFGS-B (Byrd et al. 1995), from every anchor and from eight
    random points. It need not be convex, so another point may be lower.
    """
    return BestPoint.of(prediction, _lowest(prediction.loss_at, _starts(prediction)))


def _starts(prediction: BarrierPrediction) -> list[Float[np.ndarray, " L"]]:
    size = len(prediction.layers)
    anchors = [np.full(size, anchor.alpha) for anchor in prediction.anchors]
    return [*anchors, *np.random.default_rng(0).random((_RANDOM, size))]


def _lowest(
    losses: Callable[[Float[np.ndarray, "n L"]], Float[np.ndarray, " n"]], starts: Iterable[Float[np.ndarray, " L"]]
) -> Float[np.ndarray, " L"]:
    """The lowest of the minima that are found from some points."""
    from scipy.optimize import minimize

    def loss_and_slopes(x: np.ndarray) -> tuple[float, np.ndarray]:
        # All differences in one call.
        steps = np.eye(len(x)) * _STEP
        above, below = np.clip(x + steps, 0.0, 1.0), np.clip(x - steps, 0.0, 1.0)
        values = losses(np.concatenate([x[None], above, below]))
        return float(values[0]), (values[1 : len(x) + 1] - values[len(x) + 1 :]) / np.diag(above - below)

    starts = list(starts)
    ends = [
        minimize(loss_and_slopes, each, jac=True, method="L-BFGS-B", bounds=[(0, 1)] * len(each)).x for each in starts
    ]
    points = np.clip(np.stack([*starts, *ends]), 0.0, 1.0)
    return points[int(losses(points).argmin())]


def _measured(
    bench: Bench,
    points: Float[np.ndarray, "n L"],
    correction: Correction,
    held_out: Iterable[Any] | None = None,
) -> tuple[list[PointTrial], Correction]:
    """Measure points, all in one pass, and learn from it."""
    measurement = bench.measure(points, held_out)
    predicted, expected = point_rises(bench.prediction, points), correction.at(points)[0]
    rises, errors = measurement.rises(), measurement.rise_errors()
    trials = [
        PointTrial(
            alphas=measurement.points[number],
            predicted=float(predicted[number]),
            expected=float(expected[number]),
            rise=float(rises[number]),
            standard_error=float(errors[number]),
        )
        for number in range(len(points))
    ]
    return trials, correction.extended(points, rises, np.nan_to_num(errors))
