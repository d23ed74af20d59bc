"""The average of two networks or several, of all their layers or some, as a network."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from lmc_curvature.barrier import BarrierPrediction
from lmc_curvature.barrier.setup import segment_options
from lmc_curvature.errors import OptionError, check_choice
from lmc_curvature.merging.coordinates import Alpha, averaged_layers, merge_coordinates, refuse_alpha
from lmc_curvature.merging.trials import check_networks, loss_option
from lmc_curvature.objective import LossFunction, Objective, State
from lmc_curvature.objective.network import acts_on_modes, copy_in_evaluation, entries_of
from lmc_curvature.objective.normalization import is_batch_counter, statistic_names, tracked_modules
from lmc_curvature.objective.numerics import outside_inference
from lmc_curvature.objective.reach import reached_from_copy
from lmc_curvature.objective.recalibration import recalibrate, warn_of_worse
from lmc_curvature.objective.settings import hidden_differences, setting_differences
from lmc_curvature.objective.wrappers import unwrap
from lmc_curvature.segment import Hull, PartitionSpec, Segment
from lmc_curvature.segment.hull import Weights, network_names, network_weights, two_networks

MergePolicy = Literal["interpolate", "recalibrate"]
"""What becomes of running statistics: interpolated with their layers, or estimated anew for the averaged network."""


def merge(
    model_a: nn.Module,
    model_b: nn.Module,
    *others: nn.Module,
    alpha: Alpha | None = None,
    weights: Weights | None = None,
    layers: Iterable[str] | str | None = None,
    partition: PartitionSpec = "fused",
    base: Literal["a", "b"] = "a",
    batch_norm: MergePolicy = "interpolate",
    loader: Iterable[Any] | None = None,
    recalibration: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    max_batches: int | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Average two networks or several, or some layers of them, into one.

    The result has the entries θ₁ + Σ x_ℓ Δ_ℓ: averaged layers at x_ℓ = `alpha`, the others at those of the base. Of
    several networks, and of two with weights, averaged layers have the entries Σ_k w_k θ_k. Here
    `layers` is a set of layers, as in `BarrierPrediction.barrier` and `Segment.point`; the rule that cuts networks into
    layers, which `predict_barrier` is told as `layers`, is `partition`. Of a selection, `Selection.merge` makes what
    was predicted: it knows the partition and what was frozen.

    Args:
        model_a: The network at α = 0; it is not modified.
        model_b: The network at α = 1; it is not modified, and may be on another device.
        *others: Further networks, which errors call model_c, …; likewise.
        alpha: The coordinate in [0, 1] of the averaged layers of two networks, by default ½, or layer name to a
            coordinate of its own: any point of the cube.
        weights: What each network counts for, positive numbers that sum to one, in their order; of several networks
            equal by default.
        layers: Names of the layers that are averaged; by default all, or those that `alpha` names.
        partition: How entries are grouped into layers; see `LayerPartition.of`.
        base: The network, `"a"` or `"b"`, whose entries the other layers keep.
        batch_norm: What becomes of running statistics: `"interpolate"` averages them with their layers,
            `"recalibrate"` estimates them anew.
        loader: Under `"recalibrate"`, the data on which losses are evaluated.
        recalibration: Under `"recalibrate"`, the data on which statistics are estimated, by default `loader`. They
            should be those that the networks were trained on, augmentation included: if the loss of either network
            rises, that is warned of.
        loss_fn: Under `"recalibrate"`, the loss; see `Objective`.
        max_batches: Under `"recalibrate"`, use only this many batches.
        progress: Show progress bars over batches; by default on a terminal and in notebooks.

    Returns:
        A copy of `model_a`, without wrappers such as DataParallel, in evaluation mode, with the averaged entries. What
        is not averaged, such as counters of batches, is that of the base. Under `"recalibrate"` its attribute
        `recalibration` holds the losses before and after; see `Recalibration`.

    Warns:
        UserWarning: The networks differ in a setting that the merged network has of `model_a`.

    Raises:
        LMCCurvatureError: The networks, the loaders or an option are not what they should be; the subclasses of
            `lmc_curvature.errors` tell which.
    """
    evaluation = {"loader": loader, "recalibration": recalibration, "loss_fn": loss_fn, "max_batches": max_batches}
    models = (model_a, model_b, *others)
    names = network_names(len(models))
    if weights is None and not others:
        segment = Segment(model_a, model_b, layers=partition, base=base)
        state = segment.at(merge_coordinates(segment.partition.groups, 0.5 if alpha is None else alpha, layers, base))
        states = (segment.start, segment.end)
    else:
        refuse_alpha(alpha)
        check_choice("base", base, ("a", "b"))
        hull, shares = Hull(models, names, layers=partition), network_weights(weights, names)
        outside = hull.corner("ab".index(base))
        state = hull.at(hull.mixture(outside, shares, averaged_layers(hull.groups, layers)))
        states = hull.states
    networks = dict(zip(names, zip(models, states, strict=True), strict=True))
    return network_of(state, networks, base=base, batch_norm=batch_norm, progress=progress, **evaluation)


