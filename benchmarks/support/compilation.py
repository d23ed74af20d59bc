"""The products of curvlinops under `torch.compile`, which its own published figures are measured with.

It is the product that curvlinops makes, forward over reverse by `torch.func` and vectorised over columns, written as
one function: the compiler stops within curvlinops' own (3.0), and would compile none of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from benchmarks.support.memory import columns_that_fit, free_bytes
from benchmarks.support.problems import Problem
from benchmarks.support.timing import Road, seconds_once

LEFT_OUT = "Compiled peers are left out of quick runs, since the compiler takes minutes."
SETTING = (
    "Compiled peers: the product of curvlinops as one function under `torch.compile`, alone and vectorised; what the "
    "compiler took is in the note, not in the time."
)


@dataclass(frozen=True)
class Compiled:
    """A compiled product.

    Attributes:
        run: Multiplies the Hessian with a vector over the parameters, (n,), or with each row of (k, n).
        seconds: Duration of the first call, which compiles.
    """

    run: Callable[[Tensor], Tensor]
    seconds: float

    @property
    def note(self) -> str:
        """A remark for readers of a table."""
        return f"compiled in {self.seconds:.0f} s"


def product_of(problem: Problem, names: Sequence[str] | None = None) -> Callable[[Tensor], Tensor]:
    """The function that multiplies the Hessian of a batch, in some parameters or in all, with a vector."""
    problem = problem.for_peers
    parameters = {name: parameter.detach() for name, parameter in problem.model.named_parameters()}
    moved = parameters if names is None else {name: parameters[name] for name in names}
    sizes = [tensor.numel() for tensor in moved.values()]
    x, y = problem.data

    def loss(point: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(problem.model, {**parameters, **point}, (x,)), y)

    def product(vector: Tensor) -> Tensor:
        parts = zip(moved.items(), vector.split(sizes), strict=True)
        direction = {name: part.view(tensor.shape) for (name, tensor), part in parts}
        products = jvp(grad(loss), (moved,), (direction,))[1]
        return torch.cat([products[name].flatten() for name in moved])

    return product


def compiled_product(problem: Problem, vectors: Tensor, names: Sequence[str] | None = None) -> Compiled:
    """The compiled product with one vector, (n,), or with as many as the rows of `vectors`, (k, n)."""
    product = product_of(problem, names)
    # One size is all that it will see.
    compiled = torch.compile(product if vectors.ndim == 1 else vmap(product), fullgraph=True, dynamic=False)
    return Compiled(compiled, seconds_once(lambda: compiled(vectors))[0])


def compiled_in_chunks(
    problem: Problem,
    vectors: Tensor,
    names: Sequence[str] | None = None,
    *,
    probe: int = 2,
    share: float = 1.0,
) -> tuple[int, Compiled]:
    """The number of rows of `vectors` that fit at once into a share of the free memory, and the product with all."""
    eager, device = vmap(product_of(problem, names)), vectors.device
    at_once = columns_that_fit(
        lambda count: eager(vectors[:count]), len(vectors), device, probe=probe, free=share * free_bytes(device)
    )
    # Every chunk has the size that was compiled for.
    missing = -len(vectors) % at_once
    padded = torch.cat([vectors, vectors.new_zeros(missing, vectors.shape[1])])
    compiled = compiled_product(problem, padded[:at_once], names)

    def run(rows: Tensor) -> Tensor:
        chunks = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]).split(at_once)
        return torch.cat([compiled.run(chunk) for chunk in chunks])[: len(rows)]

    return at_once, Compiled(run, compiled.seconds)


def compiled_roads(makers: Mapping[str, Callable[[], Road]], *, left_out: bool) -> tuple[list[Road], list[str]]:
    """The roads that could be compiled, and notes on those that could not; none if they are `left_out`."""
    if left_out:
        return [], [LEFT_OUT]
    roads, notes = [], [SETTING]
    for name, make in makers.items():
        try:
            roads.append(make())
        except (RuntimeError, NotImplementedError) as error:
            notes.append(f"{name} is missing, since it cannot be compiled: {first_line(error)}")
    return roads, notes


def first_line(error: Exception) -> str:
    """The first line of an error's message that says something, with its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])


def matrix_makers(problem: Problem, *, share: float = 1.0) -> dict[str, Callable[[], Road]]:
    """The compiled roads to UᵀHU along a problem's directions, in a share of the memory that is free."""

    def loop() -> Road:
        rows = problem.dense(problem.parameter_directions)
        compiled = compiled_product(problem, rows[0])
        return _road(MATRIX_LOOP, lambda: rows @ torch.stack([compiled.run(row) for row in rows]).T, problem, compiled)

    def at_once() -> Road:
        rows = problem.dense(problem.parameter_directions)
        count, compiled = compiled_in_chunks(problem, rows, share=share)
        return _road(f"{MATRIX_AT_ONCE}, {count} at once", lambda: rows @ compiled.run(rows).T, problem, compiled)

    return {MATRIX_LOOP: loop, MATRIX_AT_ONCE: at_once}


def product_maker(problem: Problem, vector: Tensor) -> dict[str, Callable[[], Road]]:
    """The compiled road to one product."""

    def one() -> Road:
        compiled = compiled_product(problem, vector)
        return _road(ONE, lambda: compiled.run(vector), problem, compiled)

    return {ONE: one}


def products_maker(problem: Problem, vectors: Tensor, *, share: float = 1.0) -> dict[str, Callable[[], Road]]:
    """The compiled road to the products with the rows of a matrix."""

    def many() -> Road:
        count, compiled = compiled_in_chunks(problem, vectors, share=share)
        name = f"{MANY}, {count} at once ({len(vectors)} vectors)"
        return _road(name, lambda: compiled.run(vectors), problem, compiled, vectors=len(vectors))

    return {MANY: many}


ONE = "curvlinops' product, compiled"
MANY = "curvlinops' H @ V, compiled"
MATRIX_LOOP = "curvlinops' product, compiled, in a loop"
MATRIX_AT_ONCE = "curvlinops' H @ V, compiled"


def _road(name: str, run: Callable[[], Any], problem: Problem, compiled: Compiled, *, vectors: int = 1) -> Road:
    return Road(name, run, problem.forward, vectors=vectors, note=compiled.note)
