"""Predictions of the barrier between two networks, from the curvature at each of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from lmc_curvature.averages import interval, standard_error
from lmc_curvature.barrier.cube import Anchor, Cube, Sets
from lmc_curvature.barrier.expansions import EXPANSIONS, Expansion, check_alphas
from lmc_curvature.barrier.fields import OPTIONAL, PREDICTION, PROJECTION, WEIGHTS, prediction_fields
from lmc_curvature.barrier.summaries import prediction_summary
from lmc_curvature.curvature.projection import Projection
from lmc_curvature.errors import OptionError, check_choice
from lmc_curvature.objective import BatchNormPolicy, LossFunction
from lmc_curvature.plotting.summary import Display, Summary
from lmc_curvature.storage import save_arrays

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Alphas = float | Sequence[float] | Float[np.ndarray, " n"]


@dataclass(frozen=True, eq=False, repr=False)
class BarrierPrediction(Display):
    """A prediction of the barrier between two networks, for any set of layers.

    A set of layers is given by names; None means all of them, the whole network. Positions α run from `model_a` at 0
    to `model_b` at 1. Barriers are in units of the loss. An expansion is the formula that makes them of what is known
    at the anchors, see `barrier_weights`; None means `"anchored"` where there are anchors between the ends, and
    `"second-order"` where there are none.

    Attributes:
        layers: Names of the L layers.
        anchors: Positions α, rising from 0 to 1, each with the projection there.
        distances: Norms of Δ_ℓ over parameters, (L,); running statistics have another scale, and are left out.
        batch_norm: The batch-normalisation policy.
        notes: Sentences that belong beside the numbers, such as what is frozen.
        parameters: Number of parameters of each layer, (L,); None in files of earlier versions.
        errors: Share of the examples, or of the positions that count, that is classified wrongly at each anchor,
            (anchors,); None for other losses, and in files of earlier versions.
        cosine: Cosine of the angle between the two networks' weights, those of matrices and kernels; None where there
            are none.
        groups: Names of the entries of each layer, running statistics among them whatever the policy; None in files of
            earlier versions. All other entries are frozen.
        base: The network at which they are, `"a"` or `"b"`; of several networks perhaps `"other"` than both.
        norms: Norms of each layer's parameters at `model_a` and at `model_b`, (2, L), by which they are known again;
            None in such files.
        loss: Name of the loss, `"cross_entropy"` for the default; None in such files.
        loss_fn: The loss itself, with which selections are verified; None where the prediction was read from a file.
        interruption: What interrupted the pass over the data, and after how many batches; None if nothing did.
    """

    layers: tuple[str, ...]
    anchors: tuple[Anchor, ...]
    distances: Float[np.ndarray, " layers"]
    batch_norm: BatchNormPolicy
    notes: tuple[str, ...] = ()
    parameters: Int[np.ndarray, " layers"] | None = None
    errors: Float[np.ndarray, " anchors"] | None = None
    cosine: float | None = None
    groups: Mapping[str, tuple[str, ...]] | None = None
    base: Literal["a", "b", "other"] = "a"
    norms: Float[np.ndarray, "2 layers"] | None = None
    loss: str | None = None
    loss_fn: LossFunction | None = None
    interruption: str | None = None

    @property
    def partial(self) -> bool:
        """Whether it is of the batches before an interruption alone."""
        return self.interruption is not None

    @property
    def endpoints(self) -> tuple[Projection, Projection]:
        """Projections at `model_a` and at `model_b`."""
        return self.anchors[0].projection, self.anchors[-1].projection

    @property
    def distance(self) -> float:
        """Norm of Δ = θ₂ − θ₁ over parameters."""
        return float(np.linalg.norm(self.distances))

    @property
    def examples(self) -> int:
        """Number of examples the prediction was made from."""
        return self.endpoints[0].examples

    def curve(
        self,
        alphas: Sequence[float] | Float[np.ndarray, " n"],
        layers: Iterable[str] | str | None = None,
        expansion: Expansion | None = None,
    ) -> Float[np.ndarray, " n"]:
        """Predicted barrier curve B_S(α) at positions in [0, 1].

        Raises:
            OptionError: A position lies outside [0, 1], or `expansion` is no choice, or `"hermite"` for a set.
            PartitionError: The set names an unknown layer.
        """
        members = self._cube.sets([layers])
        return self._cube.barriers(members, check_alphas(alphas)[:, None], self._chosen(expansion, members))[:, 0]

    def barrier(self, layers: Iterable[str] | str | None = None, expansion: Expansion | None = None) -> float:
        """Predicted barrier of a set of layers: the maximum of its curve over [0, 1], so 0 where no α rises."""
        return float(self._highest(self._cube.sets([layers]), expansion)[1][0])

    def position(self, layers: Iterable[str] | str | None = None, expansion: Expansion | None = None) -> float:
        """Position α of `barrier`; 1/2 where the curve nowhere rises."""
        return self._position(self._cube.sets([layers]), expansion)

    def layer_barriers(self, expansion: Expansion | None = None) -> Float[np.ndarray, " layers"]:
        """Predicted barrier of each layer alone (Proposition 2)."""
        return self._highest(np.eye(len(self.layers), dtype=bool), expansion)[1].copy()

    def set_barriers(
        self, sets: Sets, alphas: Alphas = 0.5, expansion: Expansion | None = None
    ) -> Float[np.ndarray, " sets *n"]:
        """Predicted barriers of many sets of layers, with their signs: a million sets take seconds.

        Args:
            sets: Names of the layers of each set, or an array (sets, L) that is true where a set has a layer.
            alphas: A position in [0, 1], or n of them.
            expansion: The formula.

        Returns:
            B_S(α), (sets,) for one position and (sets, n) for several.

        Raises:
            OptionError: A position lies outside [0, 1], or `expansion` does not fit.
            PartitionError: A set names an unknown layer.
        """
        positions, members = check_alphas(alphas), self._cube.sets(sets)
        found = self._cube.barriers(members, positions[:, None], self._chosen(expansion, members)).T
        return found[:, 0] if np.ndim(alphas) == 0 else found

    def set_expansion_errors(self, sets: Sets, alphas: Alphas = 0.5) -> Float[np.ndarray, " sets *n"]:
        """Expansion errors of the anchored `set_barriers`: nine sets in ten on related networks are off by less.

        It is estimated from how far two ways to blend the anchors' expansions disagree, from what each anchor between
        the ends changes, and from the barrier's size; `docs/results.md` shows on which networks that was tried.
        """
        positions, members = check_alphas(alphas), self._cube.sets(sets)
        found = self._cube.expansion_errors(members, positions[:, None]).T
        return found[:, 0] if np.ndim(alphas) == 0 else found

    def loss_at(self, points: Float[np.ndarray, "n L"]) -> Float[np.ndarray, " n"]:
        """Predicted loss at points of the cube of layers: θ(x) = θ₁ + Σ_ℓ x_ℓ Δ_ℓ.

        Raises:
            OptionError: The points are no array (n, L) of numbers in [0, 1].
        """
        return self._cube.losses(points)

    def loss_errors(self, points: Float[np.ndarray, "n L"]) -> Float[np.ndarray, " n"]:
        """Expansion errors of `loss_at`, estimated as `set_expansion_errors` are."""
        return self._cube.loss_errors(points)

    def batch_losses(self, point: Float[np.ndarray, " L"]) -> Float[np.ndarray, " batches"]:
        """Predicted loss of every batch at one point of the cube; `loss_at` is their mean."""
        return self._cube.batch_losses(point)

    @property
    def interactions(self) -> Float[np.ndarray, "layers layers"]:
        """B[ℓ,ℓ'] = Δ_ℓᵀ H₁ Δ_ℓ' / 8 (eq. 20), summing to the shared-Hessian barrier curve at α = 1/2."""
        return self.endpoints[0].curvature / 8

    @property
    def hessian_energy(self) -> Float[np.ndarray, " layers"]:
        """Δ_ℓᵀ H Δ_ℓ of each layer, the mean of the two endpoints."""
        return np.mean([np.diag(end.curvature) for end in self.endpoints], axis=0)

    def standard_error(
        self,
        layers: Iterable[str] | str | None = None,
        expansion: Expansion | None = None,
        *,
        alpha: float | None = None,
    ) -> float:
        """Standard error of the curve, from the spread between batches; NaN for a single batch.

        By default it is that of `barrier`: at the predicted position, whose own uncertainty does not matter to first
        order, or at α = 1/2 where the curve nowhere rises above the chord.
        """
        members = self._cube.sets([layers])
        position = self._position(members, expansion) if alpha is None else check_alphas(alpha)[0]
        batches = self._cube.batch_barriers(members[0], position, self._chosen(expansion, members))
        return float(standard_error(batches, self.endpoints[0].weights))

    def interval(
        self, layers: Iterable[str] | str | None = None, *, alpha: float | int = 0.5, level: float | int = 0.95
    ) -> tuple[float, float]:
        """Confidence interval of the curve at α, from the spread between batches alone; see `averages.interval`.

        Each batch is left out in turn, so that the weights between anchors vary, too, which `standard_error` holds
        fixed.
        """
        members, position = self._cube.sets([layers]), check_alphas(alpha)[0]
        batches = self._cube.pseudo_barriers(members, position, self.expansion)
        return interval(batches[:, 0], self.endpoints[0].weights, level)

    def expansion_error(self, layers: Iterable[str] | str | None = None, *, alpha: float | None = None) -> float:
        """Expansion error of the anchored curve, by default at its highest point; no bound.

        See `set_expansion_errors`.
        """
        members = self._cube.sets([layers])
        position = self._position(members, "anchored") if alpha is None else check_alphas(alpha)[0]
        return float(self._cube.expansion_errors(members, np.array([[position]]))[0, 0])

    @property
    def expansion(self) -> Expansion:
        """The formula that is meant by None."""
        return "anchored" if len(self.anchors) > 2 else "second-order"

    @property
    def expansions(self) -> tuple[Expansion, ...]:
        """The expansions of the whole network that differ: with anchors between the ends, Hermite's is the anchored."""
        left_out = "hermite" if self.expansion == "anchored" else "anchored"
        return tuple(expansion for expansion in EXPANSIONS if expansion != left_out)

    @cached_property
    def _cube(self) -> Cube:
        return Cube(self.layers, self.anchors)

    def _chosen(self, expansion: Expansion | None, members: Bool[np.ndarray, "sets L"]) -> Expansion:
        if expansion is None:
            return self.expansion
        check_choice("expansion", expansion, EXPANSIONS)
        if expansion == "hermite" and not members.all():
            raise OptionError(
                "expansion='hermite' holds for the whole network only: the slope along a set of layers changes with "
                "the other layers. Use layers=None, or 'anchored' or 'with-slopes' for a set."
            )
        return expansion

    def _position(self, members: Bool[np.ndarray, "sets L"], expansion: Expansion | None) -> float:
        """Where a set's curve is highest; 1/2 where it nowhere rises."""
        return float(self._highest(members, expansion)[0][0]) or 0.5

    def _highest(
        self, members: Bool[np.ndarray, "sets L"], expansion: Expansion | None
    ) -> tuple[Float[np.ndarray, " sets"], Float[np.ndarray, " sets"]]:
        """Positions and values of the maxima."""
        return self._cube.highest(members, self._chosen(expansion, members))

    def to_dataframe(self) -> "pd.DataFrame":
        """A row a layer: distance, slopes and curvatures at both ends, and the layer's predicted barriers."""
        import pandas as pd

        first, second = self.endpoints
        return pd.DataFrame(
            {
                "layer": list(self.layers),
                "distance": self.distances,
                "slope_a": first.slopes,
                "slope_b": second.slopes,
                "curvature_a": np.diag(first.curvature),
                "curvature_b": np.diag(second.curvature),
                "hessian_energy": self.hessian_energy,
                "barrier": self.layer_barriers(),
                "barrier_se": [self.standard_error([layer]) for layer in self.layers],
                "barrier_with_slopes": self.layer_barriers("with-slopes"),
                "barrier_shared_hessian": self.layer_barriers("shared-hessian"),
            }
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the prediction to one safetensors file, without loss."""
        arrays, metadata = self.contents()
        save_arrays(path, PREDICTION, arrays, **metadata)

    def contents(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays and the metadata of its file."""
        arrays = {"distances": self.distances}
        arrays |= {name: getattr(self, name) for name in OPTIONAL if getattr(self, name) is not None}
        for number, (_, projection) in enumerate(self.anchors):
            fields = {field: getattr(projection, field) for field in (*PROJECTION, WEIGHTS)}
            arrays |= {f"anchor_{number}.{field}": array for field, array in fields.items() if array is not None}
        positions = [anchor.alpha for anchor in self.anchors]
        names = ("layers", "batch_norm", "notes", "cosine", "groups", "base", "loss", "interruption")
        return arrays, {name: getattr(self, name) for name in names} | {"anchors": positions}

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "BarrierPrediction":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: The file is damaged or holds something else.
        """
        return cls(**prediction_fields(path))

    def plot(self) -> "Figure":
        """Draw the predicted curves of the whole network and the barriers of its layers."""
        from lmc_curvature.barrier.drawing import draw_prediction

        return draw_prediction(self)

    def _summary(self) -> Summary:
        return prediction_summary(self)

    def __str__(self) -> str:
        from lmc_curvature.barrier.verdict import summary

        return summary(self)
