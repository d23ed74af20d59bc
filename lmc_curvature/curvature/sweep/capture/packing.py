"""Packed sequences, written as steps: which examples take part in a step is then a matter of shapes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

_LAYERS = {"lstm": aten.lstm.data, "gru": aten.gru.data, "rnn_tanh": aten.rnn_tanh.data, "rnn_relu": aten.rnn_relu.data}


class StepByStep(TorchFunctionMode):
    """Takes packed sequences and recurrent layers of them apart into steps.

    The lengths are read for it, so they have to be plain numbers.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "_pack_padded_sequence":
            return _packed(*args, **(kwargs or {}))
        if name == "_pad_packed_sequence":
            return _padded(*args, **(kwargs or {}))
        # The layers' other form has its weights third.
        if name in _LAYERS and len(args) > 3 and isinstance(args[3], list):
            # Imported here, because it takes as long as the rest of this package.
            from torch._decomp import decomposition_table

            data, sizes, *others = args
            return decomposition_table[_LAYERS[name]](data, [int(size) for size in sizes], *others)
        return func(*args, **(kwargs or {}))


def _packed(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """The examples of every step that has any, one step after the other; and how many there are in each."""
    steps = input.transpose(0, 1) if batch_first else input
    ends = [int(length) for length in lengths]
    if len(ends) != steps.shape[1]:
        raise ValueError(f"{len(ends)} lengths were given for {steps.shape[1]} sequences")
    sizes = [sum(end > step for end in ends) for step in range(max(ends))]
    return torch.cat([steps[step, :size] for step, size in enumerate(sizes)]), torch.tensor(sizes)


def _padded(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    """The steps as a tensor with all examples in each, and the length of every example."""
    sizes = [int(size) for size in batch_sizes]
    missing = [0] * max(0, total_length - len(sizes))
    steps = [
        F.pad(part, [*[0, 0] * (part.ndim - 1), 0, sizes[0] - len(part)], value=padding_value)
        for part in data.split(sizes + missing)
    ]
    padded = torch.stack(steps, 1 if batch_first else 0)
    return padded, torch.tensor([sum(size > example for size in sizes) for example in range(sizes[0])])
