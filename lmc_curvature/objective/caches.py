"""Values that a network computes from its entries and keeps: they must not be used where the entries are others."""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmc_curvature.agreement import near
from lmc_curvature.errors import LMCCurvatureError, UnsupportedModelError
from lmc_curvature.objective.batches import Batch, tensors_in
from lmc_curvature.objective.losses import NetworkLoss
from lmc_curvature.objective.network import State, acts_on_modes
from lmc_curvature.objective.normalization import Normalization
from lmc_curvature.objective.randomness import global_rng_preserved

LEAST_EXAMPLES = 16
# How far from the state, relative to its entries.
_SHIFT = 2.0**-4


def check_caches(
    pristine: nn.Module,
    network_loss: NetworkLoss,
    state: State,
    batch: Batch,
    movable: Collection[str],
    normalization: Normalization,
) -> None:
    """Refuse a network that uses, at another state, what it has computed at the first and kept.

    The network, which is evaluated at its state first, and a copy that is not are evaluated at a state nearby, on a few
    examples (and on all, where there are tensors besides the entries); then the network again at its own state, where
    it must have the loss that it had. Some networks compute what they keep when they leave training mode, or at every
    call in that mode: where modules act on modes the copy then leaves it, and where there are tensors besides the
    entries it is called in it.

    Args:
        pristine: The copy of the network's structure; it is called here.
        network_loss: The network and its loss.
        state: All entries of the network.
        batch: The batch that a few examples are taken from.
        movable: Names of the entries that move.
        normalization: Decides which statistics the network uses.

    Raises:
        UnsupportedModelError: The two have different losses, or the network uses a tensor that was computed from
            entries before it was given; names what it keeps, if that is a tensor.
    """
    statistics = normalization.statistics
    Normalization(pristine, statistics)
    copied = NetworkLoss(pristine, network_loss.loss_fn)
    few = batch.rows(range(min(batch.size, max(LEAST_EXAMPLES, batch.size // 8))))
    with torch.no_grad(), global_rng_preserved(), normalization.by(statistics):
        try:
            names = _kept(network_loss, copied, state, few, batch.data, movable)
        except LMCCurvatureError:
            # Not every batch can be cut.
            names = _kept(network_loss, copied, state, batch.data, batch.data, movable)
    if names is not None:
        what = f"its tensor {' and '.join(map(repr, names))}" if names else "something"
        raise UnsupportedModelError(
            f"The network keeps {what}, which it has computed from its entries, and uses it where they are others: its "
            "loss is not a function of the state. Compute it in forward at every call."
        )


def _kept(
    network_loss: NetworkLoss, copied: NetworkLoss, state: State, data: Any, whole: Any, movable: Collection[str]
) -> list[str] | None:
    """Names of the tensors that a network keeps and uses; None if it seems to keep nothing that changes its loss."""
    before = [tensor for _, tensor in _tensors_beside(copied.network) if tensor.is_floating_point()]
    at_state, nearby = _Place(state, data), _Place(shifted_state(state, movable), data)
    # What is kept for evaluations without gradients alone must be that of the first state.
    first, kept, new = at_state.loss(network_loss), nearby.loss(network_loss), nearby.loss(copied)
    again = at_state.loss(network_loss)
    if kept[0].isnan() and new[0].isnan():
        # What was computed from entries before the copy was made is not a number in it, until it is computed again.
        still = {id(tensor) for tensor in before if tensor.numel() and tensor.isnan().all()}
        return sorted({name for name, tensor in _tensors_beside(copied.network) if id(tensor) in still}) or None
    found = _differ(kept, new) or _differ(again, first)
    holds = any(tensor.is_floating_point() for _, tensor in _tensors_beside(network_loss.network))
    if holds and not found and data is not whole:
        # What is kept may be used for many examples alone. Outputs may be large.
        of_all = _Place(nearby.state, whole)
        expected = of_all.loss(copied)[0]
        found = _differ(of_all.loss(network_loss), (expected, None))
    for renew, applies in ((_leave_training, acts_on_modes(copied.network)), (_train, bool(before))):
        # Some modules do not bear to change their mode while their entries are replaced.
        with contextlib.suppress(Exception), copied.register_forward_pre_hook(renew):
            if applies and not found:
                # Training may change other things that matter to the loss, such as a schedule: that says nothing.
                same = not _differ(at_state.loss(network_loss), at_state.loss(copied))
                found = same and _differ(kept, nearby.loss(copied))
    if not found:
        return None
    # Called at one state, the two hold the same besides what is kept.
    nearby.loss(network_loss)
    return _differing_tensors(network_loss.network, copied.network)


@dataclass(frozen=True)
class _Place:
    """A state and a few examples."""

    state: State
    data: Any

    def loss(self, network_loss: NetworkLoss) -> tuple[Tensor, Any]:
        """Loss and output there, computed with copies of the entries: the network may write into them."""
        return network_loss.at({name: tensor.clone() for name, tensor in self.state.items()}, self.data)[:2]


def _leave_training(network_loss: NetworkLoss, _args: Any) -> None:
    network_loss.network.train()
    network_loss.network.eval()


def _train(network_loss: NetworkLoss, args: Any) -> None:
    network_loss.network.train()
    with contextlib.suppress(LMCCurvatureError):
        network_loss.forward(*args)
    network_loss.network.eval()


def shifted_state(state: State, movable: Collection[str], seed: int = 0) -> dict[str, Tensor]:
    """A state nearby: relative to its entries far enough for a loss to tell, and no variance becomes negative."""
    generator = torch.Generator().manual_seed(seed)
    return {**state, **{name: _shifted(state[name], generator) for name in movable}}


def _shifted(tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
    return tensor + _SHIFT * torch.where(tensor == 0, 0.1 * noise.abs(), tensor * noise)


def _differ(kept: tuple[Tensor, Any], new: tuple[Tensor, Any]) -> bool:
    (found, output), (expected, _) = kept, new
    rounding, floor = torch.finfo(expected.dtype).eps, rounding_floor(output)
    return not near("caches", found, expected, rounding=rounding, scale=expected.abs(), floor=floor)


def rounding_floor(output: Any) -> float:
    """What a loss may be off by the rounding of the output that it is computed from."""
    # A cross-entropy near zero rounds as logits do, a square as squares do. Logits may be masked by huge numbers.
    if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
        return 0.0
    largest = min(float(output.nan_to_num().abs().max()), 30.0)
    return torch.finfo(output.dtype).eps * min(largest, largest**2)


def _tensors_beside(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that modules hold besides their entries, with the names of the attributes."""
    for prefix, module in network.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from ((f"{prefix}.{name}".lstrip("."), tensor) for tensor in tensors_in(value))


def _differing_tensors(network: nn.Module, other: nn.Module) -> list[str]:
    """Names of attributes that hold tensors with other values than in another network."""
    theirs: dict[str, list[Tensor]] = {}
    for name, tensor in _tensors_beside(other):
        theirs.setdefault(name, []).append(tensor)
    ours = ((name, tensor) for name, tensor in _tensors_beside(network) if theirs.get(name))
    return sorted({name for name, tensor in ours if not torch.equal(tensor, theirs[name].pop(0))})
