"""Time for eigenvalues to a stated residual, and for a spectral density to a stated accuracy.

The ten largest eigenvalues of a small residual network, in its parameters, after a few epochs on handwritten digits:
ours, SciPy's `eigsh` on ours and on curvlinops, eager and compiled, and PyHessian. Its spectral density: ours and
curvlinops. Every road's eigenpairs are held against the same Hessian in float64, and so is every density against its
eigenvalues.

With `--network`, eigenvalues only, of a larger network on random images: there no density can be held against all
eigenvalues, and PyHessian is tried with its defaults alone, in the layout of images that it is faster in.

    python -m benchmarks.spectrum [--network resnet20] [--batch 128] [--device cuda] [--quick]
"""

import argparse
import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from scipy.stats import wasserstein_distance
from torch import Tensor

from benchmarks.support import compilation, options, peers, timing
from benchmarks.support.charts import draw_roads
from benchmarks.support.problems import Problem, digits_problem, image_problem, mlp_problem
from benchmarks.support.report import Bar, Report, new_report, publish
from benchmarks.support.roads import eager_forward, road_row
from lmc_curvature import HessianOperator, spectral_density, top_eigenpairs
from lmc_curvature.errors import ConvergenceWarning

RESIDUAL = 1e-3
ACCURACY = 0.01
OURS = "top_eigenpairs"
OUR_DENSITY = "spectral_density"


@dataclass(frozen=True)
class Size:
    """Sizes of the problems, and efforts that a road may make.

    Attributes:
        network: Description of the network.
        examples: Examples in the one batch.
        width: Widths of the network for eigenvalues, and of the one for densities.
        epochs: Epochs of training; 0 for a perceptron with random weights and data.
        count: Number of eigenvalues.
        power: Iterations and tolerances of a power method to try, from cheap to exact.
        efforts: Probes and Lanczos steps to try for a density.
        images: Channels of a network by name, and pixels of its images.
    """

    network: str
    examples: int
    width: tuple[int, int]
    epochs: int
    count: int
    power: tuple[tuple[int, float], ...]
    efforts: tuple[tuple[int, int], ...]
    images: tuple[int, int] = (16, 32)


