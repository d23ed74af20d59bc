"""How long do the ten largest eigenvalues take to a stated residual, and a spectral density to a stated accuracy?

The Hessian is that of a small residual network in its parameters, after a few epochs on handwritten digits. Every
road's eigenpairs are held against the same Hessian in float64, and so is every density against its eigenvalues.

With `--network`, eigenvalues only, of a larger network on random images: there no density can be held against all
eigenvalues, and PyHessian is tried with its defaults alone, in the layout of images that it is faster in.

    python -m benchmarks.spectrum [--network resnet20] [--batch 128] [--device cuda] [--quick]
"""

import argparse
import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from scipy.stats import wasserstein_distance
from torch import Tensor

from benchmarks.support.charts import draw_roads
from benchmarks.support.harness import (
    Bar,
    Column,
    Report,
    Table,
    add_network,
    parse_options,
    publish,
    road_row,
    setting,
)
from benchmarks.support.memory import peak_bytes
from benchmarks.support.peers import curvlinops_hessian, installed, layouts, missing_peers, pyhessian_hessian
from benchmarks.support.problems import Problem, digits_problem, image_problem, mlp_problem, parameters_only
from benchmarks.support.timing import Measurement, Road, Spread, measure
from lmc_curvature import HessianOperator
from lmc_curvature.curvature.spectra.density import spectral_density
from lmc_curvature.curvature.spectra.eigenpairs import top_eigenpairs
from lmc_curvature.errors import ConvergenceWarning

RESIDUAL = 1e-3
ACCURACY = 0.01
OURS = "top_eigenpairs"
OUR_DENSITY = "spectral_density"


@dataclass(frozen=True)
class Size:
    """Of the problems, and how much a road may spend.

    Attributes:
        network: What it is.
        examples: In the one batch.
        width: Of the network for eigenvalues, and of the one for densities.
        epochs: Of training; 0 for a perceptron with random weights and data.
        count: Eigenvalues.
        power: Iterations and tolerances of a power method to try, from cheap to exact.
        efforts: Probes and Lanczos steps to try for a density, in this order.
    """

    network: str
    examples: int
    width: tuple[int, int]
    epochs: int
    count: int
    power: tuple[tuple[int, float], ...]
    efforts: tuple[tuple[int, int], ...]


_EFFORTS = tuple((probes, steps) for steps in (16, 32, 64, 128) for probes in (1, 2, 4, 8))
# The first is PyHessian's own.
_POWER = ((100, 1e-3), (1000, 1e-5), (1000, 1e-6), (3000, 1e-7), (3000, 0.0))
_DIGITS = "residual, 8 layers, for 8 × 8 digits"
SIZES = {
    "full": Size(_DIGITS, 512, (8, 4), 3, 10, _POWER, _EFFORTS),
    "quick": Size(_DIGITS, 128, (4, 2), 2, 10, ((100, 1e-3), (300, 1e-6)), _EFFORTS),
    "smoke": Size("perceptron", 16, (4, 4), 0, 2, ((30, 1e-3),), ((1, 16),)),
}
SEEDS = range(3)

