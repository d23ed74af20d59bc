"""Predictions of the barrier between two networks, from the curvature at each of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial.polynomial import polyval
from torch import nn

from lmc_curvature.averages import standard_error, with_error
from lmc_curvature.barrier.expansions import EXPANSIONS, Endpoint, Expansion, check_alphas, coefficients, peak
from lmc_curvature.barrier.setup import segment_and_objective
from lmc_curvature.curvature.problem import Method
from lmc_curvature.curvature.projection import Projection, project_hessian_at
from lmc_curvature.errors import OptionError, check_choice, counted
from lmc_curvature.objective import BatchNormPolicy, LossFunction, Objective
from lmc_curvature.segment import Frozen, PartitionSpec, Segment, layer_indices
from lmc_curvature.storage import load_arrays, save_arrays

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_FIELDS = ("batch_sizes", "batch_losses", "batch_slopes", "batch_curvatures", "batch_weights")


@torch.inference_mode(False)
def predict_barrier(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    *,
    loss_fn: LossFunction | None = None,
    layers: PartitionSpec = "fused",
    frozen: Frozen = (),
    base: Literal["a", "b"] = "a",
    batch_norm: BatchNormPolicy = "interpolate",
    method: Method = "auto",
    memory_gib: float | None = None,
    max_batches: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
    witness: bool = True,
    progress: bool | None = None,
) -> "BarrierPrediction":
    """Predict the barrier between two networks, for all their layers and for any set of them, in one pass.

    Loss, slopes and the layer-by-layer curvature ΔᵀHΔ are computed exactly at both networks, on the same batches;
    the barrier follows from them by Taylor expansion (Propositions 1 and 2 of Singh et al. 2024).

    Args:
        model_a: The network at α = 0; it is not modified.
        model_b: The network at α = 1; it is not modified.
        loader: Yields `(x, y)` batches, or what `loss_fn` expects; visited once.
        loss_fn: `loss_fn(output, target)` returning the mean over the batch (default: cross-entropy), or a `BatchLoss`.
        layers: The partition into L layers; see `LayerPartition.of`.
        frozen: Layers that stay at the entries of `model_a` in both networks, or of `model_b` with `base="b"`: their
            names, regular expressions for entries, or `"requires_grad"` for what does not require gradients; see
            `Segment`.
        base: The network at which they stay, `"a"` or `"b"`.
        batch_norm: Policy for batch normalisation between the networks; see `BatchNormPolicy`. Under
            `"recalibrate"` the prediction differentiates through batch statistics, as under `"batch"`.
        method: Method to compute curvature; see `project_hessian`.
        memory_gib: Memory to compute it in, in GiB; see `project_hessian`.
        max_batches: Use only this many batches; the standard errors say how far to trust the result.
        device: Device to compute on; `model_a`'s device by default.
        dtype: Floating-point type to compute in; by default `model_a`'s, float32 at least.
        allow_tf32: On a CUDA device, round convolutions to TF32; see `Objective`.
        witness: Compare derivatives with differences of the loss first; see `Objective`.
        progress: Show a progress bar over batches; by default on a terminal and in notebooks.

    Raises:
        LMCCurvatureError: The networks, the loader or an option are not what they should be; the subclasses of
            `lmc_curvature.errors` tell which.
    """
    segment, objective = segment_and_objective(
        model_a,
        model_b,
        loader,
        layers=layers,
        batch_norm=batch_norm,
        frozen=frozen,
        base=base,
        loss_fn=loss_fn,
        max_batches=max_batches,
        device=device,
        dtype=dtype,
        allow_tf32=allow_tf32,
        witness=witness,
    )
    return predict_on_segment(objective, segment, method=method, memory_gib=memory_gib, progress=progress)


def predict_on_segment(
    objective: Objective,
    segment: Segment,
    *,
    method: Method = "auto",
    memory_gib: float | None = None,
    progress: bool | None = None,
) -> "BarrierPrediction":
    """Predict the barrier along a segment, as `predict_barrier` does for two networks.

    Several segments with one objective share what it keeps about its network, such as the graph of its operations.

    Args:
        objective: The loss, of a network of the segment's architecture and under its policy.
        segment: The segment between the two networks.
        method: Method to compute curvature; see `project_hessian`.
        memory_gib: Memory to compute it in, in GiB; see `project_hessian`.
        progress: Show a progress bar over batches; by default on a terminal and in notebooks.
    """
    segment = segment.to(objective.device, objective.dtype)
    ends, directions = {"model_a": segment.start, "model_b": segment.end}, segment.directions()
    first, second = project_hessian_at(
        objective, ends, directions, method=method, memory_gib=memory_gib, progress=progress
    )
    parameters = {name for name, _ in objective.network.named_parameters()}
    squares = [
        sum(float((tensor.double() ** 2).sum()) for name, tensor in direction.items() if name in parameters)
        for direction in directions.values()
    ]
    notes = objective.notes + segment.notes
    return BarrierPrediction(segment.layers, (first, second), np.sqrt(np.array(squares)), objective.batch_norm, notes)


@dataclass(frozen=True, eq=False)
class BarrierPrediction:
    """A prediction of the barrier between two networks, for any set of layers.

    A set of layers is given by names; None means all of them, the whole network. Positions α run from `model_a` at 0
    to `model_b` at 1. Barriers are in units of the loss.

    Attributes:
        layers: Names of the L layers.
        endpoints: Projections onto the layers' directions Δ_ℓ at `model_a` and at `model_b`.
        distances: Norms of Δ_ℓ over parameters, (L,); running statistics have another scale, and are left out.
        batch_norm: The batch-normalisation policy.
        notes: Sentences that belong beside the numbers, such as what is frozen.
    """

    layers: tuple[str, ...]
    endpoints: tuple[Projection, Projection]
    distances: Float[np.ndarray, " layers"]
    batch_norm: BatchNormPolicy
    notes: tuple[str, ...] = ()

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
        expansion: Expansion = "second-order",
    ) -> Float[np.ndarray, " n"]:
        """Predicted barrier curve B_S(α) at positions in [0, 1]; see `expansions.coefficients` for the formulas.

        Raises:
            OptionError: A position lies outside [0, 1].
            PartitionError: The set names an unknown layer.
            OptionError: `expansion` is not a choice, or is `"hermite"` for a set that is not the whole network.
        """
        return polyval(check_alphas(alphas), self._coefficients(layers, expansion))

    def barrier(self, layers: Iterable[str] | str | None = None, expansion: Expansion = "second-order") -> float:
        """Predicted barrier of a set of layers: the maximum of its curve over [0, 1], so 0 where no α rises."""
        curve = self._coefficients(layers, expansion)
        return float(polyval(peak(curve), curve))

    def layer_barriers(self, expansion: Expansion = "second-order") -> Float[np.ndarray, " layers"]:
        """Predicted barrier of each layer alone (Proposition 2)."""
        return np.array([self.barrier([layer], expansion) for layer in self.layers])

    @property
    def interactions(self) -> Float[np.ndarray, "layers layers"]:
        """B[ℓ,ℓ'] = Δ_ℓᵀ H₁ Δ_ℓ' / 8 (eq. 20), summing to the shared-Hessian barrier curve at α = 1/2."""
        return self.endpoints[0].curvature / 8

    @property
    def hessian_energy(self) -> Float[np.ndarray, " layers"]:
        """Δ_ℓᵀ H Δ_ℓ of each layer, the mean of the two endpoints."""
        return np.mean([np.diag(end.curvature) for end in self.endpoints], axis=0)

    def standard_error(self, layers: Iterable[str] | str | None = None, expansion: Expansion = "second-order") -> float:
        """Standard error of `barrier`, from the spread between batches; NaN for a single batch.

        At a maximum the position's own uncertainty does not matter to first order, so it is the standard error of
        the curve at the predicted position; 0 where the curve nowhere rises above the chord.
        """
        position = peak(self._coefficients(layers, expansion))
        members = layer_indices(self.layers, layers)
        curves = coefficients(expansion, *(_batch_values(end, members) for end in self.endpoints))
        return float(standard_error(np.asarray(polyval(position, curves)), self.endpoints[0].weights))

    def _coefficients(self, layers: Iterable[str] | str | None, expansion: Expansion) -> Float[np.ndarray, " powers"]:
        check_choice("expansion", expansion, EXPANSIONS)
        members = layer_indices(self.layers, layers)
        if expansion == "hermite" and len(members) < len(self.layers):
            raise OptionError(
                "expansion='hermite' holds for the whole network only: the slope along a set of layers changes with "
                "the other layers. Use layers=None, or 'with-slopes' for a set."
            )
        return coefficients(expansion, *(_mean_values(end, members) for end in self.endpoints))

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
        arrays = {"distances": self.distances}
        for number, projection in enumerate(self.endpoints):
            fields = {field: getattr(projection, field) for field in _FIELDS}
            arrays |= {f"endpoint_{number}.{field}": array for field, array in fields.items() if array is not None}
        metadata = {"layers": self.layers, "batch_norm": self.batch_norm, "notes": self.notes}
        save_arrays(path, "barrier-prediction", arrays, **metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "BarrierPrediction":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: The file is damaged or holds something else.
        """
        arrays, metadata = load_arrays(path, "barrier-prediction")
        # Weights are there where they are not the sizes.
        names = [{field: f"endpoint_{number}.{field}" for field in _FIELDS} for number in (0, 1)]
        first, second = (
            Projection(**{field: arrays[name] for field, name in fields.items() if name in arrays}) for fields in names
        )
        # Files of earlier versions have no notes.
        layers, notes = tuple(metadata["layers"]), tuple(metadata.get("notes", ()))
        return cls(layers, (first, second), arrays["distances"], metadata["batch_norm"], notes)

    def plot(self) -> "Figure":
        """Draw the predicted curves of the whole network and the barriers of its layers."""
        from lmc_curvature.barrier.drawing import draw_prediction

        return draw_prediction(self)

    def __str__(self) -> str:
        first, second = self.endpoints
        barriers = self.layer_barriers()
        highest = np.argsort(barriers, kind="stable")[::-1][:3]
        lines = [
            f"Barrier predicted from {counted(self.examples, 'example')}, {counted(len(self.layers), 'layer')}, "
            f"batch_norm={self.batch_norm!r}"
            + (" (differentiated through batch statistics)" if self.batch_norm == "recalibrate" else ""),
            f"  loss at the ends   {first.loss:.4g}, {second.loss:.4g}; distance {self.distance:.4g}",
            *(
                f"  {expansion:<18} " + with_error(self.barrier(None, expansion), self.standard_error(None, expansion))
                for expansion in ("second-order", "with-slopes", "shared-hessian", "hermite")
            ),
            "  highest layers     " + ", ".join(f"{self.layers[index]} {barriers[index]:.4g}" for index in highest),
            *(f"  {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def _mean_values(end: Projection, members: list[int]) -> Endpoint:
    curvature = end.curvature[np.ix_(members, members)]
    return Endpoint(end.loss, float(end.slopes[members].sum()), float(curvature.sum()))


def _batch_values(end: Projection, members: list[int]) -> Endpoint:
    curvatures = end.batch_curvatures[:, members][:, :, members]
    return Endpoint(end.batch_losses, end.batch_slopes[:, members].sum(axis=1), curvatures.sum(axis=(1, 2)))
