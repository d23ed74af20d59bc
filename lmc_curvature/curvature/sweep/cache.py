"""Captured graphs of an objective's network and loss: made once per shape of batch, and used while they still hold."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmc_curvature.curvature.sweep.program import Data, Program
from lmc_curvature.curvature.sweep.tiling import Cut, budget_bytes, cut
from lmc_curvature.errors import CaptureError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective

# Examples of the capture that a tile's memory is estimated from.
_PROBE = 16
# Graphs that are kept with an objective: sentences of many lengths, yes.
_MOST_GRAPHS = 256
# Sets of values that are no tensors, and that graphs were captured with: class names, yes; file names, no.
_MOST_FRAMES = 32


@dataclass
class Captured:
    """What is known of one shape of batch.

    Attributes:
        cut: What is swept together.
        networks: Number of examples to the network's program, or to that of the whole loss.
        loss: The loss as a function of the network's output, if it is one.
        verified: Whether its answer was found to agree with a Hessian-vector product.
    """

    cut: Cut
    networks: dict[int, Program]
    loss: Program | None
    verified: bool = False

    @property
    def programs(self) -> set[Program | None]:
        """All programs."""
        return {*self.networks.values(), self.loss}


_CAPTURED: "weakref.WeakKeyDictionary[Objective, dict[Any, Captured]]" = weakref.WeakKeyDictionary()


class Captures:
    """The graphs of an objective for given directions.

    They are kept with the objective, by the shape of the batch and the entries that the directions move.

    Args:
        objective: The loss.
        state: A complete state, to capture with.
        directions: Placed directions.
        memory_gib: What values and tangents may take; see `lmc_curvature.curvature.sweep.tiling`.
    """

    def __init__(self, objective: Objective, state: State, directions: Sequence[State], memory_gib: float | None):
        self._objective = objective
        self._state = state
        self._directions = directions
        self._moved = frozenset(name for direction in directions for name in direction)
        self._budget = budget_bytes(objective.device, memory_gib)
        self._options = (tuple(tuple(sorted(direction)) for direction in directions), memory_gib)
        self._known = _CAPTURED.setdefault(objective, {})
        self._current: set[Any] = set()
        self._whole_batches = not objective.has_output or objective.batch_norm != "interpolate"

    def of(self, batch: Batch) -> Captured:
        """What is known of batches of this shape, found out the first time.

        Raises:
            CaptureError: Network or loss cannot be captured.
            MemoryBudgetError: As few examples as can be swept take more memory than allowed.
        """
        key = self._key(batch)
        if key in self._known:
            # Asked for last, given up last.
            self._known[key] = self._known.pop(key)
        else:
            self._refuse_changing_frames(key[1])
            self._known[key] = self._capture(batch)
            self._current.add(key)
            while len(self._known) > _MOST_GRAPHS:
                del self._known[next(iter(self._known))]
        return self._known[key]

    def network(self, captured: Captured, data: Data, size: int) -> Program:
        """The program of the network, or of the whole loss, for some number of examples, captured the first time.

        Args:
            captured: What is known of the batch's shape.
            data: Inputs of the network, or all data of the whole loss.
            size: Examples in them.

        Raises:
            CaptureError: The network cannot be captured for this number.
        """
        if size not in captured.networks:
            captured.networks[size] = self._network_program(data, size, whole_loss=captured.loss is None)
        return captured.networks[size]

    def cuts(self, batch: Batch) -> bool:
        """Whether batches of this shape were captured, and are cut into tiles."""
        known = self._known.get(self._key(batch))
        return known is not None and known.cut.examples < batch.size

    def forget(self, batch: Batch) -> None:
        """Capture batches of this shape anew when one comes."""
        del self._known[self._key(batch)]

    def take_whole_batches(self) -> None:
        """From now on, do not cut batches into tiles, and forget what was captured for them."""
        self._whole_batches = True
        self._known.clear()
        self._current.clear()

    def hold(self, captured: Captured, state: State, batch: Batch, result: Tensor) -> bool:
        """Whether graphs that were captured earlier give what the network and the loss do now.

        A network or a loss may refer to something outside that has changed. What has changed derivatives and no value
        is not seen.

        Args:
            captured: What is known of the batch's shape.
            state: Where the network was evaluated.
            batch: The batch.
            result: What the graphs gave for it: the network's output, or the whole loss.
        """
        key = self._key(batch)
        if key not in self._current:
            with self._objective.differentiating(), torch.no_grad():
                if not self._agrees(captured, state, batch, result):
                    return False
            self._current.add(key)
        return True

    def is_output(self, state: State, batch: Batch, output: Tensor) -> bool:
        """Whether an output, up to rounding, is what the network makes of a batch as a whole."""
        with self._objective.differentiating(), torch.no_grad():
            return self._alike(output, self._objective.output(state, batch))

    def _agrees(self, captured: Captured, state: State, batch: Batch, result: Tensor) -> bool:
        if captured.loss is None:
            return self._alike(result, self._objective.batch_loss(state, batch))
        inputs = Data.of(batch.data[0])

        def holds(size: int) -> bool:
            part = Batch(batch.index, size, (inputs.rows(0, size, batch.size).structure, None))
            return self._alike(result[:size] if size < batch.size else result, self._objective.output(state, part))

        # As few examples as the network is known to take, and all of them if it should mix them.
        if not any(holds(size) for size in dict.fromkeys((min(captured.networks), batch.size))):
            return False
        with torch.autocast(self._objective.device.type, enabled=False):
            values = captured.loss.evaluate(captured.loss.constants, Data.of((result, batch.data[1])))
        return self._alike(values[captured.loss.result], self._objective.output_loss(result, batch))

    def _alike(self, found: Tensor, expected: Any) -> bool:
        """Whether two results are equal up to rounding."""
        if not isinstance(expected, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
            return False
        # Outputs may be masked with infinities.
        finite = expected[expected.isfinite()].abs()
        scale = finite.max() if finite.numel() else 0.0
        rounding = max(torch.finfo(found.dtype).eps, self._objective.rounding)
        near = (found - expected).abs() <= rounding**0.5 * scale
        return bool((near | (found == expected) | (found.isnan() & expected.isnan())).all())

    def _key(self, batch: Batch) -> tuple:
        device = self._objective.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        signature, frame = Data.of(batch.data).signature
        return signature, frame, batch.size, self._options, cast

    def _refuse_changing_frames(self, frame: str) -> None:
        others = [key[1] for key in self._known if key[1] != frame]
        if len(set(others)) >= _MOST_FRAMES:
            raise CaptureError(
                f"The loss was captured as a graph {len(others)} times, because batches hold values that are no "
                f"tensors and change: {frame[:80]} now, {others[-1][:80]} before. Leave out what the loss does not "
                "need (names of files), and make tensors of the rest."
            )

    def _capture(self, batch: Batch) -> Captured:
        with torch.no_grad():
            # Whole, and before anything is traced: this is also where an unfit network is refused.
            output = self._objective.batch_evaluation(self._state, batch)[1]
        loss = self._loss_program(output, batch) if isinstance(output, Tensor) else None
        cuts = loss is not None and not self._whole_batches and output.ndim > 0 and output.shape[0] == batch.size
        probe = min(_PROBE, batch.size) if cuts else batch.size
        inputs = Data.of(batch.data[0] if loss is not None else batch.data)
        try:
            program = self._network_program(inputs.rows(0, probe, batch.size), probe, whole_loss=loss is None)
        except CaptureError:
            if probe == batch.size:
                raise
            # A network may insist on its batch size.
            probe, cuts = batch.size, False
            program = self._network_program(inputs, probe)
        found = cut(
            program,
            loss,
            self._directions,
            probe=probe,
            size=batch.size,
            whole=not cuts,
            budget=self._budget,
            device=self._objective.device,
        )
        return Captured(found, {probe: program}, loss)

    def _network_program(self, data: Data, size: int, *, whole_loss: bool = False) -> Program:
        def output(state: State, inputs: Any) -> Tensor:
            return self._objective.output(state, Batch(1, size, (inputs, None)))

        def loss(state: State, data: Any) -> Tensor:
            return self._objective.batch_loss(state, Batch(1, size, data))

        with self._objective.differentiating():
            return Program(loss if whole_loss else output, self._state, data, moved=self._moved)

    def _loss_program(self, output: Tensor, batch: Batch) -> Program:
        def loss(_: State, data: Any) -> Tensor:
            return self._objective.output_loss(data[0], Batch(1, batch.size, (None, data[1])))

        with self._objective.differentiating():
            return Program(loss, {}, Data.of((output, batch.data[1])), data_moves=True)
