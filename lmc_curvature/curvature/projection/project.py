"""The projection of loss, gradient and Hessian onto a few directions: all that a barrier prediction needs."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import numpy as np

from lmc_curvature.averages import GroupMeans, add_batch
from lmc_curvature.curvature.problem import Method, Problem
from lmc_curvature.curvature.projection.by_differences import difference_error, project_by_differences
from lmc_curvature.curvature.projection.by_losses import project_by_losses
from lmc_curvature.curvature.projection.by_products import project_by_products
from lmc_curvature.curvature.projection.by_sweep import project_by_sweep
from lmc_curvature.curvature.projection.projection import Projection
from lmc_curvature.errors import (
    CaptureError,
    FallbackWarning,
    MemoryBudgetError,
    NonFiniteError,
    SweepError,
    check_choice,
)
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.extent import Extent
from lmc_curvature.objective.network import State
from lmc_curvature.objective.risk import Objective


def project_hessian(
    objective: Objective,
    state: State,
    directions: Mapping[str, State] | Sequence[State],
    *,
    method: Method = "auto",
    memory_gib: float | None = None,
    progress: bool | None = None,
) -> Projection:
    """Project an objective onto directions at a state, in one pass over the loader.

    Args:
        objective: The loss and its data.
        state: Where to differentiate.
        directions: k sparse states, by name or in order; each holds only the entries it moves.
        method: `"sweep"`: forward tangents and one adjoint (see `lmc_curvature.curvature.sweep`), compared with a
            Hessian-vector product on a part of the first batch. `"hvp"`: one exact Hessian-vector product a direction
            and batch. `"auto"`: the sweep, and products with a `FallbackWarning` where it cannot go, or takes more
            memory than it may. `"differences"`: of gradients, for losses that autograd differentiates once only, such
            as CTC; two gradients a direction and batch, inexact by about `difference_error`. `"losses"`: differences of
            losses, for those without a derivative, or whose backward pass is not that of the loss; k² + k + 1 forward
            passes a batch, and less exact. Nothing is differentiated, so `witness` compares nothing.
        memory_gib: GiB that the sweep may take for values, adjoints and tangents: examples and directions are cut to
            fit. By default half of the memory that is free, and on a CUDA device no more than three times what a
            gradient of the first batch keeps. Beside it there are the directions, folded
            weights and their tangents (about as large as state and directions), and for the first batch of every
            shape a pass without gradients over all of it; the objective's own check of the first batch keeps a graph
            of it for a moment, and products keep one of every batch, whatever they may take.
        progress: Show a progress bar over batches; by default where there is a terminal or a notebook.

    Returns:
        The projection, its rows in the order of `directions`.

    Raises:
        DirectionError: A direction has an unknown entry, a wrong shape, a type that cannot move or values that are
            not finite, or there is no direction.
        NonFiniteError: The loss or the curvature of a batch is not finite.
        OptionError: `method` is not a choice, or `memory_gib` is not positive.
        MemoryBudgetError: With `method="sweep"`, two directions take more memory than it may use: with one example,
            or with a whole batch where that cannot be cut.
        CaptureError: With `method="sweep"`, the loss cannot be captured; names the operation.
        SweepError: With `method="sweep"`, its answer disagrees with a Hessian-vector product.
    """
    return project_hessian_at(objective, [state], directions, method=method, memory_gib=memory_gib, progress=progress)[
        0
    ]


def project_hessian_at(
    objective: Objective,
    states: Mapping[str, State] | Sequence[State],
    directions: Mapping[str, State] | Sequence[State],
    *,
    method: Method = "auto",
    memory_gib: float | None = None,
    watch: Callable[[Batch], None] | None = None,
    groups: list[GroupMeans] | None = None,
    extent: Extent | None = None,
    held: bool = True,
    progress: bool | None = None,
) -> list[Projection]:
    """Project an objective at several states, on the same batches: still one pass over the loader.

    Options and errors are those of `project_hessian`; values that are not finite are named with their state's name or
    number.

    Args:
        objective: The loss and its data.
        states: Where to differentiate, by name or in order; every batch is visited at all of them.
        directions: k sparse states, the same at every state.
        method: The sweep, products, or the first that goes.
        memory_gib: GiB that the sweep may take.
        watch: Called with every batch, on the objective's device, when it has been projected.
        groups: A list for the losses, slopes and curvatures at all states, batch by batch; see `Projection.of`.
        extent: How far to read the loader, if not to its end.
        held: Whether all states are held on the objective's device; else each is brought there, or made by a mapping
            that makes its values, for every batch anew, and given up before the next.
        progress: Show a progress bar over batches.

    Returns:
        A projection for each state.
    """
    problem = Problem.of(objective, states, directions, memory_gib=memory_gib, held=held)
    return project_problems([problem], method=method, watch=watch, groups=groups, extent=extent, progress=progress)


def project_problems(
    problems: Sequence[Problem],
    *,
    method: Method = "auto",
    watch: Callable[[Batch], None] | None = None,
    groups: list[GroupMeans] | None = None,
    extent: Extent | None = None,
    progress: bool | None = None,
) -> list[Projection]:
    """Answer several problems with one objective, each of its own states and directions, in one pass over the loader.

    Options and errors are those of `project_hessian_at`.

    Args:
        problems: The problems.
        method: The sweep, products, or the first that goes.
        watch: Called with every batch, on the objective's device, when it has been projected.
        groups: A list for the losses, slopes and curvatures at all states, batch by batch.
        extent: How far to read the loader, if not to its end.
        progress: Show a progress bar over batches.

    Returns:
        A projection for each state of each problem, in order.
    """
    check_choice("method", method, get_args(Method))
    objective, project = problems[0].objective, _ROADS[method]
    places = [(problem, number) for problem in problems for number in range(len(problem.points))]
    groups = [] if groups is None else groups
    with objective.one_pass(progress=progress, description="curvature", extent=extent) as batches:
        for batch in batches:
            looked_at = () if method == "losses" else places if batch.is_first else places[:1]
            for problem, number in looked_at:
                state = problem.points[number].state
                objective.check_derivatives(state, batch, problem.displaced, second=method != "differences")
                del state
            try:
                found = [project(problem, problem.points[number], batch) for problem, number in places]
            except (CaptureError, SweepError, MemoryBudgetError, NonFiniteError) as error:
                if method != "auto" or project is project_by_products:
                    raise
                # Products are to be trusted: the sweep never stands against them alone (see docs/trust.md).
                warnings.warn(
                    f"{_sentence(error)} Falling back on one Hessian-vector product a direction, which is slower.",
                    FallbackWarning,
                    stacklevel=4,
                )
                project = project_by_products
                found = [project(problem, problem.points[number], batch) for problem, number in places]
            if watch is not None:
                watch(batch)
            values = tuple(np.asarray(value) for of_place in found for value in of_place)
            add_batch(groups, GroupMeans(batch.index, batch.size, np.array(batch.weight), values))
        groups = objective.ranks.merge(groups)
    errors: list[float | None] = [None] * len(places)
    if method in ("differences", "losses"):
        # Ranks choose their steps on first batches of their own.
        own = [difference_error(problem, problem.points[number]) for problem, number in places]
        errors = [max(each) for each in zip(*objective.ranks.gather(own), strict=True)]
    return [Projection.of(groups, number, error) for number, error in enumerate(errors)]


_ROADS = {
    "auto": project_by_sweep,
    "sweep": project_by_sweep,
    "hvp": project_by_products,
    "differences": project_by_differences,
    "losses": project_by_losses,
}


def _sentence(error: Exception) -> str:
    text = str(error).rstrip()
    return text if text.endswith((".", "?", "!")) else f"{text}."
