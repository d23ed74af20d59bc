"""Comparison of the sweep with Hessian-vector products, entry by entry, and a network around any operation."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lmc_curvature import LayerPartition, Objective, Projection, project_hessian
from lmc_curvature.curvature.problem import Problem
from lmc_curvature.curvature.projection.by_sweep import project_by_sweep
from lmc_curvature.curvature.sweep import CompiledBatch, batch_key
from lmc_curvature.curvature.sweep.rules import Rule
from lmc_curvature.curvature.sweep.rules.autodiff import ByAutodiff
from tests.support.networks import randomized


def layer_directions(
    objective: Objective, layers: str = "module", *, most: int | None = None, seed: int = 0
) -> dict[str, dict[str, torch.Tensor]]:
    """A random direction in every layer (or in `most` of them, spread over the depth), and one over all entries."""
    generator = torch.Generator().manual_seed(seed)
    state = objective.state()

    def random(names: Sequence[str]) -> dict[str, torch.Tensor]:
        # Each of about unit length, so that no entry of the projection is lost beside another.
        length = math.sqrt(sum(state[name].numel() for name in names))
        return {
            name: torch.randn(state[name].shape, generator=generator, dtype=torch.float64) / length for name in names
        }

    partition = LayerPartition.of(objective.network, layers, batch_norm=objective.batch_norm)
    chosen = list(partition.names)
    if most is not None and most < len(chosen):
        chosen = [chosen[round(place)] for place in np.linspace(0, len(chosen) - 1, most)]
    return {name: random(partition.entries(name)) for name in chosen} | {"everything": random(list(state))}


def posed(objective: Objective, directions: Any, state: Any = None, *, tiling: Any = None, **options: Any) -> Problem:
    """The problem at one state, to be swept in the given tiles where a batch can be cut at all."""
    return dataclasses.replace(Problem.of(objective, [state or {}], directions, **options), tiling=tiling)


def swept(objective: Objective, directions: Any, state: Any = None, **options: Any) -> Projection:
    """The projection by the sweep alone: what falls back or warns fails."""
    problem = posed(objective, directions, state, **options)
    sizes, values = [], []
    with warnings.catch_warnings(), objective.one_pass() as batches:
        warnings.simplefilter("error")
        # Some losses are no means; the sweep does not mind.
        warnings.filterwarnings("ignore", message="The loss of batch")
        for batch in batches:
            sizes.append(batch.size)
            values.append(project_by_sweep(problem, problem.points[0], batch))
    return Projection(np.array(sizes), *(np.array(parts) for parts in zip(*values, strict=True)))


def compiled_batches(
    objective: Objective, directions: Any, *, whole: bool | None = None, **options: Any
) -> list[CompiledBatch]:
    """The compiled batches that an objective keeps, one for each batch of its loader.

    Args:
        objective: An objective that was swept along the directions before.
        directions: Directions of the same entries.
        whole: Whether they are those of batches that must not be cut; by default those that were used last.
        options: The tiling and the budget of that sweep.
    """
    problem = posed(objective, directions, **options)
    whole = objective.memo("whole batches", _nothing_kept) if whole is None else whole
    with objective.one_pass() as batches:
        return [objective.memo((*batch_key(problem, batch), whole), _nothing_kept) for batch in batches]


def _nothing_kept() -> Any:
    raise LookupError("the objective keeps nothing of that kind")


def rules_of(compiled: CompiledBatch) -> dict[fx.Node, Rule]:
    """The rules of all operations of a compiled batch."""
    programs = [*compiled.networks.values(), *([] if compiled.loss is None else [compiled.loss])]
    plans = [plan for program in programs for plan in (program.prelude, program.body)]
    return {node: rule for plan in plans for node, rule in plan.rules.items()}


def swept_by_autodiff(compiled: CompiledBatch) -> set[str]:
    """Names of the operations of a compiled batch that have no rule of their own."""
    return {str(node.target) for node, rule in rules_of(compiled).items() if isinstance(rule, ByAutodiff)}


def assert_sweep_agrees(
    objective: Objective, directions: Any = None, *, relative: float = 1e-9, **options: Any
) -> Projection:
    """Assert that sweep and Hessian-vector products agree, in every batch and every entry, and return the sweep's."""
    directions = layer_directions(objective) if directions is None else directions
    found = swept(objective, directions, **options)
    expected = project_hessian(objective, {}, directions, method="hvp")
    assert_curved(expected)
    assert_projections_agree(found, expected, relative=relative)
    return found


def assert_curved(projection: Projection) -> None:
    """Assert that every direction has curvature to check."""
    for curvature in projection.batch_curvatures:
        largest = np.abs(curvature).max(1)
        assert (largest > 1e-9 * max(largest)).all(), "a direction has no curvature to check"


def assert_projections_agree(found: Projection, expected: Projection, *, relative: float) -> None:
    """Assert that two projections agree in every batch: curvature relative to the row and column of each entry."""
    np.testing.assert_allclose(found.batch_losses, expected.batch_losses, rtol=relative)
    for slopes, others in zip(found.batch_slopes, expected.batch_slopes, strict=True):
        np.testing.assert_allclose(slopes, others, rtol=0, atol=relative * np.abs(others).max())
    for curvature, other in zip(found.batch_curvatures, expected.batch_curvatures, strict=True):
        # A diagonal entry may be small by cancellation, which leaves the rounding of what cancelled.
        size = np.sqrt(np.maximum(np.abs(np.diag(other)), 1e-3 * np.abs(other).max(1)))
        allowed = relative * np.outer(size, size) + 1e-14 * np.abs(other).max()
        wrong = np.argwhere(np.abs(curvature - other) > allowed)
        assert len(wrong) == 0, [(*place, curvature[tuple(place)], other[tuple(place)]) for place in wrong[:5]]


class TwoLayers(nn.Module):
    """Two linear layers with a tanh between them, for tests to vary; its data are `vectors`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def vectors(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of the given sizes, in float64."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 5, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


class Around(nn.Module):
    """An operation on tensors of given shapes, each from a linear layer of its own, with a linear layer after it."""

    def __init__(self, operation: Callable[..., Any], shapes: Sequence[tuple[int, ...]], size: int):
        super().__init__()
        self.operation = operation
        self.shapes = shapes
        self.before = nn.ModuleList(nn.Linear(5, math.prod(shape)) for shape in shapes)
        self.double().eval()
        with torch.no_grad():
            width = self._operate(torch.zeros(size, 5, dtype=torch.float64)).shape[1]
        self.after = nn.Linear(width, 3, dtype=torch.float64)

    def _operate(self, x):
        operands = [layer(x).view(-1, *shape) for layer, shape in zip(self.before, self.shapes, strict=True)]
        return self.operation(*operands).flatten(1)

    def forward(self, x):
        return self.after(self._operate(x))


def around(
    operation: Callable[..., Any], *shapes: tuple[int, ...], sizes: Sequence[int] = (3,), **options: Any
) -> Objective:
    """The objective of a network around an operation, in float64, with batches of random data."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomized(Around(operation, shapes, sizes[0]))
    return Objective(model, vectors(*sizes), **options)
