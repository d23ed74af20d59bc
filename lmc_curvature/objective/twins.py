"""Comparison of two networks that are given as one architecture: equal entries must give them equal outputs."""

from typing import Any

import torch
from torch import Tensor, nn

from lmc_curvature.agreement import near
from lmc_curvature.errors import ArchitectureMismatchError, UnsupportedModelError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.dependence import refuse_changes
from lmc_curvature.objective.losses import NetworkLoss
from lmc_curvature.objective.network import State, check_module, copies_of, entries_of, movable_entries, skeleton_of
from lmc_curvature.objective.normalization import BatchNormPolicy, Normalization, Statistics
from lmc_curvature.objective.randomness import global_rng_preserved
from lmc_curvature.objective.settings import hidden_differences, setting_differences
from lmc_curvature.objective.values import members
from lmc_curvature.objective.wrappers import unwrap

_LEAST_EXAMPLES = 16


def check_twin(
    twin: nn.Module,
    network_loss: NetworkLoss,
    state: State,
    batch: Batch,
    normalization: Normalization,
    batch_norm: BatchNormPolicy,
    rounding: float,
) -> str:
    """Refuse a network, called model_b, that computes of a batch something else than model_a with the same entries.

    They are compared with the entries of model_b and with those of model_a: with some entries, such as a last layer of
    zeros, the loss does not depend on a setting that matters with others. Each is evaluated with its own modules,
    settings and fixed buffers. Compared are losses, because they are what matters, and outputs, because a loss may be
    the same whatever they are; what is in outputs and is no tensor is left out.

    Args:
        twin: The network.
        network_loss: model_a and its loss.
        state: All entries of model_a, on the device and of the type to compute with.
        batch: The batch; with the entries of model_a, which is the second look, some of its examples.
        normalization: Decides which statistics model_a uses.
        batch_norm: Policy for batch normalisation; under `"recalibrate"` both use the statistics of the batch.
        rounding: Relative rounding error of one operation.

    Returns:
        A sentence on settings in which the two differ, although the batch does not tell them apart, such as a window
        that is longer than its examples; see `hidden_differences`. Empty if there is none.

    Raises:
        ArchitectureMismatchError: Losses or outputs differ, an entry is not one of model_a's, or model_b cannot be
            evaluated; names what differs between the modules.
        UnsupportedModelError: model_b cannot be copied.
    """
    check_module("model_b", twin)
    twin = unwrap(twin)
    moved = movable_entries(twin, batch_norm)
    # Copies: what is evaluated may write into them.
    entries = {name: tensor.detach().clone() for name, tensor in entries_of(twin).items()}
    for name in moved:
        if name not in state or state[name].shape != entries[name].shape:
            raise ArchitectureMismatchError(
                f"model_b has an entry {name!r} of shape {tuple(entries[name].shape)}, which model_a has not."
            )
    entries = {name: tensor.to(state[name]) if name in state else tensor for name, tensor in entries.items()}
    statistics: Statistics = "running" if batch_norm == "interpolate" else "batch"
    own_loss = _own_loss(twin, network_loss, statistics)
    few = _few_examples(network_loss, state, batch, normalization, statistics)
    for owner, source, data in (("its own", entries, batch.data), ("model_a's", state, few)):
        point = copies_of({name: source[name] for name in moved})
        with torch.no_grad(), global_rng_preserved(), normalization.by(statistics):
            expected, output, _ = network_loss.at({**state, **point}, data)
            own, own_output = _evaluate(own_loss, {**entries, **point}, data, network_loss)
        found = ""
        if not _agree(own, expected.item(), output, rounding):
            found = f"its loss on the first batch is {own:.8g}, and model_a's is {expected.item():.8g}"
        elif not _same_outputs(own_output, output, rounding):
            found = f"its outputs on the first batch are others than model_a's, although both losses are {own:.8g}"
        if found:
            raise ArchitectureMismatchError(
                f"model_b computes something else than model_a: with {owner} entries {found}. "
                f"{_causes(network_loss, own_loss)}"
            )
        refuse_changes({name: source[name] for name in moved}, point)
    return _hidden_note(network_loss, own_loss)


