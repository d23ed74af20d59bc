"""The tangent–adjoint sweep: UᵀHU for k directions from k forward tangents and one adjoint.

Differentiating L(θ + x u_i + y u_j) twice by the chain rule and collecting the second derivative of each operation
z_n = f_n(…) against its adjoint g_n = ∂L/∂z_n gives

    u_iᵀ H u_j = Σ_n ⟨g_n, D²f_n [ż^(i), ż^(j)]⟩,

where ż^(i) are the tangents of the operation's arguments along u_i (`lmc_curvature.curvature.op_rules`). A direction
that moves one layer has no tangent before that layer, linear operations contribute nothing, and a bilinear one costs
one contraction of g_n for each direction that reaches its rarer side.

A batch goes through three stages: what the state alone decides (folded weights), the network, and the loss of its
output. The network is swept in tiles of examples, so that the tangents at work stay small; the other two see whole
batches, so a loss may weigh its examples as it likes.
"""

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, fx

from lmc_curvature.batches import Batch, map_tensors
from lmc_curvature.curvature.graph import capture, dependents
from lmc_curvature.curvature.op_calls import Contributions, Tangents
from lmc_curvature.curvature.plan import Plan
from lmc_curvature.errors import CaptureError, MemoryBudgetError
from lmc_curvature.network import State
from lmc_curvature.objective import Objective

# Examples of the capture that a tile's memory is estimated from.
_PROBE = 16
# On a CPU, tangents in its last cache are several times faster to work on than those in main memory. Half of it is left
# to values and weights; tiles larger than the most hardly save calls. The least is for where none is reported.
_LEAST_CACHE_BYTES, _MOST_CACHE_BYTES = 32 * 2**20, 128 * 2**20
_DEFAULT_BUDGET_GIB = 4.0

BatchValues = tuple[float, Float[np.ndarray, " k"], Float[np.ndarray, "k k"]]
"""Loss, slopes and curvature of one batch."""


@dataclass(frozen=True)
class _Data:
    """The tensors in some data, and the structure around them."""

    tensors: list[Tensor]
    structure: Any

    @classmethod
    def of(cls, data: Any) -> "_Data":
        tensors: list[Tensor] = []
        map_tensors(tensors.append, data)
        return cls(tensors, data)

    def rebuilt(self, tensors: Iterable[Tensor]) -> Any:
        following = iter(tensors)
        return map_tensors(lambda _: next(following), self.structure)

    @property
    def signature(self) -> str:
        """What a captured graph depends on: shapes, types, and whatever is no tensor.

        Raises:
            CaptureError: There is something in the data whose value cannot be told from its looks.
        """
        shapes = map_tensors(lambda tensor: (tuple(tensor.shape), str(tensor.dtype)), self.structure)
        _check_plain(shapes)
        return repr(shapes)

    def rows(self, start: int, stop: int, size: int) -> "_Data":
        """What belongs to some examples of a batch of `size`."""
        if (start, stop) == (0, size):
            return self
        parts = [tensor[start:stop] if tensor.ndim and tensor.shape[0] == size else tensor for tensor in self.tensors]
        return _Data(parts, self.rebuilt(parts))


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

    Attributes:
        entries: State entry to its place among the graph's inputs.
        state: What the state alone decides: from the entries to the operands of the rest.
        rest: From operands and data to the result.
    """

    def __init__(
        self,
        function: Callable[[State, Any], Tensor],
        state: State,
        data: _Data,
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
        self.argument = given[0]
        self.result = second.outputs[0]

    def evaluate(self, operands: Mapping[fx.Node, Any], data: _Data) -> dict[fx.Node, Any]:
        """Values of the rest, from those of the state's own stage and data."""
        return self.rest.run([*(operands[node] for node in self.state.stage.outputs), *data.tensors])