_EFFORTS = tuple((probes, steps) for steps in (16, 32, 64, 128) for probes in (1, 2, 4, 8))
# The first is PyHessian's own.
_POWER = ((100, 1e-3), (1000, 1e-5), (1000, 1e-6), (3000, 1e-7), (3000, 0.0))
_DIGITS = "residual, 8 layers, for 8 × 8 digits"
SIZES = {
    "full": Size(_DIGITS, 512, (8, 4), 3, 10, _POWER, _EFFORTS),
    "quick": Size(_DIGITS, 128, (4, 2), 2, 10, ((100, 1e-3), (300, 1e-6)), _EFFORTS),
    "smoke": Size("perceptron", 16, (4, 4), 0, 2, ((30, 1e-3),), ((1, 16),), (2, 8)),
}
SEEDS = range(3)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Eigenvectors as columns, (n, k), and the products they took where that is known."""

    vectors: Tensor
    products: int | None = None


@dataclass(frozen=True, eq=False)
class Nodes:
    """A discrete measure: its points and their weights."""

    nodes: np.ndarray
    weights: np.ndarray


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    chosen = options.parse_options(__file__, __doc__, argv, options.add_network)
    size = SIZES[chosen.size]
    if chosen.network:
        size = dataclasses.replace(size, network=chosen.network, examples=chosen.batch or 128, power=_POWER[:1])
        width, pixels = size.images
        problem = image_problem(
            size.network, size.examples, width=width, pixels=pixels, device=chosen.device, away_from_kinks=True
        )
        report = _report(chosen, size, "What do eigenvalues of equal accuracy cost?", f"{problem.parameter_count:,}")
        found = add_eigenvalues(report, problem, size, chosen.pace, **_extent(chosen))
        return publish(report, chosen, draw_roads(found, [OURS], "forward passes"))
    problem, small = (problem_of(size, width, chosen.device) for width in size.width)
    parameters = f"{problem.parameter_count:,} for eigenvalues and {small.parameter_count:,} for densities"
    report = _report(chosen, size, "What do eigenvalues and densities of equal accuracy cost?", parameters)
    found = add_eigenvalues(report, problem, size, chosen.pace, **_extent(chosen))
    found |= add_densities(report, small, size, chosen.pace)
    return publish(report, chosen, draw_roads(found, [OURS, OUR_DENSITY], "forward passes"))


def _extent(chosen: argparse.Namespace) -> dict[str, bool]:
    return {"both_layouts": chosen.size == "full", "compiles": chosen.size == "full"}


def _report(chosen: argparse.Namespace, size: Size, question: str, parameters: str) -> Report:
    setting = {"network": size.network, "examples": size.examples, "parameters": parameters, "dtype": "float32"}
    return new_report(chosen, question, **setting)


def problem_of(size: Size, width: int, device: torch.device) -> Problem:
    """The problem of a size, with a network of some width."""
    if size.epochs:
        return digits_problem(size.examples, width=width, epochs=size.epochs, device=device)
    return mlp_problem(width, size.examples, device=device)


def add_eigenvalues(
    report: Report,
    problem: Problem,
    size: Size,
    pace: timing.Pace,
    *,
    both_layouts: bool = False,
    compiles: bool = False,
) -> dict[str, timing.Measurement]:
    """Measure eigenvalues by every road, and add their table, bars and notes to a report.

    Args:
        report: The report.
        problem: The problem.
        size: Number of eigenvalues, and what PyHessian tries.
        pace: Number and length of samples.
        both_layouts: Time peers with channels-last images, too.
        compiles: Compile curvlinops' product.

    Returns:
        Measurements by name.
    """
    report.notes += [
        *peers.missing_peers(),
        f"Residuals are ‖Hv − θv‖ / |θ| with H in float64 and θ = vᵀHv, the worst of the {size.count}; the asked one "
        f"is {RESIDUAL:g}. Errors are of θ, relative, against eigenvalues computed in float64.",
        "PyHessian stops where an eigenvalue estimate changes little, which is no residual: its rows are its defaults, "
        "and the first setting tried that reached the residual, or else the last one.",
        "Memory is what torch's allocator gave; the workspace of ARPACK is not among it.",
    ]
    roads = eigenvalue_roads(problem, size, both_layouts=both_layouts)
    name = "SciPy's eigsh on curvlinops' product, compiled"
    compiled, notes = compilation.compiled_roads(
        {name: lambda: _compiled_road(name, problem, size.count)}, left_out=not compiles
    )
    report.notes += notes
    found = timing.measure([*roads, *compiled], pace, problem.device)
    operator = problem.to(torch.float64).parameter_hessian
    exact = top_eigenpairs(operator, size.count, tolerance=1e-6).values
    rows = {}
    for name, measurement in found.items():
        if not isinstance(measurement.result, Pairs):
            rows[name] = road_row(measurement, problem)
            continue
        values, residuals = _residuals(operator, measurement.result.vectors)
        rows[name] = {
            **road_row(measurement, problem, error=float(((values - exact) / exact).abs().max())),
            "residual": float(residuals.max()),
            "products": measurement.result.products,
        }
    forwards = timing.measure(eager_forward(problem), pace, problem.device)
    eager = [road_row(measurement, problem) for measurement in forwards.values()]
    report.add("eigenvalues", f"The {size.count} largest eigenvalues", [*rows.values(), *eager])
    report.bars += _bars(found, {name: row["residual"] for name, row in rows.items() if "residual" in row})
    return found


def eigenvalue_roads(problem: Problem, size: Size, *, both_layouts: bool = False) -> list[timing.Road]:
    """Roads to the largest eigenvalues, those of peers in one layout of images or in both."""
    operator, count = problem.parameter_hessian, size.count
    roads = [
        timing.Road(
            OURS,
            lambda: _ours(operator, count, None),
            problem.forward,
            warms_up=True,
            memory_run=lambda: _ours(operator, count, 60),
        ),
        _eigsh_road("SciPy's eigsh on HessianOperator.to_scipy()", operator.to_scipy(), problem, count),
    ]
    for layout, laid_out in peers.layouts(problem, both=both_layouts).items():
        if peers.installed("curvlinops"):
            peer = peers.curvlinops_hessian(laid_out).to_scipy()
            roads.append(_eigsh_road(f"SciPy's eigsh on curvlinops{layout}", peer, problem, count))
        if peers.installed("PyHessian") and (len(size.power) > 1 or not layout):
            roads += _pyhessian_roads(problem, laid_out, size, layout)
    return roads


def _ours(operator: HessianOperator, count: int, max_products: int | None) -> Pairs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = top_eigenpairs(operator, count, tolerance=RESIDUAL, max_products=max_products)
    return Pairs(found.vectors, found.products)


def _eigsh_road(name: str, operator: Any, problem: Problem, count: int) -> timing.Road:
    settings: Any = {"k": count, "which": "LA", "tol": RESIDUAL}

    def run() -> Pairs:
        return Pairs(torch.from_numpy(eigsh(operator, **settings)[1]))

    def briefly() -> None:
        with contextlib.suppress(ArpackNoConvergence):
            eigsh(operator, **settings, maxiter=1)

    return timing.Road(name, run, problem.forward, memory_run=briefly)


def _compiled_road(name: str, problem: Problem, count: int) -> timing.Road:
    """SciPy's on the compiled product of curvlinops."""
    compiled = compilation.compiled_product(problem, torch.randn(problem.parameter_count, device=problem.device))

    def product(vector: np.ndarray) -> np.ndarray:
        flat = torch.from_numpy(vector.ravel()).to(problem.device, torch.float32)
        return compiled.run(flat).cpu().numpy()

    shape: Any = (problem.parameter_count,) * 2
    operator: Any = LinearOperator(shape, matvec=product, dtype=np.float32)
    return dataclasses.replace(_eigsh_road(name, operator, problem, count), note=compiled.note)


