"""Hessians through other libraries, each by its own public interface and in its natural mode.

All of them differentiate `nn.Parameter`s only, so the running statistics of batch normalisation stay fixed; vectors
are dense. The network is in evaluation mode. What a library can share between the vectors of a batch, it shares.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.support.memory import columns_that_fit
from benchmarks.support.problems import Problem

PACKAGES = {"curvlinops": "curvlinops", "PyHessian": "pyhessian", "BackPACK": "backpack"}


def installed(peer: str) -> bool:
    """True if a peer can be imported."""
    return importlib.util.find_spec(PACKAGES[peer]) is not None


def missing_peers(among: Iterable[str] = PACKAGES) -> list[str]:
    """Notes on those of some peers that are not installed."""
    return [
        f"{peer} is not installed, so its rows are missing: pip install lmc-curvature[backends]."
        for peer in among
        if not installed(peer)
    ]


def peer_products(peer: str) -> Callable[[Problem, Tensor], Tensor]:
    """The function that multiplies a problem's Hessian, on its first batch, with each row of a matrix."""
    return {"curvlinops": _curvlinops, "PyHessian": _pyhessian, "BackPACK": _backpack}[peer]


def layouts(problem: Problem, *, both: bool) -> dict[str, Problem]:
    """Suffixes of roads' names, and the problem for each: as it is and, if `both`, with channels-last images."""
    problem = problem.for_peers
    return {"": problem, ", channels-last": problem.channels_last()} if both else {"": problem}


def curvlinops_hessian(problem: Problem, parameters: Sequence[nn.Parameter] | None = None) -> Any:
    """The operator of curvlinops over all batches, without its probes for determinism."""
    from curvlinops import HessianLinearOperator

    parameters = problem.parameters if parameters is None else parameters
    return HessianLinearOperator(
        problem.model,
        nn.CrossEntropyLoss(),
        list(parameters),
        list(problem.batches),
        check_deterministic=False,
        num_data=problem.examples,
    )


def curvlinops_columns(operator: Any, vectors: Tensor, at_once: int) -> Tensor:
    """Products of an operator of curvlinops with the rows of `vectors`, `at_once` at a time."""
    return torch.cat([(operator @ part.T.contiguous()).T for part in vectors.split(at_once)])


def curvlinops_at_once(operator: Any, vectors: Tensor, *, probe: int = 2) -> tuple[int, Callable[[], Tensor]]:
    """The number of rows of `vectors` that fit into memory at once, and the function that multiplies all of them."""
    at_once = columns_that_fit(
        lambda count: curvlinops_columns(operator, vectors[:count], count), len(vectors), vectors.device, probe=probe
    )
    return at_once, lambda: curvlinops_columns(operator, vectors, at_once)


def curvlinops_dense(
    problem: Problem, parameters: Iterable[nn.Parameter], *, probe: int
) -> tuple[int, Callable[[], Tensor]]:
    """The number of columns that fit at once, and the function that makes the dense Hessian in some parameters."""
    parameters = list(parameters)
    unit = torch.eye(sum(parameter.numel() for parameter in parameters), device=problem.device)
    return curvlinops_at_once(curvlinops_hessian(problem, parameters), unit, probe=probe)


def pyhessian_hessian(problem: Problem) -> Any:
    """PyHessian's object for the first batch, whose gradient it keeps as a graph."""
    from pyhessian import hessian

    with warnings.catch_warnings():
        # It differentiates by backward(create_graph=True), of which torch warns.
        warnings.simplefilter("ignore")
        return hessian(problem.model, nn.CrossEntropyLoss(), data=problem.data, cuda=problem.device.type == "cuda")


def pyhessian_eigenvectors(problem: Problem, count: int, iterations: int, tolerance: float) -> Tensor:
    """The eigenvectors of PyHessian's power iteration as columns, (parameters, count)."""
    torch.manual_seed(0)
    _, vectors = pyhessian_hessian(problem).eigenvalues(maxIter=iterations, tol=tolerance, top_n=count)
    problem.model.zero_grad(set_to_none=True)
    return torch.stack([_flat(vector) for vector in vectors], dim=1)


def pyhessian_density_error(problem: Problem) -> str:
    """The error that PyHessian's density ends with; empty if it works."""
    try:
        pyhessian_hessian(problem).density(iter=2, n_v=1)
    except (AttributeError, RuntimeError) as error:
        return str(error)
    finally:
        problem.model.zero_grad(set_to_none=True)
    return ""


def curvlinops_density(operator: Any, *, probes: int, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A grid, and the density there that curvlinops's Lanczos quadrature gives."""
    from curvlinops import lanczos_approximate_spectrum

    torch.manual_seed(seed)
    grid, density = (
        torch.as_tensor(values).detach().cpu().numpy()
        for values in lanczos_approximate_spectrum(operator, steps, num_repeats=probes)
    )
    return grid, density


def _curvlinops(problem: Problem, vectors: Tensor) -> Tensor:
    operator = curvlinops_hessian(problem)
    return torch.stack([operator @ vector for vector in vectors])


def _pyhessian(problem: Problem, vectors: Tensor) -> Tensor:
    from pyhessian.utils import hessian_vector_product

    kept = pyhessian_hessian(problem)
    products = [_flat(hessian_vector_product(kept.gradsH, kept.params, v)) for v in _as_lists(problem, vectors)]
    # The parameters hold gradients that hold the graph that holds the parameters.
    problem.model.zero_grad(set_to_none=True)
    return torch.stack(products)


def _backpack(problem: Problem, vectors: Tensor) -> Tensor:
    from backpack.hessianfree.hvp import hessian_vector_product

    x, y = problem.data
    loss = F.cross_entropy(problem.model(x), y)
    shared = torch.autograd.grad(loss, problem.parameters, create_graph=True)
    products = [
        _flat(hessian_vector_product(loss, problem.parameters, v, grad_params=shared))
        for v in _as_lists(problem, vectors)
    ]
    return torch.stack(products)


def _as_lists(problem: Problem, vectors: Tensor) -> list[list[Tensor]]:
    sizes = [parameter.numel() for parameter in problem.parameters]
    return [
        [part.view(parameter.shape) for part, parameter in zip(row.split(sizes), problem.parameters, strict=True)]
        for row in vectors
    ]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
