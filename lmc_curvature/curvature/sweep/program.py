"""A function of a state and data, captured as a graph and planned for the sweep, and the data that it is given."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from lmc_curvature.curvature.sweep.capture.graph import capture, dependents
from lmc_curvature.curvature.sweep.plan import Plan
from lmc_curvature.errors import CaptureError
from lmc_curvature.objective.batches import map_tensors
from lmc_curvature.objective.network import State


@dataclass(frozen=True)
class Data:
    """The tensors in some data, and the structure around them."""

    tensors: list[Tensor]
    structure: Any

    @classmethod
    def of(cls, data: Any) -> "Data":
        """Data of any form that batches may have."""
        tensors: list[Tensor] = []
        map_tensors(tensors.append, data)
        return cls(tensors, data)

    def rebuilt(self, tensors: Iterable[Tensor]) -> Any:
        """The structure with other tensors in it."""
        following = iter(tensors)
        return map_tensors(lambda _: next(following), self.structure)

    @property
    def signature(self) -> tuple[str, str]:
        """What a captured graph depends on: types and shapes of tensors, and what is no tensor; and the latter alone.

        Raises:
            CaptureError: There is something in the data whose value cannot be told from its looks.
        """
        shapes = map_tensors(lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}", self.structure)
        _check_plain(shapes)
        return repr(shapes), repr(map_tensors(lambda _: ..., self.structure))

    def rows(self, start: int, stop: int, size: int) -> "Data":
        """What belongs to some examples of a batch of `size`."""
        if (start, stop) == (0, size):
            return self
        parts = [tensor[start:stop] if tensor.ndim and tensor.shape[0] == size else tensor for tensor in self.tensors]
        return Data(parts, self.rebuilt(parts))

    def repeated(self, count: int, size: int) -> "Data":
        """As many examples as a batch of `size`, which are its first ones over and over."""
        numbers = torch.arange(size) % count
        parts = [
            tensor[numbers.to(tensor.device)] if tensor.ndim and tensor.shape[0] == size else tensor
            for tensor in self.tensors
        ]
        return Data(parts, self.rebuilt(parts))

    def laid_out(self) -> "Data":
        """Images with channels last on a CPU, where single-precision convolutions are faster so."""

        def lay(tensor: Tensor) -> Tensor:
            images = (
                tensor.ndim == 4 and tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16)
            )
            return tensor.contiguous(memory_format=torch.channels_last) if images else tensor

        return Data([lay(tensor) for tensor in self.tensors], self.structure)


def _check_plain(structure: Any) -> None:
    if isinstance(structure, Mapping):
        structure = [*structure, *structure.values()]
    if isinstance(structure, (list, tuple)):
        for part in structure:
            _check_plain(part)
    elif not isinstance(structure, (str, int, float, bool, type(None))):
        raise CaptureError(
            f"The loss cannot be captured as a graph: the batch holds a {type(structure).__name__}, which may change "
            "from batch to batch. Make it a tensor."
        )


class Program:
    """A function of a state and data, captured for one shape of data and planned for the directions.

    Args:
        function: Of a state and data, returns one tensor.
        state: Example values of the state.
        data: Example data; the graph holds for their shapes, and for what in them is no tensor.
        moved: Entries of the state that directions move.
        data_moves: Whether directions move the first tensor of the data, too.

    Attributes:
        entries: State entry to its place among the graph's inputs.
        state: What the state alone decides: from the entries to the operands of the rest.
        rest: From operands and data to the result.
        argument: The first tensor of the data; None if there is no tensor in them.
        result: What the function returns.

    Raises:
        CaptureError: The function depends on values, not only on shapes, or an operation has no rule.
    """

    def __init__(
        self,
        function: Callable[[State, Any], Tensor],
        state: State,
        data: Data,
        *,
        moved: frozenset[str] = frozenset(),
        data_moves: bool = False,
    ):
        names = list(state)

        def flat(*tensors: Tensor) -> Tensor:
            return function(dict(zip(names, tensors, strict=False)), data.rebuilt(tensors[len(names) :]))

        first, second = capture(flat, list(state.values()), data.tensors)
        self.entries = dict(zip(names, first.inputs, strict=True))
        self.state = Plan(first, [node for name, node in self.entries.items() if name in moved])
        given = second.inputs[len(first.outputs) :]
        moving = [node for node in first.outputs if node in self.state.moving]
        moving += given[:1] if data_moves else ()
        bent = dependents(first.operations, self.state.curved) | set(given)
        self.rest = Plan(second, moving, [node for node in moving if node in bent])
        self.argument = given[0] if given else None
        self.result = second.outputs[0]

    @cached_property
    def constants(self) -> dict[fx.Node, Any]:
        """Values of the state's own stage of a function that has no state."""
        return self.state.run([])

    def evaluate(self, operands: Mapping[fx.Node, Any], data: Data) -> dict[fx.Node, Any]:
        """Values of the rest, from those of the state's own stage and data."""
        return self.rest.run([*(operands[node] for node in self.state.stage.outputs), *data.tensors])
