"""Whether a network mixes the examples of a batch, so that the batch must not be cut into tiles."""

import torch

from lmc_curvature.agreement import all_near
from lmc_curvature.curvature.problem import Point, Problem
from lmc_curvature.curvature.sweep.compiled import CompiledBatch, network_output
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.network import State

# How far along all directions another state lies, to see there what a state itself may hide.
_NEAR = 0.01


# Times as many examples as are looked at: company enough where a larger one was seen at another state.
_FEW = 4


def mixes_examples(
    problem: Problem, compiled: CompiledBatch, point: Point, batch: Batch, *, among_few: bool = False
) -> bool:
    """Whether the first examples of a batch have another output in the company of others than for themselves.

    Near the state, because examples may be mixed with a weight that happens to be zero there. And in the company of
    copies of themselves, because examples may be mixed by what is in them, neighbours or members of a group, of which a
    batch may have none.

    Args:
        problem: The objective and the directions.
        compiled: The graphs.
        point: The state.
        batch: The batch, of more examples than that.
        among_few: Among a few of the other examples instead of all.
    """
    state, size = state_near(problem, point), min(compiled.part, compiled.tiling.examples)
    alone = _output(problem, compiled, state, batch, size)
    company = _company(size, min(batch.size, _FEW * size) if among_few else batch.size)
    inputs = compiled.data_of(batch).chosen(company, batch.size).structure
    together = network_output(problem.objective, state, Batch(batch.index, len(company), (inputs, None)))
    places = company < size
    return not all_near("mixing", alone[company[places]], together[places], rounding=problem.objective.rounding)


def _company(size: int, total: int) -> torch.Tensor:
    """Numbers of examples: the first `size`, copies of them as half of the rest, and others, in another order.

    The first are neither first nor last any more where there are others, and have other neighbours.
    """
    copies = min(size, (total - size + 1) // 2)
    numbers = torch.cat([torch.arange(size), torch.arange(copies), torch.arange(size, total - copies)])
    backwards = numbers.sort(descending=True).values
    return backwards.roll(-1) if total - copies > size else backwards


def state_near(problem: Problem, point: Point) -> State:
    """A state a hundredth of all directions away, where nothing vanishes by chance."""
    near = dict(point.state)
    for direction in problem.directions:
        for name, tensor in direction.items():
            near[name] = near[name] + _NEAR * tensor
    return near


def _output(problem: Problem, compiled: CompiledBatch, state: State, batch: Batch, size: int) -> torch.Tensor:
    """The graph's output for the first examples, at any state."""
    objective, program = problem.objective, compiled.networks[size]
    data = compiled.data_of(batch).rows(0, size, batch.size).laid_out()
    with (
        objective.numerics.differentiating_operations(),
        torch.no_grad(),
        torch.autocast(objective.device.type, enabled=False),
    ):
        return program.evaluate(program.operands(state), data)[program.result]