def merge_predicted(
    prediction: BarrierPrediction,
    alphas: Mapping[str, float],
    model_a: nn.Module,
    model_b: nn.Module,
    *,
    base: Literal["a", "b"] = "a",
    batch_norm: MergePolicy | None = None,
    **options: Any,
) -> nn.Module:
    """The network at a point of the cube of layers of a prediction, whose layers and frozen parts it has.

    Args:
        prediction: The prediction.
        alphas: Coordinate of every layer.
        model_a: The network at α = 0; it is not modified.
        model_b: The network at α = 1; it is not modified.
        base: The network whose counters of batches it has.
        batch_norm: What becomes of running statistics; by default as in the prediction.
        **options: Further options of `merge`.

    Raises:
        OptionError: The prediction is of an earlier version, which does not tell its layers' entries; or it was made
            under `"batch"`, which no network keeps to in evaluation mode.
    """
    if prediction.groups is None:
        raise OptionError(
            "This prediction comes from an earlier version, which does not tell the layers' entries: predict again, or "
            "call merge with the same partition."
        )
    if batch_norm is None and not any(tracked_modules(unwrap(model_a))):
        batch_norm = "interpolate"
    if batch_norm is None:
        if prediction.batch_norm == "batch":
            raise OptionError(
                "The prediction was made under batch_norm='batch', and a network in evaluation mode normalises by "
                "running statistics: pass batch_norm='recalibrate' with a loader, or 'interpolate'."
            )
        batch_norm = "recalibrate" if prediction.batch_norm == "recalibrate" else "interpolate"
    segment = Segment(model_a, model_b, **segment_options(prediction, model_a, "interpolate"))
    check_networks(prediction, segment)
    held = {entry for entries in prediction.groups.values() for entry in entries}
    left_out = [name for module, _ in tracked_modules(unwrap(model_a)) for name in statistic_names(module)]
    if batch_norm == "interpolate" != prediction.batch_norm and not held.issuperset(left_out):
        raise OptionError(
            f"The prediction was made under batch_norm={prediction.batch_norm!r}, and its layers name no running "
            "statistics, which batch_norm='interpolate' averages with their layers: pass batch_norm='recalibrate' with "
            "a loader."
        )
    options |= loss_option(prediction, options) if batch_norm == "recalibrate" else {}
    # Layers of running statistics alone are those of the base.
    alphas = dict.fromkeys(segment.layers, 1.0 if base == "b" else 0.0) | dict(alphas)
    networks = {"model_a": (model_a, segment.start), "model_b": (model_b, segment.end)}
    return network_of(segment.at(alphas), networks, base=base, batch_norm=batch_norm, **options)


