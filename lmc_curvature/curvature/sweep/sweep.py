"""The tangent–adjoint sweep: UᵀHU for k directions from k forward tangents and one adjoint.

Differentiating L(θ + x u_i + y u_j) twice by the chain rule and collecting the second derivative of each operation
z_n = f_n(…) against its adjoint g_n = ∂L/∂z_n gives

    u_iᵀ H u_j = Σ_n ⟨g_n, D²f_n [ż^(i), ż^(j)]⟩,

where ż^(i) are the tangents of the operation's arguments along u_i (`sweep/rules`). A direction
that moves one layer has no tangent before that layer, linear operations contribute nothing, and a bilinear one costs
one contraction of g_n for each direction that reaches its rarer side.

A batch goes through three stages: what the state alone decides (folded weights), the network, and the loss of its
output. The network is swept in tiles of examples, so that the tangents at work stay small; the other two see whole
batches, so a loss may weigh its examples as it likes.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from lmc_curvature.curvature.problem import BatchValues
from lmc_curvature.curvature.sweep.cache import Captured, Captures
from lmc_curvature.curvature.sweep.program import Data, Program
from lmc_curvature.curvature.sweep.rules.rule import Contributions, Tangents
from lmc_curvature.curvature.sweep.tiling import blocks
from lmc_curvature.errors import CaptureError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective

# How far along all directions another state lies, to see there what a state itself may hide.
_NEAR = 0.01


@dataclass(frozen=True)
class _Point:
    """A state as a program sees it: values and tangents of its own stage."""

    values: dict[fx.Node, Any]
    tangents: dict[fx.Node, Tangents]


@dataclass
class _Tile:
    """The part of a batch that is swept together."""

    program: Program
    point: _Point
    start: int
    stop: int
    data: Data
    values: dict[fx.Node, Any] = field(default_factory=dict)

    def result(self, *, keep: bool) -> Tensor:
        """The result of the program; its values may be kept for `sweep`."""
        if keep:
            self.values = self._evaluate()
            return self.values[self.program.result].detach()
        with torch.no_grad():
            return self._evaluate()[self.program.result]

    def output_at(self, state: State) -> Tensor:
        """The result at another state."""
        operands = self.program.state.run([state[name] for name in self.program.entries])
        return self.program.evaluate(operands, self.data)[self.program.result]

    def _evaluate(self) -> dict[fx.Node, Any]:
        return self.program.evaluate(self.point.values, self.data)

    def sweep(self, adjoint: Tensor, block: Sequence[int], contributions: Contributions) -> tuple[Tangents, dict]:
        """Tangents of the result, and the adjoints of operands that the state's own stage needs; forgets the values."""
        if not self.values:
            self.values = self._evaluate()
        adjoints = self.program.rest.adjoints(self.values, [adjoint])
        chosen = {
            node: {i: tangent for i, tangent in self.point.tangents.get(node, {}).items() if i in block}
            for node in self.program.state.stage.outputs
        }
        (tangents,) = self.program.rest.push(self.values, chosen, adjoints, contributions)
        self.values = {}
        return tangents, {node: adjoints[node] for node in self.program.rest.wanted if node in adjoints}


