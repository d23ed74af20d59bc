"""Comparison of two networks that are given as one architecture: equal entries must give them equal losses."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lmc_curvature.agreement import near
from lmc_curvature.errors import ArchitectureMismatchError, UnsupportedModelError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.losses import NetworkLoss
from lmc_curvature.objective.network import State, check_module, entries_of, movable_entries, skeleton_of, unwrap
from lmc_curvature.objective.normalization import BatchNormPolicy, Normalization, Statistics
from lmc_curvature.objective.randomness import global_rng_preserved

_LEAST_EXAMPLES = 16


def check_twin(
    twin: nn.Module,
    network_loss: NetworkLoss,
    state: State,
    batch: Batch,
    normalization: Normalization,
    batch_norm: BatchNormPolicy,
    rounding: float,
) -> None:
    """Refuse a network, called model_b, that has another loss on a batch than model_a has with the same entries.

    They are compared with the entries of model_b and with those of model_a: with some entries, such as a last layer of
    zeros, the loss does not depend on a setting that matters with others. Each is evaluated with its own modules,
    settings and fixed buffers.

    Args:
        twin: The network.
        network_loss: model_a and its loss.
        state: All entries of model_a, on the device and of the type to compute with.
        batch: The batch; with the entries of model_a, which is the second look, some of its examples.
        normalization: Decides which statistics model_a uses.
        batch_norm: Policy for batch normalisation; under `"recalibrate"` both use the statistics of the batch.
        rounding: Relative rounding error of one operation.

    Raises:
        ArchitectureMismatchError: The losses differ, an entry is not one of model_a's, or model_b cannot be evaluated;
            names what differs between the modules.
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
    few = batch.rows(range(min(batch.size, max(_LEAST_EXAMPLES, batch.size // 8))))
    for owner, source, data in (("its own", entries, batch.data), ("model_a's", state, few)):
        point = {name: source[name].clone() for name in moved}
        with torch.no_grad(), global_rng_preserved(), normalization.by(statistics):
            expected, output, _ = network_loss.at({**state, **point}, data)
            own = _evaluate(own_loss, {**entries, **point}, data, network_loss)
        if not _agree(own, expected.item(), output, rounding):
            raise ArchitectureMismatchError(
                f"model_b computes something else than model_a: with {owner} entries its loss on the first batch is "
                f"{own:.8g}, and model_a's is {expected.item():.8g}. {_causes(network_loss, own_loss)}"
            )


def _own_loss(twin: nn.Module, network_loss: NetworkLoss, statistics: Statistics) -> NetworkLoss:
    try:
        structure = skeleton_of(twin)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"model_b: {error}") from error
    Normalization(structure, statistics)
    return NetworkLoss(structure, network_loss.loss_fn)


def _evaluate(own_loss: NetworkLoss, entries: State, data: Any, network_loss: NetworkLoss) -> float:
    try:
        return own_loss.at(entries, data)[0].item()
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


def _causes(first: NetworkLoss, second: NetworkLoss) -> str:
    lines = module_differences(first.network, second.network)
    if not lines:
        return "No setting of their modules differs: look at forward, at hooks, and at what is read from elsewhere."
    shown = "\n".join(f"  {line}" for line in lines[:10])
    more = f"\n  … and {len(lines) - 10} more" if len(lines) > 10 else ""
    return f"The two differ in\n{shown}{more}\nBoth must be built alike, so that their entries can be averaged."


_HARMLESS = {"training", "inplace", "momentum", "dropout", "drop_prob"}
_VALUES = (bool, int, float, complex, str, type(None), torch.dtype, Tensor)


def module_differences(first: nn.Module, second: nn.Module) -> list[str]:
    """Lines that say in which settings the modules of two networks differ, besides their entries.

    Compared are classes, public attributes that are plain values, functions or tensors, and what modules keep in a
    state dict besides tensors, such as the weights of quantised layers. Left out is what evaluation does not use.
    """
    modules_a, modules_b = dict(first.named_modules()), dict(second.named_modules())
    lines: list[str] = []
    for name in {**modules_a, **modules_b}:
        a, b = modules_a.get(name), modules_b.get(name)
        # By name: a notebook that runs a cell again has two classes of one name.
        if a is not None and b is not None and type(a).__qualname__ == type(b).__qualname__:
            lines += _attribute_differences(f"{name}." if name else "", a, b)
        elif not all(isinstance(module, (_DropoutNd, nn.Identity, type(None))) for module in (a, b)):
            kinds = ["nothing" if module is None else type(module).__qualname__ for module in (a, b)]
            lines.append(f"module {name or '(the network itself)'}: {kinds[0]} in model_a, {kinds[1]} in model_b")
    return lines


def _attribute_differences(prefix: str, a: nn.Module, b: nn.Module) -> Iterator[str]:
    settings_a, settings_b = _settings(a), _settings(b)
    for name in {**settings_a, **settings_b}:
        values = settings_a.get(name), settings_b.get(name)
        if not _equal(*values):
            shown = [_shorten(value) for value in values]
            difference = (
                f"{shown[0]} in model_a, {shown[1]} in model_b" if shown[0] != shown[1] else "its values differ"
            )
            yield f"{prefix}{name}: {difference}"


def _settings(module: nn.Module) -> dict[str, Any]:
    """Name to value of what a module itself holds besides its entries and its children."""
    harmless = _HARMLESS | {"p"} if isinstance(module, _DropoutNd) else _HARMLESS
    found = {name: _plain(value) for name, value in vars(module).items() if name[0] != "_" and name not in harmless}
    kept: dict[str, Any] = {}
    module._save_to_state_dict(kept, "", True)
    entries = {*module._parameters, *module._buffers}
    found |= {name: _plain(value) for name, value in kept.items() if name not in entries}
    return {name: value for name, value in found.items() if value is not _OTHER}


_OTHER = object()


def _plain(value: Any) -> Any:
    """A value that can be compared: functions by their name, lists as tuples; `_OTHER` for what is not understood."""
    if isinstance(value, _VALUES):
        return value
    if isinstance(value, (list, tuple)):
        members = tuple(map(_plain, value))
        return _OTHER if any(member is _OTHER for member in members) else members
    return getattr(value, "__qualname__", _OTHER)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and a == b


def _shorten(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    shown = f"({', '.join(map(_shorten, value))})" if isinstance(value, tuple) else str(value)
    return f"{shown[:57]}…" if len(shown) > 58 else shown