@torch.inference_mode(False)
def network_of(
    state: State,
    networks: Mapping[str, tuple[nn.Module, State]],
    *,
    base: Literal["a", "b"],
    batch_norm: MergePolicy,
    loader: Iterable[Any] | None = None,
    recalibration: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    max_batches: int | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """The network with the entries of a state between several; see `merge` for the options.

    Args:
        state: The state.
        networks: The networks with their states, by what they are called.
        base: The network whose counters of batches it has.
        batch_norm: What becomes of running statistics.
        loader: The data on which losses are evaluated.
        recalibration: The data on which statistics are estimated.
        loss_fn: The loss.
        max_batches: Use only this many batches.
        progress: Show progress bars over batches.
    """
    check_choice("batch_norm", batch_norm, ("interpolate", "recalibrate"))
    _check_loaders(batch_norm, loader=loader, recalibration=recalibration, loss_fn=loss_fn, max_batches=max_batches)
    models = [model for model, _ in networks.values()]
    first, *others = models
    merged = _with_entries(first, models["ab".index(base)], state)
    for name, other in zip(list(networks)[1:], others, strict=True):
        _warn_of_settings(first, other, merged, two_networks(next(iter(networks)), name))
    if where := reached_from_copy(merged, unwrap(first)):
        warnings.warn(
            f"The merged network reaches for modules of model_a itself in {where!r}, by a closure or a reference, and "
            "may compute with their entries: reach modules as self.layer in forward, and let a hook be a method.",
            stacklevel=4,
        )
    if loader is not None:
        objective = Objective(
            merged,
            loader,
            loss_fn=loss_fn,
            batch_norm=batch_norm,
            recalibration=recalibration,
            max_batches=max_batches,
            twins=models,
        )
        states = [objective.place(each) for each in (state, *(own for _, own in networks.values()))]
        statistics, found = recalibrate(objective, states, progress=progress)
        _copy_into(merged, statistics[0])
        vars(merged)["recalibration"] = found[0]
        for each, owner in zip(found[1:], networks, strict=True):
            warn_of_worse(each, owner, stacklevel=4)
        if found[0].is_worse and not any(each.is_worse for each in found[1:]):
            warnings.warn(
                f"Re-estimated statistics make the merged network worse: {found[0]}. Choose batch_norm='interpolate'.",
                stacklevel=4,
            )
    return merged


def _check_loaders(batch_norm: str, **options: Any) -> None:
    if batch_norm == "recalibrate":
        if options["loader"] is None:
            raise OptionError(
                "batch_norm='recalibrate' needs data: pass loader=…, and recalibration=… if the networks were trained "
                "on augmented images."
            )
        return
    for name, value in options.items():
        if value is not None:
            raise OptionError(
                f"{name} is for batch_norm='recalibrate'; with batch_norm={batch_norm!r} a merge looks at no data."
            )


@outside_inference()
def _with_entries(model: nn.Module, base: nn.Module, state: State) -> nn.Module:
    merged = copy_in_evaluation(unwrap(model))
    counters = {name: entry for name, entry in entries_of(unwrap(base)).items() if is_batch_counter(name)}
    _copy_into(merged, {**counters, **state})
    if acts_on_modes(merged):
        # What modules compute from their entries when they leave training mode is then of these entries.
        merged.train()
        merged.eval()
    return merged


def _warn_of_settings(model_a: nn.Module, model_b: nn.Module, merged: nn.Module, named: str) -> None:
    first, second = unwrap(model_a), unwrap(model_b)
    differences = hidden_differences(first, second, kept=True)
    remade = {difference.where for difference in setting_differences(first, merged)} if differences else set()
    lines = [str(difference) for difference in differences if difference.where not in remade]
    if lines:
        warnings.warn(
            f"{named or 'The networks'} differ in more than their entries: {'; '.join(lines)}. The merged network has "
            "what model_a has, even what was computed from its entries.",
            stacklevel=5,
        )


@torch.no_grad()
def _copy_into(network: nn.Module, entries: State) -> None:
    own = entries_of(network)
    for name, tensor in entries.items():
        own[name].copy_(tensor)
