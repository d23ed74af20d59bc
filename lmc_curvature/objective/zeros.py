"""Whether a loss takes a length of nothing: a norm, an absolute value or a root that is exactly zero."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmc_curvature.errors import LMCCurvatureError
from lmc_curvature.objective.losses import NetworkLoss
from lmc_curvature.objective.network import State

_LENGTHS = {
    *("abs", "dist", "hypot", "linalg_vector_norm", "norm", "pow", "sgn", "sign", "sqrt", "std", "std_mean"),
    *("_cdist_forward", "_pdist_forward"),
}


def meets_zeros(network_loss: NetworkLoss, state: State, data: Any) -> bool:
    """Whether operations that have a kink or a pole at zero are exactly there; False if the data are not understood."""
    point = {name: tensor.detach().clone() for name, tensor in state.items()}
    with torch.no_grad(), _Zeros() as zeros:
        try:
            network_loss.at(point, data)
        except torch.OutOfMemoryError:
            raise
        except LMCCurvatureError:
            # A few examples alone may be no batch.
            return False
    return zeros.met


class _Zeros(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not self.met and func._schema.name.partition("::")[2] in _LENGTHS and not _is_whole_power(func, args):
            lengths = (each for each in tree_leaves(found) if isinstance(each, Tensor) and each.is_floating_point())
            self.met = any(bool((length == 0).any()) for length in lengths)
        return found


def _is_whole_power(func: Any, args: Any) -> bool:
    """Whether an operation is a power with a whole number for an exponent, which is smooth at zero."""
    return "pow" in func._schema.name and isinstance(args[1], (int, float)) and args[1] == int(args[1])
