"""Values that a network computes from its entries and keeps: they must not be used where the entries are others."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from lmc_curvature.agreement import near
from lmc_curvature.errors import LMCCurvatureError, UnsupportedModelError
from lmc_curvature.objective.batches import Batch, tensors_in
from lmc_curvature.objective.losses import NetworkLoss
from lmc_curvature.objective.network import State
from lmc_curvature.objective.normalization import Normalization
from lmc_curvature.objective.randomness import global_rng_preserved

_LEAST_EXAMPLES = 16
# How far from the state, relative to its entries: far enough for a loss to tell, and no variance becomes negative.
_SHIFT = 2.0**-4


def check_kept_values(
    pristine: nn.Module,
    network_loss: NetworkLoss,
    state: State,
    batch: Batch,
    movable: Collection[str],
    normalization: Normalization,
) -> None:
    """Refuse a network that uses, at another state, what it has computed at the first and kept.

    The network, which has been evaluated before, and a copy that has not are evaluated at a state nearby, on a few
    examples. The copy goes through training mode and back there, because some networks compute what they keep then.

    Args:
        pristine: The copy of the network's structure; it is called here.
        network_loss: The network and its loss.
        state: All entries of the network.
        batch: The batch that a few examples are taken from.
        movable: Names of the entries that move.
        normalization: Decides which statistics the network uses.

    Raises:
        UnsupportedModelError: The two have different losses; names what the network keeps, if it is a tensor.
    """
    statistics = normalization.statistics
    Normalization(pristine, statistics)
    renewed = NetworkLoss(pristine, network_loss.loss_fn)
    renewed.register_forward_pre_hook(_renew)
    few = batch.rows(range(min(batch.size, max(_LEAST_EXAMPLES, batch.size // 8))))
    with torch.no_grad(), global_rng_preserved(), normalization.by(statistics):
        try:
            losses = _losses_nearby((network_loss, renewed), state, few, movable)
        except LMCCurvatureError:
            # Not every batch can be cut.
            losses = _losses_nearby((network_loss, renewed), state, batch.data, movable)
    (kept, output), (new, _) = losses
    if not near("kept values", kept, new, rounding=torch.finfo(kept.dtype).eps, scale=new.abs(), floor=_floor(output)):
        names = _kept_tensors(network_loss.network, pristine)
        what = f"its tensor {' and '.join(map(repr, names))}" if names else "something"
        raise UnsupportedModelError(
            f"The network keeps {what} from one evaluation to the next, or from model.eval(), and uses it where the "
            f"entries are others: at a state nearby its loss is {kept.item():.6g}, and that of a copy that was not "
            f"called before {new.item():.6g}. Compute it in forward at every call."
        )


def _renew(network_loss: NetworkLoss, _args: Any) -> None:
    network_loss.network.train()
    network_loss.network.eval()


def _losses_nearby(
    networks: Collection[NetworkLoss], state: State, data: Any, movable: Collection[str]
) -> list[tuple[Tensor, Any]]:
    """Loss and output of each at the same state; each has tensors of its own, because it may write into them."""
    found = []
    for network_loss in networks:
        generator = torch.Generator().manual_seed(0)
        point = {name: tensor.clone() for name, tensor in state.items()}
        point |= {name: _shifted(state[name], generator) for name in movable}
        found.append(network_loss.at(point, data)[:2])
    return found


def _shifted(tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
    return tensor + _SHIFT * torch.where(tensor == 0, 0.1 * noise.abs(), tensor * noise)


def _floor(output: Any) -> float:
    # A cross-entropy near zero rounds as logits do, a square as squares do. Logits may be masked by huge numbers.
    if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
        return 0.0
    largest = min(float(output.nan_to_num().abs().max()), 30.0)
    return torch.finfo(output.dtype).eps * min(largest, largest**2)


def _kept_tensors(network: nn.Module, other: nn.Module) -> list[str]:
    """Names of attributes that hold tensors with other values than in another network, besides entries."""
    names = []
    for (prefix, module), beside in zip(network.named_modules(), other.modules(), strict=True):
        for name in vars(module).keys() - {"_parameters", "_buffers", "_modules"}:
            pairs = zip(tensors_in(vars(module)[name]), tensors_in(vars(beside).get(name)), strict=False)
            if any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs):
                names.append(f"{prefix}.{name}" if prefix else name)
    return sorted(names)
