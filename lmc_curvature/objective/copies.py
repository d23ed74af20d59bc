"""Whether a copy of a network and of its loss, which an objective computes with, is the function that was given."""

import contextlib
import copy
import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lmc_curvature.agreement import near
from lmc_curvature.errors import LMCCurvatureError, UnsupportedModelError
from lmc_curvature.objective.batches import Batch, tensors_in
from lmc_curvature.objective.caches import LEAST_EXAMPLES, rounding_floor, shifted_state
from lmc_curvature.objective.dependence import Dependence, refuse_changes
from lmc_curvature.objective.losses import LossFunction, NetworkLoss
from lmc_curvature.objective.network import State, copies_of, skeleton_of
from lmc_curvature.objective.normalization import Normalization
from lmc_curvature.objective.randomness import global_rng_preserved
from lmc_curvature.objective.wrappers import unwrap

# Entries are replaced in the network that was given, which threads may share.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True, eq=False)
class Given:
    """A network and a loss as they were given, as long as that network lives.

    Attributes:
        network: A reference to the network.
        loss_fn: The loss.
    """

    network: "weakref.ref[nn.Module]"
    loss_fn: LossFunction


def check_copies(
    given: Given,
    network_loss: NetworkLoss,
    state: State,
    batch: Batch,
    movable: Collection[str],
    others: Sequence[tuple[str, Tensor]],
    normalization: Normalization,
) -> None:
    """Refuse a network or a loss that is another function once it is copied.

    A closure, a hook or a weak reference that names the network names it in the copy, too; and what a loss reads from
    a network or a hook is not what the copy writes. The copy and what was given are evaluated at a state nearby, on a
    few examples. Before that, what was given is evaluated at the first state on others, which it must not remember.

    Args:
        given: The network and the loss as they were given.
        network_loss: The copies.
        state: All entries of the network.
        batch: The batch that a few examples are taken from.
        movable: Names of the entries that move.
        others: Tensors that the loss must not depend on, being no part of the state, with what they are.
        normalization: Decides which statistics the copy uses; here the running ones, as a network does by itself.

    Raises:
        UnsupportedModelError: The two have different losses, or the loss that was given uses one of the `others`.
    """
    network = given.network()
    if network is None:
        return
    # Another state and other rows than those of other checks: a network may still hold what copies have left in it.
    nearby, number = shifted_state(state, movable, seed=1), min(batch.size, max(LEAST_EXAMPLES, batch.size // 8))
    mixed = torch.randperm(batch.size, generator=torch.Generator().manual_seed(1)).tolist()
    parts = batch.rows(range(number)), batch.rows(mixed[:number])
    with torch.no_grad(), _ONE_AT_A_TIME, normalization.by("running"):
        original = NetworkLoss(unwrap(network), given.loss_fn)
        with _as_before(original):
            # Not every batch can be cut.
            for before, data in (parts, (batch.data, batch.data)):
                _evaluate(original, state, before)
                fault = _difference(network_loss, original, nearby, data, others)
                if fault is None:
                    continue
                if fault:
                    # The network may have been changed since it was copied; what is reached past a copy stays wrong.
                    _evaluate(original, nearby, before)
                    anew = NetworkLoss(skeleton_of(original.network), network_loss.loss_fn)
                    halfway = {name: state[name].lerp(nearby[name], 0.5) for name in movable}
                    fault = _difference(anew, original, {**state, **halfway}, data)
                if fault:
                    raise UnsupportedModelError(fault)
                return


def _difference(
    copies: NetworkLoss, original: NetworkLoss, state: State, data: Any, others: Sequence[tuple[str, Tensor]] = ()
) -> str | None:
    """What is wrong with copies of a network and its loss; empty if nothing is, None if nothing can be compared."""
    found, output, said = None, None, ""
    point = copies_of(state)
    try:
        with global_rng_preserved():
            found, output, _ = copies.at(point, data)
    except LMCCurvatureError as error:
        said = f"none by copies of them ({error})"
    refuse_changes(state, point)
    expected = _evaluate(original, state, data, others)
    if expected is None:
        return None
    if found is not None:
        rounding, scale = torch.finfo(found.dtype).eps, expected.abs().to(found)
        if near("copies", found, expected.to(found), rounding=rounding, scale=scale, floor=rounding_floor(output)):
            return ""
        said = f"{found.item():.6g} by copies of them"
    return (
        "The network or loss_fn reaches past copies of them, which the library computes with: at a state nearby, the "
        f"loss is {expected.item():.6g} by what was given, and {said}. A closure, a hook or a reference names the "
        "network itself, or loss_fn reads what the network or a hook has kept. Let a hook be a method of a module of "
        "the network, reach modules as self.layer in forward, and what forward keeps as model.kept in "
        "loss_fn=BatchLoss(fn) with fn(model, batch)."
    )


def _evaluate(
    original: NetworkLoss, state: State, data: Any, others: Sequence[tuple[str, Tensor]] = ()
) -> Tensor | None:
    """The loss of the network that was given at a state; None if it cannot be computed there."""
    own = {id(tensor) for tensor in original.network.parameters()} | {id(b) for b in original.network.buffers()}
    tensors = (*original.named_parameters(), *original.named_buffers())
    like = next((tensor for tensor in state.values() if tensor.is_floating_point()), torch.zeros(()))
    # A loss that holds tensors of its own has them where, and of the type that, the network is computed in.
    of_loss = {
        name: tensor.detach().to(like if tensor.is_floating_point() else like.device).clone()
        for name, tensor in tensors
        if id(tensor) not in own
    }
    in_training = [module for module in original.modules() if module.training]
    # Where a module is held twice, as by a loss that holds the network, functional_call leaves other tensors in it.
    slots: list[dict[str, Any]] = [each for m in original.modules() for each in (m._parameters, m._buffers)]
    kept = [dict(each) for each in slots]
    try:
        for module in in_training:
            # Without train(), which some networks override.
            module.training = False
        point = {f"network.{name}": tensor for name, tensor in copies_of(state).items()} | of_loss
        with global_rng_preserved(), Dependence(others, given=tensors_in(data)) as dependence:
            loss = functional_call(original, point, (data,))[0]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 - what was given need not bear the device or the type that is computed with
        return None
    finally:
        for module in in_training:
            module.training = True
        for each, before in zip(slots, kept, strict=True):
            each.update(before)
    dependence.refuse(loss)
    return loss


@contextlib.contextmanager
def _as_before(root: nn.Module) -> Iterator[None]:
    """When the block ends, modules hold what they held, and so do lists and dictionaries among it."""
    ours = {"_parameters", "_buffers", "_modules"}
    held = [(module, {n: v for n, v in vars(module).items() if n not in ours}) for module in root.modules()]
    values = [value for _, attributes in held for value in attributes.values() if type(value) in (list, dict, set)]
    contents = [(value, copy.copy(value)) for value in values]
    try:
        yield
    finally:
        for module, attributes in held:
            for name in vars(module).keys() - attributes.keys() - ours:
                del vars(module)[name]
            vars(module).update(attributes)
        for value, before in contents:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)