@dataclass
class _Captured:
    """What is known of one shape of batch.

    Attributes:
        tile: Examples that are swept together.
        directions: Directions that are swept together.
        keeps_values: Whether the values of all tiles are kept until their turn, or computed anew.
        networks: Number of examples to the network's program, or to that of the whole loss.
        loss: The loss as a function of the network's output, if it is one.
        verified: Whether its answer was found to agree with a Hessian-vector product.
    """

    tile: int
    directions: int
    keeps_values: bool
    networks: dict[int, Program]
    loss: Program | None
    verified: bool = False


_CAPTURED: "weakref.WeakKeyDictionary[Objective, dict[Any, _Captured]]" = weakref.WeakKeyDictionary()


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
    data: _Data
    values: dict[fx.Node, Any] = field(default_factory=dict)

    def result(self, *, keep: bool) -> Tensor:
        """The result of the program; its values may be kept for `sweep`."""
        if keep:
            self.values = self._evaluate()
            return self.values[self.program.result].detach()
        with torch.no_grad():
            return self._evaluate()[self.program.result]

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

    Captured graphs are kept with the objective, by the shape of the batch and the entries that the directions move.

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
        self._budget = _budget_bytes(objective.device, memory_gib)
        self._moved = frozenset(name for direction in directions for name in direction)
        self._layout = (tuple(tuple(sorted(direction)) for direction in directions), memory_gib)
        self._points: dict[tuple[Program, int | None], _Point] = {}
        self._known = _CAPTURED.setdefault(objective, {})
        self._current: set[Any] = set()
        self._whole_batches = not objective.has_output or objective.batch_norm != "interpolate"

    def project(self, number: int, batch: Batch) -> BatchValues:
        """Loss, slopes and curvature of one batch at one of the states.

        Raises:
            CaptureError: The loss cannot be captured, or an operation cannot be differentiated.
            MemoryBudgetError: A single example takes more memory than allowed.
        """
        with self.objective.differentiating_operations():
            captured = self.captured(batch)
            tiles, results = self._evaluated(captured, number, batch)
            if not self._is_current(captured, number, batch, results):
                self._forget(batch)
                captured = self.captured(batch)
                tiles, results = self._evaluated(captured, number, batch)
            count = len(self.directions)
            loss, slopes, curvature = math.nan, np.empty(count), np.empty((count, count))
            for block in _blocks(count, captured.directions):
                found = self._project(captured, batch, tiles, results, block)
                loss, slopes[block], curvature[np.ix_(block, block)] = found
        return loss, slopes, curvature

    def sweep_whole_batches(self) -> None:
        """From now on, do not cut batches into tiles, and forget what was captured for them."""
        self._whole_batches = True
        self._points.clear()
        self._known.clear()
        self._current.clear()

    def _evaluated(self, captured: _Captured, number: int, batch: Batch) -> tuple[list[_Tile], list[Tensor]]:
        tiles = self._tiles(captured, number, batch)
        results = [tile.result(keep=captured.keeps_values) for tile in tiles]
        if len(tiles) > 1:
            _check_examples(tiles, results)
        return tiles, results

    def _project(
        self, captured: _Captured, batch: Batch, tiles: list[_Tile], results: list[Tensor], block: list[int]
    ) -> BatchValues:
        contributions = Contributions()
        if captured.loss is None:
            loss, slopes = results[0], self._sweep(tiles, torch.ones_like(results[0]), block, contributions)
        else:
            loss, slopes = self._through_loss(captured.loss, batch, tiles, _joined(results), block, contributions)
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
        constants = self._point(program, None).values
        values = program.evaluate(constants, _Data.of((output, batch.data[1])))
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

    def _tiles(self, captured: _Captured, number: int, batch: Batch) -> list[_Tile]:
        inputs = _Data.of(batch.data[0] if captured.loss is not None else batch.data)
        tiles = []
        for start in range(0, batch.size, captured.tile):
            stop = min(start + captured.tile, batch.size)
            data = inputs.rows(start, stop, batch.size)
            program = captured.networks.get(stop - start)
            if program is None:
                program = captured.networks[stop - start] = self._network_program(
                    data, stop - start, whole_loss=captured.loss is None
                )
            tiles.append(_Tile(program, self._point(program, number), start, stop, _laid_out(data)))
        return tiles

    def _point(self, program: Program, number: int | None) -> _Point:
        if (program, number) not in self._points:
            state = {} if number is None else self.states[number]
            values = program.state.run([state[name] for name in program.entries])
            along = {
                node: {i: d[name] for i, d in enumerate(self.directions) if name in d}
                for name, node in program.entries.items()
                if node in program.state.moving
            }
            self._points[program, number] = _Point(values, program.state.push_all(values, along))
        return self._points[program, number]

    def captured(self, batch: Batch) -> _Captured:
        """What is known of batches of this shape, found out the first time."""
        key = self._key(batch)
        if key not in self._known:
            self._known[key] = self._capture(batch)
            self._current.add(key)
        return self._known[key]

    def _forget(self, batch: Batch) -> None:
        captured = self._known.pop(self._key(batch))
        programs = set(captured.networks.values())
        self._points = {key: point for key, point in self._points.items() if key[0] not in programs}

    def _is_current(self, captured: _Captured, number: int, batch: Batch, results: Sequence[Tensor]) -> bool:
        """Whether programs that another sweep captured give what the network and the loss do now.

        A network or a loss may refer to something outside that has changed.
        """
        key = self._key(batch)
        if key not in self._current:
            with self.objective.differentiating(), torch.no_grad():
                if not self._agrees(captured, number, batch, results):
                    return False
            self._current.add(key)
        return True

    def _agrees(self, captured: _Captured, number: int, batch: Batch, results: Sequence[Tensor]) -> bool:
        state = self.states[number]
        if captured.loss is None:
            return _alike(results[0], self.objective.batch_loss(state, batch))
        output, inputs = _joined(results), _Data.of(batch.data[0])

        def holds(size: int) -> bool:
            part = Batch(batch.index, size, (inputs.rows(0, size, batch.size).structure, None))
            return _alike(output[:size] if size < batch.size else output, self.objective.output(state, part))

        # As few examples as the network is known to take, and all of them if it should mix them.
        if not any(holds(size) for size in dict.fromkeys((min(captured.networks), batch.size))):
            return False
        values = captured.loss.evaluate(self._point(captured.loss, None).values, _Data.of((output, batch.data[1])))
        return _alike(values[captured.loss.result], self.objective.output_loss(output, batch))

    def cuts(self, batch: Batch) -> bool:
        """Whether batches of this shape were captured, and are cut into tiles."""
        known = self._known.get(self._key(batch))
        return known is not None and known.tile < batch.size

    def _key(self, batch: Batch) -> tuple:
        device = self.objective.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return _Data.of(batch.data).signature, batch.size, self._layout, cast

    def _capture(self, batch: Batch) -> _Captured:
        state = self.states[0]
        with torch.no_grad():
            # Whole, and before anything is traced: this is also where an unfit network is refused.
            output = self.objective.batch_evaluation(state, batch)[1]
        loss = self._loss_program(output, batch) if isinstance(output, Tensor) else None
        cuts = loss is not None and not self._whole_batches and output.ndim > 0 and output.shape[0] == batch.size
        probe = min(_PROBE, batch.size) if cuts else batch.size
        inputs = _Data.of(batch.data[0] if loss is not None else batch.data)
        try:
            program = self._network_program(inputs.rows(0, probe, batch.size), probe, whole_loss=loss is None)
        except CaptureError:
            if probe == batch.size:
                raise
            # A network may insist on its batch size.
            probe, cuts = batch.size, False
            program = self._network_program(inputs, probe)
        tile, together, keeps = self._cut(program, probe, batch.size, cuts)
        return _Captured(tile, together, keeps, {probe: program}, loss)

    def _network_program(self, data: _Data, size: int, *, whole_loss: bool = False) -> Program:
        def output(state: State, inputs: Any) -> Tensor:
            return self.objective.output(state, Batch(1, size, (inputs, None)))

        def loss(state: State, data: Any) -> Tensor:
            return self.objective.batch_loss(state, Batch(1, size, data))

        with self.objective.differentiating():
            return Program(loss if whole_loss else output, self.states[0], data, moved=self._moved)

    def _loss_program(self, output: Tensor, batch: Batch) -> Program:
        def loss(_: State, data: Any) -> Tensor:
            return self.objective.output_loss(data[0], Batch(1, batch.size, (None, data[1])))

        with self.objective.differentiating():
            return Program(loss, {}, _Data.of((output, batch.data[1])), data_moves=True)

    def _cut(self, program: Program, probe: int, size: int, cuts: bool) -> tuple[int, int, bool]:
        """Examples and directions to sweep together, and whether all values can be kept, within the budget."""
        reach = program.state.reached(
            {
                node: frozenset(i for i, direction in enumerate(self.directions) if name in direction)
                for name, node in program.entries.items()
            }
        )
        # The graph of a forward and backward pass holds about three times the values themselves.
        values = 3 * program.rest.value_bytes / probe
        keeps = values * size <= self._budget / 2
        left = self._budget - values * size if keeps else self._budget
        least = 1 if cuts else size
        together = len(self.directions)
        while True:
            tangents = program.rest.tangent_bytes(reach, together) / probe
            each = tangents if keeps else tangents + values
            if each * least <= left:
                break
            if together <= 2:
                raise MemoryBudgetError(
                    f"Two directions of {'one example' if cuts else f'a batch of {size} examples'} need "
                    f"{(tangents + values) * least / 2**30:.3g} GiB, more than the budget of "
                    f"{self._budget / 2**30:.3g} GiB: raise memory_gib{'' if cuts else ', or use smaller batches'}."
                )
            together = max(2, together // 2)
        if not cuts:
            return size, together, keeps
        # Nothing may be reached at all.
        most = left / max(each, 1.0)
        if self.objective.device.type == "cpu":
            most = min(most, max(1.0, _cache_bytes() / max(tangents, 1.0)))
        # Of one size where that is possible: every size of tile is captured for itself.
        tiles = -(-size // max(1, min(size, int(most))))
        return -(-size // tiles), together, keeps


@functools.cache
def _cache_bytes() -> int:
    """What tangents may take of a CPU's last cache, which Linux reports in KiB."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = path.read_text().strip()[:-1], path.read_text().strip()[-1:]
        sizes.append(int(number) * 2**10 if unit == "K" and number.isdigit() else 0)
    return min(max(max(sizes) // 2, _LEAST_CACHE_BYTES), _MOST_CACHE_BYTES)


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


def _joined(results: Sequence[Tensor]) -> Tensor:
    """The output of a batch from those of its tiles."""
    return results[0] if len(results) == 1 else torch.cat(list(results))


def _alike(found: Tensor, expected: Any) -> bool:
    """Whether two results are equal up to rounding."""
    if not isinstance(expected, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    scale = expected.abs().max() if expected.numel() else 0.0
    return bool(((found - expected).abs() <= torch.finfo(found.dtype).eps ** 0.5 * scale).all())


def _laid_out(data: _Data) -> _Data:
    """Images with channels last on a CPU, where single-precision convolutions are faster so."""

    def lay(tensor: Tensor) -> Tensor:
        images = tensor.ndim == 4 and tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16)
        return tensor.contiguous(memory_format=torch.channels_last) if images else tensor

    return _Data([lay(tensor) for tensor in data.tensors], data.structure)


def _blocks(count: int, together: int) -> list[list[int]]:
    """Sets of directions, none larger than `together`, that between them hold every pair."""
    if count <= together:
        return [list(range(count))]
    half = together // 2
    parts = [list(range(start, min(start + half, count))) for start in range(0, count, half)]
    return [first + second for first, second in combinations(parts, 2)]


def _budget_bytes(device: torch.device, memory_gib: float | None) -> float:
    if memory_gib is not None:
        return memory_gib * 2**30
    if device.type == "cuda":
        # What torch has taken and does not use is free, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + unused) / 2
    return _DEFAULT_BUDGET_GIB * 2**30