EIGENVALUE_COLUMNS = (
    Column("road", "road"),
    Column("seconds", "seconds [quartiles]"),
    Column("F", "F [quartiles]"),
    Column("residual", "worst residual", 2),
    Column("error", "worst error", 2),
    Column("products", "products"),
    Column("peak_mib", "peak, MiB"),
    Column("peak_gradients", "peak / gradient's", 2),
    Column("samples", "samples"),
    Column("note", "note"),
)
DENSITY_COLUMNS = (
    Column("road", "road"),
    Column("seconds", "seconds [quartiles]"),
    Column("F", "F [quartiles]"),
    Column("accuracy", "Wasserstein-1 / width", 2),
    Column("effort", "probes × steps"),
    Column("peak_mib", "peak, MiB"),
    Column("peak_gradients", "peak / gradient's", 2),
    Column("samples", "samples"),
    Column("note", "note"),
)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Eigenvectors as columns, (n, k), and the products they took where that is known."""

    vectors: Tensor
    products: int | None = None


@dataclass(frozen=True, eq=False)
class Nodes:
    """A discrete measure."""

    nodes: np.ndarray
    weights: np.ndarray


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    options = parse_options(__file__, __doc__, argv, add_network)
    size: Size = SIZES[options.size]
    if options.network:
        return _of_eigenvalues(options, size)
    problems = [_problem(size, width, options.device) for width in size.width]
    counts = [sum(parameter.numel() for parameter in problem.parameters) for problem in problems]
    report = Report(
        "spectrum",
        "What do eigenvalues and densities of equal accuracy cost?",
        setting(
            options,
            network=size.network,
            examples=size.examples,
            parameters=f"{counts[0]:,} for eigenvalues and {counts[1]:,} for densities",
            dtype="float32",
        ),
    )
    report.notes += [*missing_peers(), *_notes(size.count), *_density_notes()]
    eigen = _add_eigenvalues(report, problems[0], size, options)
    densities = _density_roads_to_accuracy(problems[1], size)
    found = measure([road for road, _, _ in densities], options.pace, options.device)
    report.tables.append(_density_table(problems[1], densities, found))
    distance = float(report.tables[1].rows[0]["accuracy"])
    report.bars.append(Bar("density of ours: Wasserstein-1 / width", Spread(*[distance] * 3), "at most", ACCURACY))
    return publish(report, options, draw_roads({**eigen, **found}, [OURS, OUR_DENSITY], "forward passes"))


def _of_eigenvalues(options: argparse.Namespace, size: Size) -> Report:
    """The report for a network that the command line names."""
    size = dataclasses.replace(size, network=options.network, examples=options.batch or 128, power=_POWER[:1])
    problem = image_problem(size.network, size.examples, device=options.device, away_from_kinks=True)
    report = Report(
        f"spectrum-{size.network}",
        "What do eigenvalues of equal accuracy cost?",
        setting(
            options,
            network=size.network,
            examples=size.examples,
            parameters=f"{sum(parameter.numel() for parameter in problem.parameters):,}",
            dtype="float32",
        ),
    )
    report.notes += [*missing_peers(), *_notes(size.count)]
    eigen = _add_eigenvalues(report, problem, size, options)
    return publish(report, options, draw_roads(eigen, [OURS], "forward passes"))


def _add_eigenvalues(
    report: Report, problem: Problem, size: Size, options: argparse.Namespace
) -> dict[str, Measurement]:
    """Measure, and add the table and its bars."""
    roads = eigenvalue_roads(problem, size, both_layouts=options.size == "full")
    eigen = measure(roads, options.pace, options.device)
    report.tables.append(_eigenvalue_table(problem, size.count, eigen))
    report.bars += _bars(report, eigen)
    return eigen


def _problem(size: Size, width: int, device: torch.device) -> Problem:
    if size.epochs:
        return digits_problem(size.examples, width=width, epochs=size.epochs, device=device)
    return mlp_problem(width, size.examples, device=device)


def _notes(count: int) -> list[str]:
    return [
        f"Residuals are ‖Hv − θv‖ / |θ| with H in float64 and θ = vᵀHv, the worst of the {count}; the asked one is "
        f"{RESIDUAL:g}. Errors are of θ, relative, against eigenvalues computed in float64.",
        "PyHessian stops where an eigenvalue estimate changes little, which is no residual: its rows are its defaults, "
        "and the first setting tried that reached the residual, or else the last one.",
        "Memory is what torch's allocator gave; the workspace of ARPACK is not among it.",
    ]


def _density_notes() -> list[str]:
    return [
        f"Densities: the cheapest effort tried whose Wasserstein-1 distance from the exact spectral measure is, on "
        f"average over {len(SEEDS)} seeds, at most {ACCURACY:.0%} of the spectrum's width.",
    ]


def operator_of(problem: Problem) -> HessianOperator:
    """The Hessian in the parameters alone, which is the one that peers multiply with."""
    return HessianOperator(problem.objective, layers="parameters", partition=parameters_only)


def eigenvalue_roads(problem: Problem, size: Size, *, both_layouts: bool = False) -> list[Road]:
    """Roads to the largest eigenvalues, those of peers in one layout of images or in both."""
    operator, count = operator_of(problem), size.count
    roads = [
        Road(
            OURS,
            lambda: _ours(operator, count, None),
            problem.forward,
            memory_run=lambda: _ours(operator, count, 60),
        ),
        _eigsh_road("SciPy's eigsh on HessianOperator.to_scipy()", operator.to_scipy(), problem, count),
    ]
    for layout, chosen in layouts(problem, both=both_layouts).items():
        if installed("curvlinops"):
            peer = curvlinops_hessian(chosen).to_scipy()
            roads.append(_eigsh_road(f"SciPy's eigsh on curvlinops{layout}", peer, problem, count))
        if installed("PyHessian") and (len(size.power) > 1 or not layout):
            roads += _pyhessian_roads(problem, chosen, size, layout)
    return roads


def _ours(operator: HessianOperator, count: int, max_products: int | None) -> Pairs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = top_eigenpairs(operator, count, tolerance=RESIDUAL, max_products=max_products)
    return Pairs(found.vectors, found.products)


def _eigsh_road(name: str, operator: Any, problem: Problem, count: int) -> Road:
    chosen: Any = {"k": count, "which": "LA", "tol": RESIDUAL}

    def run() -> Pairs:
        return Pairs(torch.from_numpy(eigsh(operator, **chosen)[1]))

    def briefly() -> None:
        with contextlib.suppress(ArpackNoConvergence):
            eigsh(operator, **chosen, maxiter=1)

    return Road(name, run, problem.forward, memory_run=briefly)


def _pyhessian_roads(problem: Problem, chosen: Problem, size: Size, layout: str) -> list[Road]:
    """Its defaults, and the first setting that reaches the residual, on a problem as it was chosen to lie in memory."""
    operator = operator_of(problem.to(torch.float64))
    reached = size.power[0]
    for reached in size.power if len(size.power) > 1 else ():
        found = _pyhessian(chosen, size.count, *reached)
        if _residuals(operator, found.vectors)[1].max() <= RESIDUAL:
            break
    settings = dict.fromkeys([size.power[0], reached])
    return [_pyhessian_road(problem, chosen, size.count, *setting, layout) for setting in settings]


def _pyhessian_road(
    problem: Problem, chosen: Problem, count: int, iterations: int, tolerance: float, layout: str
) -> Road:
    return Road(
        f"PyHessian, maxIter={iterations}, tol={tolerance:g}{layout}",
        lambda: _pyhessian(chosen, count, iterations, tolerance),
        problem.forward,
        memory_run=lambda: _pyhessian(chosen, count, 2, tolerance),
    )


def _pyhessian(problem: Problem, count: int, iterations: int, tolerance: float) -> Pairs:
    torch.manual_seed(0)
    peer = pyhessian_hessian(problem)
    _, vectors = peer.eigenvalues(maxIter=iterations, tol=tolerance, top_n=count)
    problem.model.zero_grad(set_to_none=True)
    return Pairs(torch.stack([torch.cat([part.detach().flatten() for part in vector]) for vector in vectors], dim=1))


def _residuals(operator: HessianOperator, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients of some vectors, decreasing, and the relative residuals."""
    vectors = vectors.detach().to(operator.device, torch.float64)
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=0)
    products = operator @ vectors
    values = (vectors * products).sum(0)
    residuals = torch.linalg.vector_norm(products - values * vectors, dim=0) / values.abs()
    values, order = values.sort(descending=True)
    return values, residuals[order]


