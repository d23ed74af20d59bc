"""The segment or hull of networks and the loss on it: what predictions and measurements have in common."""

import warnings
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lmc_curvature.errors import OptionError
from lmc_curvature.objective import BatchNormPolicy, Objective
from lmc_curvature.objective.network import movable_entries
from lmc_curvature.objective.wrappers import unwrap
from lmc_curvature.segment import Frozen, Hull, LayerPartition, PartitionSpec, Segment
from lmc_curvature.segment.hull import two_networks
from lmc_curvature.segment.segment import EQUAL

if TYPE_CHECKING:
    from lmc_curvature.barrier.prediction import BarrierPrediction


def segment_and_objective(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    *,
    layers: PartitionSpec,
    batch_norm: BatchNormPolicy,
    frozen: Frozen,
    base: Literal["a", "b"],
    places: bool = True,
    **options: Any,
) -> tuple[Segment, Objective]:
    """Return the segment between two networks, and the loss along it, which checks that both are one architecture.

    Two networks that are equal are warned of, at the line that called the caller's caller.

    Args:
        model_a: The network at α = 0.
        model_b: The network at α = 1.
        loader: The loader.
        layers: The partition into layers.
        batch_norm: Policy for batch normalisation between the networks.
        frozen: What stays at the entries of one of them; see `Segment`.
        base: Which one, `"a"` or `"b"`.
        places: Bring the segment to the objective's device, in its floating-point type.
        **options: Further options of the `Objective`.
    """
    segment = Segment(model_a, model_b, layers=layers, batch_norm=batch_norm, frozen=frozen, base=base)
    objective = Objective(model_a, loader, batch_norm=batch_norm, twins=[model_b], **options)
    if segment.is_point:
        # Between here and the user are predict_barrier or measure_barrier, and torch's wrapper around it.
        warnings.warn(f"{EQUAL}, so there is no barrier: is the same file given twice?", stacklevel=4)
    segment = segment.to(objective.device, objective.dtype) if places else segment
    # A large network is not copied twice.
    start = {name: own if _is_same(own := objective.snapshot[name], t) else t for name, t in segment.start.items()}
    return segment.between(start, segment.end), objective


def _is_same(one: Tensor, other: Tensor) -> bool:
    return (one.device, one.dtype) == (other.device, other.dtype) and torch.equal(one, other)


def hull_and_objective(
    models: Sequence[nn.Module],
    names: Sequence[str],
    loader: Iterable[Any],
    *,
    layers: PartitionSpec,
    batch_norm: BatchNormPolicy,
    frozen: Frozen,
    base: str | None,
    **options: Any,
) -> tuple[Hull, Objective]:
    """Return the hull of several networks, and the loss in it, which checks that all are one architecture.

    Networks that are equal are warned of, as by `segment_and_objective`.

    Args:
        models: The networks.
        names: Their names.
        loader: The loader.
        layers: The partition into layers.
        batch_norm: Policy for batch normalisation between the networks.
        frozen: What stays at the entries of one of them; see `Segment`.
        base: The name of that one; None for the first.
        **options: Further options of the `Objective`.
    """
    hull = Hull(models, names, layers=layers, batch_norm=batch_norm, frozen=frozen, base=base)
    twins = {two_networks(names[0], name): model for name, model in zip(names[1:], models[1:], strict=True)}
    objective = Objective(models[0], loader, batch_norm=batch_norm, twins=twins, **options)
    for (first, one), (second, other) in combinations(zip(names, hull.states, strict=True), 2):
        if all(torch.equal(tensor, other[name]) for name, tensor in one.items()):
            warnings.warn(
                f"Networks {first!r} and {second!r} are equal in every entry that moves, so there is no barrier: is "
                "the same network given twice?",
                stacklevel=4,
            )
    return hull.to(objective.device, objective.dtype), objective


def segment_options(prediction: "BarrierPrediction", model: nn.Module, batch_norm: BatchNormPolicy) -> dict[str, Any]:
    """The options of `Segment` and `measure_barrier` by which a network has a prediction's layers again.

    There are none in files of earlier versions, which do not tell.

    Raises:
        OptionError: What is frozen is that of a third network, which both do not have.

    Args:
        prediction: The prediction.
        model: The network.
        batch_norm: The policy, not always the prediction's: it decides whether running statistics move.
    """
    if prediction.groups is None:
        return {}
    if prediction.base == "other":
        raise OptionError(
            "The prediction is of two networks whose frozen entries are those of a third: predict_barriers(…, "
            "base=NAME) with one of the two, or predict_barrier of these alone."
        )
    own = {entry for members in prediction.groups.values() for entry in members}
    entries = movable_entries(unwrap(model), batch_norm)
    still = set(movable_entries(unwrap(model), "interpolate")).difference(entries)
    groups = {layer: tuple(e for e in members if e not in still) for layer, members in prediction.groups.items()}
    partition = LayerPartition({layer: members for layer, members in groups.items() if members})
    return {"layers": partition, "frozen": [e for e in entries if e not in own], "base": prediction.base}