class Sweep:
    """Projects batches at given states onto given directions.

    Args:
        objective: The loss.
        states: Complete states, on the objective's device.
        directions: Placed directions.
        memory_gib: What values and tangents may take; by default half of a CUDA device's free memory, or 4 GiB.
    """

    def __init__(
        self,
        objective: Objective,
        states: Sequence[State],
        directions: Sequence[State],
        *,
        memory_gib: float | None = None,
    ):
        self.objective = objective
        self.states = states
        self.directions = directions
        self.captures = Captures(objective, states[0], directions, memory_gib)
        self._points: dict[tuple[Program, int], _Point] = {}

    def project(self, number: int, batch: Batch) -> BatchValues:
        """Loss, slopes and curvature of one batch at one of the states.

        Raises:
            CaptureError: The loss cannot be captured, or an operation cannot be differentiated.
            MemoryBudgetError: A single example takes more memory than allowed.
        """
        with self.objective.differentiating_operations():
            captured, tiles, result = self._evaluated(number, batch)
            if not self.captures.hold(captured, self.states[number], batch, result):
                self.captures.forget(batch)
                captured, tiles, result = self._evaluated(number, batch)
            count = len(self.directions)
            loss, slopes, curvature = math.nan, np.empty(count), np.empty((count, count))
            with self._as_captured():
                for block in blocks(count, captured.cut.directions):
                    found = self._project(captured, batch, tiles, result, block)
                    loss, slopes[block], curvature[np.ix_(block, block)] = found
        return loss, slopes, curvature

    def is_cut_rightly(self, number: int, batch: Batch) -> bool:
        """Whether the tiles' outputs are those of the network for the batch as a whole, near one of the states.

        Near it, because examples may be mixed with a weight that happens to be zero there.

        Args:
            number: Which state.
            batch: A batch of a shape that was swept in tiles.
        """
        near = self._near(number)
        parts = self._outputs_at(near, self._tiles_of(number, batch))
        return self.captures.is_output(near, batch, torch.cat(parts))

    def keeps_alike_apart(self, number: int, batch: Batch) -> bool:
        """Whether examples that are alike have no part in each other's outputs, near one of the states.

        A network may mix examples by what is in them, neighbours or members of a group, and a batch may have none.

        Args:
            number: Which state.
            batch: A batch of a shape that was swept in tiles.
        """
        near = self._near(number)
        tile = self._tiles_of(number, batch)[0]
        (output,) = self._outputs_at(near, [tile])
        inputs = Data.of(batch.data[0]).repeated(tile.stop, batch.size).structure
        expected = output[torch.arange(batch.size, device=output.device) % tile.stop]
        return self.captures.is_output(near, Batch(batch.index, batch.size, (inputs, None)), expected)

    def _near(self, number: int) -> dict[str, Tensor]:
        near = dict(self.states[number])
        for direction in self.directions:
            for name, tensor in direction.items():
                near[name] = near[name] + _NEAR * tensor
        return near

    def _tiles_of(self, number: int, batch: Batch) -> list[_Tile]:
        with self.objective.differentiating_operations():
            return self._tiles(self.captures.of(batch), number, batch)

    def _outputs_at(self, state: State, tiles: Sequence[_Tile]) -> list[Tensor]:
        with self.objective.differentiating_operations(), torch.no_grad(), self._as_captured():
            return [tile.output_at(state) for tile in tiles]

    def sweep_whole_batches(self) -> None:
        """From now on, do not cut batches into tiles, and forget what was captured for them."""
        self.captures.take_whole_batches()
        self._points.clear()

    @contextlib.contextmanager
    def _as_captured(self) -> Iterator[None]:
        # What autocast does is in the graph; what is computed from its values needs no rounding of its own.
        with torch.autocast(self.objective.device.type, enabled=False):
            yield

    def _evaluated(self, number: int, batch: Batch) -> tuple[Captured, list[_Tile], Tensor]:
        """What is known of the batch's shape, the tiles, and the network's output or the whole loss."""
        captured = self.captures.of(batch)
        # Folded weights and their tangents are as large as the network: those of one shape of batch at a time.
        programs = captured.programs
        self._points = {key: point for key, point in self._points.items() if key[0] in programs}
        tiles = self._tiles(captured, number, batch)
        with self._as_captured():
            results = [tile.result(keep=captured.cut.keeps_values) for tile in tiles]
        if len(tiles) == 1:
            return captured, tiles, results[0]
        _check_examples(tiles, results)
        return captured, tiles, torch.cat(results)

    def _tiles(self, captured: Captured, number: int, batch: Batch) -> list[_Tile]:
        inputs = Data.of(batch.data[0] if captured.loss is not None else batch.data)
        tiles = []
        for start in range(0, batch.size, captured.cut.examples):
            stop = min(start + captured.cut.examples, batch.size)
            data = inputs.rows(start, stop, batch.size)
            program = self.captures.network(captured, data, stop - start)
            tiles.append(_Tile(program, self._point(program, number), start, stop, data.laid_out()))
        return tiles

    def _point(self, program: Program, number: int) -> _Point:
        if (program, number) not in self._points:
            along = {
                node: {i: d[name] for i, d in enumerate(self.directions) if name in d}
                for name, node in program.entries.items()
                if node in program.state.moving
            }
            # Kept for when derivatives are taken.
            with self._as_captured(), torch.enable_grad():
                values = program.state.run([self.states[number][name] for name in program.entries])
                self._points[program, number] = _Point(values, program.state.push_all(values, along))
        return self._points[program, number]

    def _project(
        self, captured: Captured, batch: Batch, tiles: list[_Tile], result: Tensor, block: list[int]
    ) -> BatchValues:
        contributions = Contributions()
        if captured.loss is None:
            loss, slopes = result, self._sweep(tiles, torch.ones_like(result), block, contributions)
        else:
            loss, slopes = self._through_loss(captured.loss, batch, tiles, result, block, contributions)
        return self._gathered(loss, slopes, block, contributions)

    def _through_loss(
        self,
        program: Program,
        batch: Batch,
        tiles: list[_Tile],
        output: Tensor,
        block: list[int],
        contributions: Contributions,
    ) -> tuple[Tensor, Tangents]:
        assert program.argument is not None
        values = program.evaluate(program.constants, Data.of((output, batch.data[1])))
        loss = values[program.result]
        adjoints = program.rest.adjoints(values, [torch.ones_like(loss)])
        adjoint = adjoints.get(program.argument, torch.zeros_like(output))
        tangents = self._sweep(tiles, adjoint, block, contributions)
        (slopes,) = program.rest.push(values, {program.argument: tangents}, adjoints, contributions)
        return loss.detach(), slopes

    def _sweep(self, tiles: list[_Tile], adjoint: Tensor, block: list[int], contributions: Contributions) -> Tangents:
        """Sweep every tile; returns the tangents of the result, the tiles' joined."""
        found: list[Tangents] = []
        pulled: dict[Program, dict[fx.Node, Tensor]] = {}
        for tile in tiles:
            # An output that was not cut may have other rows than examples: tokens, crops.
            part = adjoint[tile.start : tile.stop] if len(tiles) > 1 else adjoint
            tangents, adjoints = tile.sweep(part, block, contributions)
            found.append(tangents)
            total = pulled.setdefault(tile.program, {})
            for node, value in adjoints.items():
                total[node] = total[node] + value if node in total else value
        for tile in {tile.program: tile for tile in tiles}.values():
            self._contract_state(tile, pulled[tile.program], block, contributions)
        if len(found) == 1:
            return found[0]
        return {i: torch.cat([tangents[i] for tangents in found]) for i in found[0]}

    def _contract_state(
        self, tile: _Tile, pulled: Mapping[fx.Node, Tensor], block: list[int], contributions: Contributions
    ) -> None:
        plan = tile.program.state
        adjoints = plan.adjoints(tile.point.values, [pulled.get(node) for node in plan.stage.outputs], keeps_graph=True)
        plan.contract(tile.point.values, tile.point.tangents, adjoints, contributions)

    def _gathered(self, loss: Tensor, slopes: Tangents, block: list[int], contributions: Contributions) -> BatchValues:
        """Everything as numbers; the one time in a batch that the host waits for the device."""
        along = [slopes[i] if i in slopes else torch.zeros_like(loss) for i in block]
        numbers = torch.cat([loss.reshape(1), torch.stack(along), *contributions.flat()]).double().cpu().numpy()
        curvature = contributions.assemble(numbers[1 + len(block) :], len(self.directions))
        return float(numbers[0]), numbers[1 : 1 + len(block)], curvature[np.ix_(block, block)]


def _check_examples(tiles: Sequence[_Tile], results: Sequence[Tensor]) -> None:
    """Refuse tiles whose outputs cannot be joined: the network looks at the number of examples."""
    rest = results[0].shape[1:]
    for tile, result in zip(tiles, results, strict=True):
        expected = (tile.stop - tile.start, *rest)
        if tuple(result.shape) != expected:
            raise CaptureError(
                f"The network's output has shape {tuple(result.shape)} for {tile.stop - tile.start} examples of a "
                f"batch; expected {expected}, as for the others."
            )