def _pyhessian_roads(problem: Problem, laid_out: Problem, size: Size, layout: str) -> list[timing.Road]:
    """Its defaults, and the first setting that reaches the residual, on the problem in some layout of images."""
    operator = problem.to(torch.float64).parameter_hessian
    reached = size.power[0]
    for reached in size.power if len(size.power) > 1 else ():
        vectors = peers.pyhessian_eigenvectors(laid_out, size.count, *reached)
        if _residuals(operator, vectors)[1].max() <= RESIDUAL:
            break
    return [
        _pyhessian_road(problem, laid_out, size.count, iterations, tolerance, layout)
        for iterations, tolerance in dict.fromkeys([size.power[0], reached])
    ]


def _pyhessian_road(
    problem: Problem, laid_out: Problem, count: int, iterations: int, tolerance: float, layout: str
) -> timing.Road:
    return timing.Road(
        f"PyHessian, maxIter={iterations}, tol={tolerance:g}{layout}",
        lambda: Pairs(peers.pyhessian_eigenvectors(laid_out, count, iterations, tolerance)),
        problem.forward,
        memory_run=lambda: peers.pyhessian_eigenvectors(laid_out, count, 2, tolerance),
    )


def _residuals(operator: HessianOperator, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients of some vectors, decreasing, and their relative residuals."""
    vectors = vectors.detach().to(operator.device, torch.float64)
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=0)
    products = operator @ vectors
    values = (vectors * products).sum(0)
    residuals = torch.linalg.vector_norm(products - values * vectors, dim=0) / values.abs()
    values, order = values.sort(descending=True)
    return values, residuals[order]


def _bars(found: Mapping[str, timing.Measurement], residuals: Mapping[str, float]) -> list[Bar]:
    ours = found[OURS]
    if OURS not in residuals:
        return []
    bars = [Bar("worst residual of ours", residuals[OURS], "at most", RESIDUAL)]
    for peer in ("SciPy's eigsh on curvlinops", "PyHessian"):
        names = [name for name in residuals if name.startswith(peer)]
        exact = [name for name in names if residuals[name] <= RESIDUAL]
        # The fastest that is exact enough; if none is, the last one, which tried hardest.
        for name in [min(exact, key=lambda name: found[name].time.median)] if exact else names[-1:]:
            reached = "" if exact else ", which is less exact"
            ratio = ours.time.over(found[name].time)
            bars.append(Bar(f"eigenvalues: seconds of ours / of {name}{reached}", ratio, "at most", 1.0))
    return bars


DensityRun = Callable[[int, int, int], Nodes]


def add_densities(report: Report, problem: Problem, size: Size, pace: timing.Pace) -> dict[str, timing.Measurement]:
    """Measure each road to a density at its cheapest effort that is accurate enough; add their table, bar and note."""
    report.notes.append(
        f"Densities: the cheapest effort tried whose Wasserstein-1 distance from the exact spectral measure is, on "
        f"average over {len(SEEDS)} seeds, at most {ACCURACY:.0%} of the spectrum's width."
    )
    exact = torch.linalg.eigvalsh(problem.to(torch.float64).parameter_hessian.to_dense()).cpu().numpy()
    efforts, roads = {}, []
    for name, run in _density_runs(problem).items():
        probes, steps, distance = _cheapest_effort(run, size.efforts, exact)
        efforts[name] = {"accuracy": distance, "effort": f"{probes} × {steps}"}
        work, briefly = (functools.partial(run, probes, number, 0) for number in (steps, min(steps, 8)))
        roads.append(timing.Road(name, work, problem.forward, memory_run=briefly))
    found = timing.measure(roads, pace, problem.device)
    rows: list[dict[str, Any]] = [{**road_row(found[name], problem), **effort} for name, effort in efforts.items()]
    if peers.installed("PyHessian"):
        error = peers.pyhessian_density_error(problem).partition(". ")[0]
        note = f"fails: {error}" if error else "works, but is not timed here"
        rows.append({"road": "PyHessian, density", "note": note})
    report.add("densities", f"A spectral density to {ACCURACY:.0%} of the width", rows)
    accuracy = efforts[OUR_DENSITY]["accuracy"]
    report.bars.append(Bar("density of ours: Wasserstein-1 / width", accuracy, "at most", ACCURACY))
    return found


def _cheapest_effort(run: DensityRun, efforts: Sequence[tuple[int, int]], exact: np.ndarray) -> tuple[int, int, float]:
    """Probes, steps and accuracy: of the efforts that are accurate enough, the one with the fewest products."""
    distance, tried = float("nan"), efforts[0]
    for tried in sorted(efforts, key=lambda effort: effort[0] * effort[1]):
        distance = float(np.mean([_distance(run(*tried, seed), exact) for seed in SEEDS]))
        if distance <= ACCURACY:
            break
    return *tried, distance


def _distance(found: Nodes, exact: np.ndarray) -> float:
    """Wasserstein-1 distance from the exact spectral measure, over the width of the spectrum."""
    distance = wasserstein_distance(found.nodes, exact, found.weights)
    return float(distance / (exact.max() - exact.min()))


def _density_runs(problem: Problem) -> dict[str, DensityRun]:
    operator = problem.parameter_hessian

    def ours(probes: int, steps: int, seed: int) -> Nodes:
        found = spectral_density(operator, probes=probes, steps=steps, seed=seed)
        return Nodes(found.nodes.ravel(), found.weights.ravel() / len(found.weights))

    runs: dict[str, DensityRun] = {OUR_DENSITY: ours}
    if peers.installed("curvlinops"):
        peer = peers.curvlinops_hessian(problem)

        def theirs(probes: int, steps: int, seed: int) -> Nodes:
            grid, density = peers.curvlinops_density(peer, probes=probes, steps=steps, seed=seed)
            return Nodes(grid, density.clip(min=0))

        runs["curvlinops, lanczos_approximate_spectrum"] = theirs
    return runs


if __name__ == "__main__":
    main()