def _eigenvalue_table(problem: Problem, count: int, found: dict[str, Measurement]) -> Table:
    operator = operator_of(problem.to(torch.float64))
    exact = top_eigenpairs(operator, count, tolerance=1e-6).values
    gradient_peak = peak_bytes(problem.forward_backward, problem.device)
    rows = []
    for measurement in found.values():
        values, residuals = _residuals(operator, measurement.result.vectors)
        rows.append(
            {
                **_road_row(measurement, gradient_peak),
                "residual": float(residuals.max()),
                "error": float(((values - exact) / exact).abs().max()),
                "products": measurement.result.products,
            }
        )
    return Table("eigenvalues", f"The {count} largest eigenvalues", EIGENVALUE_COLUMNS, rows)


def _road_row(measurement: Measurement, gradient_peak: float) -> dict[str, Any]:
    return {**road_row(measurement, gradient_peak=gradient_peak), "seconds": measurement.time}


DensityRun = Callable[[int, int, int], Nodes]


def _density_roads_to_accuracy(problem: Problem, size: Size) -> list[tuple[Road, float, str]]:
    """Each road at the cheapest effort that is accurate enough, its accuracy, and the effort."""
    exact = torch.linalg.eigvalsh(operator_of(problem.to(torch.float64)).to_dense()).cpu().numpy()
    roads = []
    for name, run in _density_runs(problem).items():
        probes, steps, distance = _cheapest_effort(run, size.efforts, exact)
        work = functools.partial(run, probes, steps, 0)
        road = Road(name, work, problem.forward, memory_run=functools.partial(run, probes, min(steps, 8), 0))
        roads.append((road, distance, f"{probes} × {steps}"))
    return roads


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
    operator = operator_of(problem)

    def ours(probes: int, steps: int, seed: int) -> Nodes:
        found = spectral_density(operator, probes=probes, steps=steps, seed=seed)
        return Nodes(found.nodes.ravel(), found.weights.ravel() / len(found.weights))

    runs: dict[str, DensityRun] = {OUR_DENSITY: ours}
    if installed("curvlinops"):
        from curvlinops import lanczos_approximate_spectrum

        peer = curvlinops_hessian(problem)

        def theirs(probes: int, steps: int, seed: int) -> Nodes:
            torch.manual_seed(seed)
            grid, density = lanczos_approximate_spectrum(peer, steps, num_repeats=probes)
            return Nodes(_array(grid), _array(density).clip(min=0))

        runs["curvlinops, lanczos_approximate_spectrum"] = theirs
    return runs


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _density_table(problem: Problem, roads: Sequence[tuple[Road, float, str]], found: dict[str, Measurement]) -> Table:
    gradient_peak = peak_bytes(problem.forward_backward, problem.device)
    rows: list[dict[str, Any]] = [
        {**_road_row(found[road.name], gradient_peak), "accuracy": distance, "effort": effort}
        for road, distance, effort in roads
    ]
    if installed("PyHessian"):
        rows.append({"road": "PyHessian, density", "note": _why_pyhessian_has_no_density(problem)})
    return Table("densities", f"A spectral density to {ACCURACY:.0%} of the width", DENSITY_COLUMNS, rows)


