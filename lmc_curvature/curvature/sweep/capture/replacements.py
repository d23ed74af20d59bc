"""Functions of torch that look at numbers on their way, written out so that shapes alone decide what is computed."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


class Replacements(TorchFunctionMode):
    """Takes classes as vectors without a look at their range, and packed sequences apart into steps.

    The lengths of packed sequences are read, so they have to be plain numbers.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(getattr(func, "__name__", ""))
        result = NotImplemented if replacement is None else replacement(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


def _one_hot(tensor: Any = None, num_classes: int = -1, *, input: Any = None) -> Any:
    classes = tensor if input is None else input
    if num_classes < 0:
        return NotImplemented
    # Classes out of range are an error here, too.
    return classes.new_zeros((*classes.shape, num_classes)).scatter(-1, classes.unsqueeze(-1), 1)


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


def _recurrent(operation: Any) -> Callable[..., Any]:
    """A recurrent layer of packed sequences, whose arguments are the packed data and the numbers of examples."""

    def layer(*args: Any) -> Any:
        # The other form, of tensors with all examples in every step, has its weights third.
        if len(args) < 4 or not isinstance(args[3], list):
            return NotImplemented
        # Imported here, because it takes as long as the rest of this package.
        from torch._decomp import decomposition_table

        data, sizes, *others = args
        return decomposition_table[operation](data, [int(size) for size in sizes], *others)

    return layer


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "one_hot": _one_hot,
    "_pack_padded_sequence": _packed,
    "_pad_packed_sequence": _padded,
    "lstm": _recurrent(aten.lstm.data),
    "gru": _recurrent(aten.gru.data),
    "rnn_tanh": _recurrent(aten.rnn_tanh.data),
    "rnn_relu": _recurrent(aten.rnn_relu.data),
}