def _few_examples(
    network_loss: NetworkLoss, state: State, batch: Batch, normalization: Normalization, statistics: Statistics
) -> Any:
    """Some of the examples; the whole batch where model_a does not take a part of it, such as a graph."""
    try:
        part = batch.rows(range(min(batch.size, max(_LEAST_EXAMPLES, batch.size // 8))))
        with torch.no_grad(), global_rng_preserved(), normalization.by(statistics):
            network_loss.at({name: tensor.clone() for name, tensor in state.items()}, part)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 - not every batch can be cut
        return batch.data
    return part


def _own_loss(twin: nn.Module, network_loss: NetworkLoss, statistics: Statistics) -> NetworkLoss:
    try:
        structure = skeleton_of(twin)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"model_b: {error}") from error
    Normalization(structure, statistics)
    return NetworkLoss(structure, network_loss.loss_fn)


def _evaluate(own_loss: NetworkLoss, entries: State, data: Any, network_loss: NetworkLoss) -> tuple[float, Any]:
    try:
        loss, output, _ = own_loss.at(entries, data)
        return loss.item(), output
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # What the network itself raised, which says more of it than where.
        reason = error.__cause__ or error
        raise ArchitectureMismatchError(
            f"model_b cannot be evaluated on the first batch, although model_a can ({type(reason).__name__}: {reason})"
            f". {_causes(network_loss, own_loss)}"
        ) from error


def _agree(own: float, expected: float, output: Any, rounding: float) -> bool:
    # A cross-entropy near zero rounds as logits do, a square as squares do. Logits may be masked by huge numbers.
    plain = isinstance(output, Tensor) and output.is_floating_point() and output.numel() > 0
    largest = min(float(output.nan_to_num().abs().max()), 30.0) if plain else 0.0
    floor = rounding * min(largest, largest**2)
    return near("two networks", own, expected, rounding=rounding, scale=abs(expected), floor=floor)


def _same_outputs(own: Any, expected: Any, rounding: float, depth: int = 4) -> bool:
    """Whether two outputs of any form agree, as far as both have floating-point tensors in the same places."""
    if isinstance(own, Tensor) and isinstance(expected, Tensor):
        if not own.is_floating_point() or torch.equal(own, expected):
            return True
        scale = _sizes(expected)
        return own.shape == expected.shape and bool(
            near("two networks", own, expected, rounding=rounding, scale=scale).all()
        )
    parts = dict(members(expected)) if depth else {}
    return all(_same_outputs(part, parts.get(place), rounding, depth - 1) for place, part in members(own))


def _sizes(values: Tensor) -> Tensor:
    """The size of each value, and of a typical one: huge numbers, which mask others, are to excuse nothing."""
    sizes = values.abs().where(values.isfinite(), 0)
    return sizes + sizes[sizes > 0].nanmedian().nan_to_num()


def _causes(first: NetworkLoss, second: NetworkLoss) -> str:
    likely = hidden_differences(first.network, second.network, first.loss_fn)
    others = [found for found in setting_differences(first.network, second.network) if found not in likely]
    lines = [str(difference) for difference in (*likely, *others)]
    if not lines:
        return "No setting of their modules differs: look at forward, at hooks, and at what is read from elsewhere."
    shown = "\n".join(f"  {line}" for line in lines[:10])
    more = f"\n  … and {len(lines) - 10} more" if len(lines) > 10 else ""
    return f"The two differ in\n{shown}{more}\nBoth must be built alike, so that their entries can be averaged."


_SHOWN = 3


def _hidden_note(first: NetworkLoss, second: NetworkLoss) -> str:
    lines = [str(difference) for difference in hidden_differences(first.network, second.network, first.loss_fn)]
    more = f", … and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    differ = f"model_b is not built as model_a: {'; '.join(lines[:_SHOWN])}{more}"
    return f"{differ} (no difference shows in the first batch)" if lines else ""
