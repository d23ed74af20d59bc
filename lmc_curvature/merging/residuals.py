"""Predicted losses corrected by measurements: a Gaussian process on what the prediction was off by."""

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from lmc_curvature.barrier import BarrierPrediction
from lmc_curvature.barrier.blending import layer_shares
from lmc_curvature.merging.rises import point_rises

# Nine in ten normal errors are within so many standard deviations, as nine in ten are within the expansion error.
_NINE_IN_TEN = 1.645
# Amplitudes, in expansion errors, and correlation lengths, with normal priors on their logarithms.
_AMPLITUDES, _LENGTHS = 2.0 ** np.arange(-3, 3), 2.0 ** np.arange(-3.0, 3)
_LIKELY_LENGTH, _SPREAD = 0.5, np.log(3.0)


@dataclass(frozen=True, eq=False)
class Correction:
    """Rises of the loss at points of the cube, predicted and then corrected by those measured at some points.

    What the prediction is off by is taken as a Gaussian process: zero where the loss is known, at the anchors, with a
    standard deviation in proportion to the expansion error, and a correlation that falls with the distance
    d² = Σ_ℓ e_ℓ (x_ℓ − x'_ℓ)², in the metric of the prediction, as exp(−d / length). Amplitude and length are those
    of the highest posterior probability on a small grid.

    Attributes:
        prediction: The prediction.
        points: Points where rises were measured, (n, L).
        rises: What was measured there, (n,).
        noise: Standard errors of these, (n,).
    """

    prediction: BarrierPrediction
    points: Float[np.ndarray, "n L"]
    rises: Float[np.ndarray, " n"]
    noise: Float[np.ndarray, " n"]

    @classmethod
    def of(cls, prediction: BarrierPrediction) -> "Correction":
        """Without measurements: the prediction itself."""
        return cls(prediction, np.zeros((0, len(prediction.layers))), np.zeros(0), np.zeros(0))

    def extended(
        self, points: Float[np.ndarray, "m L"], rises: Float[np.ndarray, " m"], noise: Float[np.ndarray, " m"]
    ) -> "Correction":
        """With more measurements."""
        columns = (np.concatenate(pair) for pair in ((self.points, points), (self.rises, rises), (self.noise, noise)))
        return Correction(self.prediction, *columns)

    @cached_property
    def _fit(self) -> tuple[tuple[float, float], np.ndarray, np.ndarray, np.ndarray]:
        """Amplitude and length; at the points, the errors' scales; the inverse covariance, and it times residuals."""
        residuals, scales = self.rises - point_rises(self.prediction, self.points), self._scales(self.points)
        distances = self._distances(self.points)
        noise = self.noise**2 + 1e-6 * (scales**2).sum() / max(1, len(scales)) + 1e-300
        best, highest = (1.0, _LIKELY_LENGTH), -np.inf
        for amplitude, length in itertools.product(_AMPLITUDES, _LENGTHS):
            covariance = _covariance(amplitude, length, scales, scales, distances) + np.diag(noise)
            prior = np.log([amplitude, length / _LIKELY_LENGTH]) / _SPREAD
            fit = residuals @ np.linalg.solve(covariance, residuals) + np.linalg.slogdet(covariance)[1]
            if -(fit + prior @ prior) / 2 > highest:
                best, highest = (float(amplitude), float(length)), -(fit + prior @ prior) / 2
        covariance = _covariance(*best, scales, scales, distances) + np.diag(noise)
        inverse = np.linalg.inv(covariance)
        return best, scales, inverse, inverse @ residuals

    def at(self, points: Float[np.ndarray, "m L"]) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
        """Corrected rises at points of the cube, and their standard deviations."""
        (amplitude, length), known, inverse, weights = self._fit
        scales = self._scales(points)
        cross = _covariance(amplitude, length, scales, known, self._distances(points))
        left = (amplitude * scales) ** 2 - np.einsum("mn,nk,mk->m", cross, inverse, cross, optimize=True)
        return point_rises(self.prediction, points) + cross @ weights, np.sqrt(np.maximum(left, 0.0))

    def _scales(self, points: Float[np.ndarray, "m L"]) -> Float[np.ndarray, " m"]:
        return self.prediction.loss_errors(points) / _NINE_IN_TEN

    def _distances(self, points: Float[np.ndarray, "m L"]) -> Float[np.ndarray, "m n"]:
        shares = layer_shares(np.stack([end.curvature for end in self.prediction.endpoints]))
        squares = [(each**2 @ shares) for each in (points, self.points)]
        return np.sqrt(np.maximum(squares[0][:, None] + squares[1] - 2 * (points * shares) @ self.points.T, 0.0))


def _covariance(
    amplitude: float, length: float, first: np.ndarray, second: np.ndarray, distances: np.ndarray
) -> np.ndarray:
    return amplitude**2 * first[:, None] * second * np.exp(-distances / length)