def _why_pyhessian_has_no_density(problem: Problem) -> str:
    """The error that its density ends with."""
    try:
        pyhessian_hessian(problem).density(iter=2, n_v=1)
    except (AttributeError, RuntimeError) as error:
        return f"fails: {str(error).partition('. ')[0]}"
    finally:
        problem.model.zero_grad(set_to_none=True)
    return "works, but is not timed here"


def _bars(report: Report, eigen: dict[str, Measurement]) -> list[Bar]:
    ours = eigen[OURS]
    rows = {str(row["road"]): row for row in report.tables[0].rows}
    worst = float(rows[OURS]["residual"])
    bars = [Bar("worst residual of ours", Spread(worst, worst, worst), "at most", RESIDUAL)]
    for peer in ("SciPy's eigsh on curvlinops", "PyHessian"):
        names = [name for name in eigen if name.startswith(peer)]
        exact = [name for name in names if float(rows[name]["residual"]) <= RESIDUAL]
        # The fastest that is exact enough; if none is, the last one, which tried hardest.
        for name in [min(exact, key=lambda name: eigen[name].time.median)] if exact else names[-1:]:
            reached = "" if exact else ", which is less exact"
            ratio = ours.time.over(eigen[name].time)
            bars.append(Bar(f"eigenvalues: seconds of ours / of {name}{reached}", ratio, "at most", 1.0))
    return bars


if __name__ == "__main__":
    main()
