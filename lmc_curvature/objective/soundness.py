"""Refusals of networks whose loss is not a function of the state, found on one batch."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmc_curvature.agreement import near
from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.objective.losses import NetworkLoss
from lmc_curvature.objective.network import State, as_leaves, check_finite, graph_nodes
from lmc_curvature.objective.randomness import drawing_module


def check_soundness(
    network_loss: NetworkLoss,
    state: State,
    data: Any,
    *,
    movable: Collection[str],
    parameters: Iterable[tuple[str, Tensor]],
) -> None:
    """Refuse a network whose loss is not a function of its state; it is evaluated twice.

    Args:
        network_loss: The network and its loss.
        state: All entries of the network.
        data: Data of the batch.
        movable: Names of the entries that move.
        parameters: Parameters that the loss must not depend on, being no part of the state, with their names.

    Raises:
        UnsupportedModelError: A module draws random numbers, an entry is changed in place, the loss reaches past the
            state for one of the `parameters`, or two evaluations differ.
        NonFiniteError: An entry of the state is not finite.
        LossError: The loss is not a real scalar.
    """
    # Copies: what is looked for may write into them.
    constants = {name: tensor.detach().clone() for name, tensor in state.items()}
    leaves = as_leaves({name: constants[name].clone() for name in movable})
    check_finite(constants, "the network")
    versions = {name: tensor._version for name, tensor in constants.items()}
    losses: list[Any] = []
    with torch.no_grad():
        drawing = drawing_module(network_loss, lambda: losses.append(network_loss.at(constants, data)[0]))
    if drawing is not None:
        _refuse_drawing(network_loss, drawing)
    for name, tensor in constants.items():
        if tensor._version != versions[name]:
            raise UnsupportedModelError(
                f"The network changes {name!r} in place while it is evaluated, so its loss depends on what was "
                "evaluated before. Switch that off (max_norm of an embedding, running averages in evaluation mode)."
            )
    with torch.enable_grad():
        again = network_loss.at({**constants, **leaves}, data)[0]
    _refuse_dependence(again, parameters)
    _refuse_difference(losses[0].item(), again.item(), torch.finfo(again.dtype).eps)


def _refuse_drawing(network_loss: nn.Module, name: str) -> None:
    kind = type(network_loss.get_submodule(name)).__name__
    culprit = f"Module {name.removeprefix('network.')!r} ({kind})" if "." in name else f"The {name or 'loss'}"
    raise UnsupportedModelError(
        f"{culprit} draws random numbers in evaluation mode, so its loss is not a function of the parameters. "
        "Switch the randomness off (dropout-like functions take training=self.training)."
    )


def _refuse_dependence(loss: Float[Tensor, ""], parameters: Iterable[tuple[str, Tensor]]) -> None:
    names = {id(parameter): name for name, parameter in parameters}
    for node in graph_nodes([loss]):
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            raise UnsupportedModelError(
                f"The loss uses parameter {name!r} of the network itself instead of the state at hand: a closure, "
                "a list of parameters outside nn.ParameterList, or loss_fn refers to it. Reach it through its "
                "module (self.layer.weight), or pass loss_fn=BatchLoss(fn) with fn(model, batch)."
            )


def _refuse_difference(first: float, second: float, rounding: float) -> None:
    # Beyond what reordered sums on a GPU explain.
    if not near("two evaluations", first, second, rounding=rounding, scale=abs(second), floor=1e-6):
        raise UnsupportedModelError(
            f"The network has losses {first:.6g} and {second:.6g} for one state and batch: a module draws from a "
            "generator of its own, or keeps something from call to call. Switch that off."
        )
