"""The diagonal of the Hessian by BackPACK, which propagates second derivatives through a network's modules."""

import copy
import importlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_curvature.curvature.backends.peers import load_peer, tolerance_of
from lmc_curvature.curvature.products.gradient import BatchGradient
from lmc_curvature.errors import BackendError
from lmc_curvature.objective.losses import finite_loss
from lmc_curvature.objective.network import State, tied_names
from lmc_curvature.objective.risk import Objective


def backpack_diagonal(objective: Objective, point: State, entries: Sequence[str]) -> dict[str, Tensor]:
    """The diagonal by BackPACK's `DiagHessian` (Dangel, Kunstner and Hennig 2020), in one pass over the loader.

    Args:
        objective: The loss: cross-entropy or the squared error, of a network made of `nn.Sequential` and modules that
            BackPACK knows.
        point: The complete state.
        entries: The entries whose diagonal is wanted.

    Returns:
        Entry name to the diagonal in the entry's shape, float64.

    Raises:
        BackendError: BackPACK is not installed, or cannot do the network or the loss; names the module.
    """
    backpack = load_peer("backpack")
    extension = importlib.import_module("backpack.extensions").DiagHessian
    loss_fn = backpack.extend(_loss_module(objective))
    network = backpack.extend(_network(objective, point, entries))
    parameters = {name: parameter for name, parameter in network.named_parameters() if name in entries}
    total = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
    examples = 0
    with objective.one_pass() as batches, objective.differentiating():
        for batch in batches:
            inputs, target = batch.data
            with warnings.catch_warnings(), backpack.backpack(extension()):
                # Of hooks on modules whose inputs need no gradient.
                warnings.simplefilter("ignore")
                loss = loss_fn(network(inputs), target)
                finite_loss(loss.detach(), batch)
                _backward(loss)
            found = {name: parameter.diag_h for name, parameter in parameters.items()}
            if batch.index == 0:
                _compare(found, BatchGradient(objective, point, batch, entries))
            for name, diagonal in found.items():
                total[name].add_(diagonal, alpha=batch.size)
                parameters[name].grad = None
            examples += batch.size
    return {name: total[name] / examples for name in entries}


def _backward(loss: Tensor) -> None:
    try:
        loss.backward()
    except NotImplementedError as error:
        raise BackendError(f"backend='backpack' cannot compute this diagonal: {error}") from error


def _compare(found: State, gradient: BatchGradient) -> None:
    """Compare the largest element of each entry's diagonal with an exact product.

    Raises:
        BackendError: They differ by more than rounding.
    """
    for name, diagonal in found.items():
        largest = int(diagonal.abs().argmax())
        unit = torch.zeros_like(diagonal, memory_format=torch.contiguous_format)
        unit.view(-1)[largest] = 1.0
        expected = gradient.product({name: unit}, [name])[name].flatten()[largest]
        if not torch.isclose(diagonal.flatten()[largest], expected, rtol=tolerance_of(diagonal.dtype), atol=1e-6):
            raise BackendError(
                f"backend='backpack' computes {float(diagonal.flatten()[largest]):.6g} where the diagonal of {name!r} "
                f"is {float(expected):.6g}, so it sees another function than the loss. Use backend='native'."
            )


def _loss_module(objective: Objective) -> nn.Module:
    """The loss as a module that BackPACK knows."""
    given: Any = objective.loss_fn
    if given is None or given is F.cross_entropy:
        return nn.CrossEntropyLoss()
    if given is F.mse_loss or type(given) is nn.MSELoss:
        return nn.MSELoss()
    if type(given) is nn.CrossEntropyLoss and given.weight is None and given.label_smoothing == 0:
        return nn.CrossEntropyLoss()
    name = getattr(given, "__name__", type(given).__name__)
    raise BackendError(
        f"backend='backpack' computes diagonals for torch's cross-entropy (without options) and squared error, not for "
        f"loss_fn={name}; use backend='native'."
    )


def _network(objective: Objective, point: State, entries: Sequence[str]) -> nn.Module:
    """A copy of the network at a state, in which only the entries that are wanted require gradients."""
    _check_modules(objective.network)
    network = copy.deepcopy(objective.network)
    for name, parameter in network.named_parameters():
        parameter.data = point[name].detach().clone()
        parameter.requires_grad_(name in entries)
    return network


def _check_modules(network: nn.Module) -> None:
    """Refuse a network in which operations lie between modules, where BackPACK would not see them.

    Raises:
        BackendError: Names the module.
    """
    if tied_names(network):
        raise BackendError("backend='backpack' cannot compute the diagonal of tied parameters; use backend='native'.")
    seen: set[int] = set()
    for name, module in _called_modules(network, ""):
        label = f"module {name!r} ({type(module).__name__})" if name else f"the network ({type(module).__name__})"
        if type(module).__module__.partition(".")[0] != "torch" or any(True for _ in module.children()):
            raise BackendError(
                f"backend='backpack' computes diagonals of networks made of nn.Sequential and torch's own modules; "
                f"{label} computes something that it cannot see. Use backend='native'."
            )
        if any(True for _ in module.buffers()):
            raise BackendError(
                f"backend='backpack' cannot compute this diagonal: {label} has statistics that are part of the state. "
                "Use backend='native'."
            )
        if id(module) in seen:
            raise BackendError(f"backend='backpack': {label} is called more than once. Use backend='native'.")
        seen.add(id(module))


def _called_modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a nest of `nn.Sequential` calls, each as often as it is called."""
    if type(module) is not nn.Sequential:
        yield name, module
        return
    for key, child in module._modules.items():
        if child is not None:
            yield from _called_modules(child, f"{name}.{key}".removeprefix("."))
