"""Everything that a GPU is needed for, in one command and a given time, for a machine that is at hand for minutes.

Sections follow one another, the most important first; each has a share of the seconds that are left, is skipped where
too few are, and writes its own JSON, Markdown and figure to `--out` as it ends. After every section the overview, files
`on_gpu`, is written anew, with all bars so far. So a run that is cut short keeps what it has; an error ends its section
alone, and is in the overview. Peers are compiled in processes of their own, from the start.

It needs Python 3.11 or newer, torch 2.11 or newer, NumPy, SciPy, matplotlib, pandas, rich, tqdm, psutil, filelock,
jaxtyping, safetensors and lazy-loader. What else is missing costs rows, and the overview says which: torchvision (of
torch's release) the projection of ResNet-18, scikit-learn the spectra, pydantic and PyYAML the training of siblings,
pytest and hypothesis the tests, curvlinops, PyHessian and BackPACK their rows. The compiled product of curvlinops needs
none of them, but a C compiler for Triton. Wheels for a machine without a network, none of which brings a torch:

    export FOR='--dest wheels --python-version 3.12 --only-binary :all:'
    pip download $FOR jaxtyping safetensors lazy-loader psutil filelock tqdm rich pydantic pyyaml beartype
    pip download $FOR hypothesis pytest pandas matplotlib scikit-learn
    pip download $FOR --no-deps curvlinops-for-pytorch backpack-for-pytorch pyhessian torchvision==0.26.*
    pip download $FOR --no-deps einops einconv linear-operator opt-einsum unfoldNd mpmath

There, in the folder that holds `benchmarks/`:

    pip install --no-index --no-deps wheels/*.whl
    python -m benchmarks.on_gpu --seconds 480 --out runs/on_gpu [--only projection-resnet20 products]
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown
from torch.utils.benchmark.utils.timer import timer as clock

from benchmarks import hvp, hvp_vs_exact, language, projection, spectrum
from benchmarks.support import compilation, memory, options, profiling
from benchmarks.support.charts import draw_panels, draw_points, draw_roads
from benchmarks.support.elsewhere import Elsewhere, Makers
from benchmarks.support.problems import Problem, image_problem, language_problem, mlp_problem
from benchmarks.support.report import Bar, Report, new_report, text_of, write
from benchmarks.support.timing import PACES, Measurement, Pace, Spread, seconds_once
from lmc_curvature import measure_barrier, predict_barrier, project_hessian
from lmc_curvature.errors import LMCCurvatureError

ROOT = Path(__file__).parents[1]
# Of its share, what a section may take before it is interrupted.
_PATIENCE = 1.25
# Of its share, when a section begins nothing new: what it has begun is to end, and to be written.
_BEGINS = 0.7
# A section with less than this part of its share of all seconds left for it is skipped.
_LEAST = 0.3
# Processes that run tests.
_MOST_PROCESSES = 14
# Of the memory that is free, what a process that compiles may take: there are three beside this one.
_SHARE_OF_MEMORY = 0.2
_RESNET20 = {"network": "resnet20", "batch": 512, "width": 16, "pixels": 32}
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "resnet20": _RESNET20,
        "resnet18": {"network": "resnet18", "batch": 512, "pixels": 32},
        "gpt2": {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50257, "tokens": 512, "batch": 8},
        "vectors": 8,
        "widths": hvp_vs_exact.WIDTHS["full"],
        "examples": hvp_vs_exact.EXAMPLES["full"],
        "spectrum": dataclasses.replace(
            spectrum.SIZES["full"],
            power=spectrum.SIZES["full"].power[:1],
            efforts=tuple((probes, steps) for steps in (16, 32, 64) for probes in (1, 2, 4)),
        ),
        "images": 10_000,
        "budgets": (None, 1.0, 0.25),
        "tests": (),
    },
    "smoke": {
        "resnet20": {"network": "resnet8", "batch": 4, "width": 2, "pixels": 8},
        "resnet18": {"network": "resnet8", "batch": 4, "width": 4, "pixels": 8},
        "gpt2": language.SIZES["smoke"],
        "vectors": hvp.COUNTS["smoke"],
        "widths": hvp_vs_exact.WIDTHS["smoke"],
        "examples": hvp_vs_exact.EXAMPLES["smoke"],
        "spectrum": spectrum.SIZES["smoke"],
        "images": 10,
        "budgets": (None, 0.1),
        "tests": ("tests/curvature/spectra/test_trace.py",),
    },
}
# A road of more than the budget has its first call as its only sample: there are minutes, not hours.
PACES_HERE = {"full": Pace(3, 0.1, 1.5), "smoke": PACES["smoke"]}


class OutOfTime(BaseException):
    """A section has taken more than its share. Nothing that catches errors catches it."""


@dataclass
class Run:
    """What sections share.

    Attributes:
        chosen: The command line.
        size: Sizes of what is measured.
        ends: Time of the clock at which all must be over.
        elsewhere: Processes that compile peers, by section.
        problems: Problems with images, by network.
    """

    chosen: argparse.Namespace
    size: Mapping[str, Any]
    ends: float
    elsewhere: dict[str, Elsewhere] = field(default_factory=dict)
    problems: dict[str, Problem] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device that is measured."""
        return self.chosen.device

    @property
    def cuda(self) -> bool:
        """Whether that is a GPU."""
        return self.device.type == "cuda"

    def problem(self, network: str) -> Problem:
        """The problem with images of a network, made once."""
        if network not in self.problems:
            self.problems[network] = image_problem(**self.size[network], device=self.device, away_from_kinks=True)
        return self.problems[network]

    def pace(self, until: float) -> Pace:
        """Samples until a time of the clock."""
        return dataclasses.replace(PACES_HERE[self.chosen.size], until=until)

    def compiled(self, section: str, report: Report, until: float) -> dict[str, Measurement]:
        """What the process of a section measures; a note where there is none."""
        process = self.elsewhere.pop(section, None)
        found, notes = ({}, [compilation.LEFT_OUT]) if process is None else process.measured(until - clock())
        report.notes += notes
        return found


SectionRun = Callable[[Run, Report, float], Figure | None]


@dataclass(frozen=True)
class Section:
    """A part of the run.

    Attributes:
        name: Stem of its files, after `on_gpu-`.
        question: The question that it answers.
        seconds: What it is expected to take, of 480.
        run: Adds its findings to a report until a time of the clock, and returns a figure.
    """

    name: str
    question: str
    seconds: float
    run: SectionRun


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    chosen = options.parse_options(__file__, __doc__, argv, _add_options)
    if chosen.size == "quick":
        raise SystemExit("There is no quick run: give fewer --seconds, or --only some sections.")
    run = Run(chosen, SIZES[chosen.size], clock() + chosen.seconds)
    overview = new_report(chosen, "What does the library do on a GPU?", [], seconds=chosen.seconds)
    wanted = [section for section in SECTIONS if not chosen.only or section.name in chosen.only]
    rows: list[dict[str, Any]] = []
    overview.add("sections", "Sections", rows)
    try:
        if run.cuda:
            overview.notes += _start_compilers(run, [section.name for section in wanted])
        for number, section in enumerate(wanted):
            share = section.seconds / sum(later.seconds for later in wanted[number:])
            _run_section(run, section, share * (run.ends - clock()), overview, rows)
            write(overview, chosen.out)
    finally:
        for process in run.elsewhere.values():
            process.stop()
    write(overview, chosen.out, _bars_figure(overview))
    Console(width=None if sys.stdout.isatty() else 200).print(Markdown(text_of(overview)))
    return overview


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=480.0, help="that all sections may take together")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS], metavar="SECTION")
    # A plain call is for the GPU.
    parser.set_defaults(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _run_section(run: Run, section: Section, seconds: float, overview: Report, rows: list[dict[str, Any]]) -> None:
    """Run a section within some seconds, write what it has found, however it ends, and add it to the overview."""
    least = _LEAST * section.seconds * run.chosen.seconds / 480
    if seconds < least:
        rows.append({"section": section.name, "note": f"skipped: {seconds:.0f} s were left for it"})
        return
    report = Report(
        f"{overview.name}-{section.name}", section.question, dict(overview.setting), dict(overview.environment)
    )
    print(f"{section.name}: up to {seconds:.0f} s", flush=True)
    # Training chooses for itself, and for whoever comes after it.
    options.exactly_float32()
    begun, figure, note = clock(), None, ""
    try:
        with _at_most(min(_PATIENCE * seconds, run.ends - clock())), _warnings_noted(report):
            figure = section.run(run, report, begun + _BEGINS * seconds)
    except OutOfTime:
        note = "interrupted: it took longer than its share"
    except (Exception, SystemExit) as error:  # noqa: BLE001 (the others shall run)
        note = f"ended by {traceback.format_exception_only(error)[-1].strip().splitlines()[0]}"
        traceback.print_exc()
    rows.append({"section": section.name, "seconds": clock() - begun, "note": note})
    unmeasured = [bar for bar in report.bars if math.isnan(bar.spread.median)]
    report.notes += [f"A value is missing: {bar.what}." for bar in unmeasured]
    report.bars = [bar for bar in report.bars if bar not in unmeasured]
    overview.bars += [dataclasses.replace(bar, what=f"{section.name}: {bar.what}") for bar in report.bars]
    overview.notes += [said for said in report.notes if " missing" in said and said not in overview.notes]
    write(report, run.chosen.out, figure)
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _warnings_noted(report: Report) -> Iterator[None]:
    """Let the report say what the library warns of: what was not captured as a graph, and why."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        try:
            yield
        finally:
            said = [str(each.message).splitlines()[0] for each in caught if issubclass(each.category, UserWarning)]
            report.notes += [f"Warning: {message}" for message in dict.fromkeys(said)]


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Interrupt the block after some seconds; without effect where the system has no such alarm."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _bars_figure(overview: Report) -> Figure | None:
    """Every quantity with a bar, over its bar."""
    spreads = {bar.what: bar.spread for bar in overview.bars if bar.spread.median > 0}
    bounds = {bar.what: bar.bound for bar in overview.bars}
    shown = {
        what: Spread(*(value / bounds[what] for value in (spread.median, spread.low, spread.high)))
        for what, spread in spreads.items()
    }
    met = [bar.what for bar in overview.bars if bar.verdict == "yes"]
    return draw_points(shown, met, "measured, in units of its bar") if shown else None


def _roads_figure(found: Mapping[str, Measurement], ours: Sequence[str], label: str) -> Figure | None:
    return draw_roads(found, ours, label) if any(measurement.multiples for measurement in found.values()) else None


def _rows_figure(rows: Sequence[Mapping[str, Any]], names: Sequence[str], key: str, label: str) -> Figure | None:
    """The values of a column, each named by those of other columns."""
    values = {", ".join(str(row[name]) for name in names): row[key] for row in rows if key in row}
    shown = {name: value if isinstance(value, Spread) else Spread.exactly(value) for name, value in values.items()}
    return draw_points(shown, list(shown), label) if shown else None


# --- Peers, compiled elsewhere


def _start_compilers(run: Run, wanted: Sequence[str]) -> list[str]:
    """Begin to compile for the sections that compare with compiled peers; notes on those that cannot."""
    notes = []
    for section, network, makers, arguments in (
        ("projection-resnet20", "resnet20", matrix_makers, {}),
        ("products", "resnet20", product_makers, {"count": run.size["vectors"]}),
        ("projection-resnet18", "resnet18", matrix_makers, {}),
    ):
        if section not in wanted:
            continue
        try:
            given = {"packed": run.problem(network).packed(), "device": str(run.device), **arguments}
            pace = PACES_HERE[run.chosen.size]
            run.elsewhere[section] = Elsewhere(f"Compiled peers of {section}", makers, given, pace, run.device)
        except Exception as error:  # noqa: BLE001 (other sections shall run)
            notes.append(f"Compiled peers of {section} are missing: {compilation.first_line(error)}")
    return notes


def _unpacked(packed: bytes, device: str) -> Problem:
    # Of every process.
    options.exactly_float32()
    return Problem.unpacked(packed, device)


def matrix_makers(*, packed: bytes, device: str) -> Makers:
    """The compiled roads to UᵀHU of a problem."""
    return compilation.matrix_makers(_unpacked(packed, device), share=_SHARE_OF_MEMORY)


def product_makers(*, packed: bytes, device: str, count: int) -> Makers:
    """The compiled roads to one product and to several of a problem."""
    problem = _unpacked(packed, device)
    parts = hvp.parameter_parts(problem, hvp.drawn_vectors(problem, count))
    several = compilation.products_maker(problem, parts, share=_SHARE_OF_MEMORY)
    return {**compilation.product_maker(problem, parts[0]), **several}


# --- Sections


def run_tests(run: Run, report: Report, until: float) -> Figure | None:
    """The tests that are marked for a GPU, in a process of their own."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        report.notes.append(f"The tests are missing: {' and '.join(missing)} cannot be imported.")
        return None
    files = run.size["tests"] or sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if "gpu" in path.read_text()
    )
    words = ["-m", "gpu", "-v", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    # Most of their time is Python's.
    if importlib.util.find_spec("xdist") is not None:
        words += ["-n", str(min(_MOST_PROCESSES, os.cpu_count() or 1))]
    command = [sys.executable, "-m", "pytest", *words, *files]
    run.chosen.out.mkdir(parents=True, exist_ok=True)
    log = run.chosen.out / f"{report.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            # What was brought along may be on the path already.
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            process.wait(max(until - clock(), 1.0))
        except subprocess.TimeoutExpired:
            report.notes.append("Some tests are missing: they were not over in time.")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    counts, failed = outcomes(log.read_text())
    report.add("outcomes", "Tests that are marked for a GPU", [{"what": key, "calls": counts[key]} for key in counts])
    report.notes += [f"Not passed: {line}" for line in failed]
    if not sum(counts.values()):
        last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "nothing was printed")
        report.notes.append(f"The tests are missing, because none ran: {last}")
        return None
    report.bars.append(Bar("tests that failed", float(counts["failed"] + counts["error"]), "at most", 0))
    return None


def outcomes(log: str) -> tuple[dict[str, int], list[str]]:
    """The number of tests with each outcome in what `pytest -v` has printed, finished or not, and those that failed."""
    kinds = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
    found = re.findall(rf"^(\S+::.+?) ({kinds})\b", log, re.MULTILINE)
    # By several processes.
    found += [(name, kind) for kind, name in re.findall(rf"^\[gw\d+\].*? ({kinds}) (\S+::.+?) *$", log, re.MULTILINE)]
    collecting = re.findall(r"^ERROR (\S+\.py)(?: - .*)?$", log, re.MULTILINE)
    counts = {key: sum(outcome == key.upper() for _, outcome in found) for key in ("passed", "failed", "skipped")}
    errors = [name for name, outcome in found if outcome == "ERROR"] + list(dict.fromkeys(collecting))
    failed = [name for name, outcome in found if outcome == "FAILED"]
    return {**counts, "error": len(errors)}, [*failed, *errors]


def _projection_of(name: str, *, exact: bool) -> SectionRun:
    def section(run: Run, report: Report, until: float) -> Figure | None:
        problem = run.problem(name)
        report.setting |= {**run.size[name], "layers": len(problem.directions)}
        # Half of the time is for the process that has compiled.
        compiled = run.compiled(f"projection-{name}", report, (clock() + until) / 2)
        found = projection.add_projection(report, problem, run.pace(until), elsewhere=compiled, exact=exact)
        _add_occupation(report, run, {"sweep": lambda: projection.project(problem, "sweep")}, 0.8)
        return _roads_figure(found, projection.OURS, "forward passes for the whole matrix")

    return section


def run_products(run: Run, report: Report, until: float) -> Figure | None:
    """One product, and several."""
    problem = run.problem("resnet20")
    report.setting |= run.size["resnet20"]
    compiled = run.compiled("products", report, (clock() + until) / 2)
    found = hvp.add_products(report, problem, run.pace(until), count=run.size["vectors"], elsewhere=compiled)
    ours = [name for name in found if name.startswith(hvp.OURS_BEGIN)]
    return _roads_figure(found, ours, "forward passes a vector")


def run_memory(run: Run, report: Report, until: float) -> Figure | None:
    """The peak of the sweep, beside the budget that it is given."""
    problem = run.problem("resnet20")
    report.setting |= run.size["resnet20"]
    rows: list[dict[str, Any]] = []
    report.add("peaks", "Peaks of the sweep, and its budgets", rows)
    for given in run.size["budgets"]:
        if clock() > until:
            report.notes.append("Some budgets are missing: no time was left.")
            break
        rows.append(_peak_row(problem, given))
        if rows[-1].get("share") is not None:
            what = "by default" if given is None else f"of {given:g} GiB"
            report.bars.append(Bar(f"peak of the sweep / its budget {what}", rows[-1]["share"], "at most", 1))
    report.notes.append(
        "Peaks are over what was allocated before, with what CUDA graphs keep; the budget by default is half of what "
        "is free, or the peak of three gradients if that is less."
    )
    return _rows_figure([row for row in rows if "share" in row], ["budget_mib"], "share", "peak over budget in MiB")


def _peak_row(problem: Problem, given: float | None) -> dict[str, Any]:
    objective, device = problem.new_objective(), problem.device
    objective.loss()
    by_default = min(memory.free_bytes(device) / 2, 3 * problem.gradient_peak)
    budget = by_default if given is None else given * 2**30

    def sweep() -> object:
        return project_hessian(objective, problem.state, problem.directions, method="sweep", memory_gib=given)

    pools = memory.graph_pool_bytes(device)
    try:
        # The first call captures and checks.
        sweep()
    except (RuntimeError, LMCCurvatureError) as error:
        return {"budget_mib": budget / 2**20, "note": compilation.first_line(error)}
    kept = max(memory.graph_pool_bytes(device) - pools, 0.0)
    peak = kept + memory.peak_bytes(sweep, device)
    note = "by default" if given is None else ""
    return {"budget_mib": budget / 2**20, "peak_mib": peak / 2**20, "share": peak / budget, "note": note}


def run_training(run: Run, report: Report, until: float) -> Figure | None:
    """Steps of training, eager and as CUDA graphs, of one sibling and of several."""
    missing = [name for name in ("pydantic", "yaml") if importlib.util.find_spec(name) is None]
    if missing:
        report.notes.append(f"Training is missing: {' and '.join(missing)} cannot be imported.")
        return None
    # What it imports needs pydantic.
    from benchmarks import training

    tables, bars, notes = training.training_report(run.device, until - clock(), size=run.chosen.size)
    report.tables += tables
    report.bars += bars
    report.notes += notes
    rows = [row for table in tables for row in table.rows]
    return _rows_figure(rows, ["road", "dtype", "siblings"], "ms", "milliseconds a step of a sibling")


def run_barriers(run: Run, report: Report, until: float) -> Figure | None:
    """A barrier predicted and measured, from the networks and their images to the answer."""
    size = run.size["resnet20"]
    problem = run.problem("resnet20")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(run.size["images"], 3, size["pixels"], size["pixels"], generator=generator)
    y = torch.randint(10, (len(x),), generator=generator)
    loader = list(zip(x.split(size["batch"]), y.split(size["batch"]), strict=True))
    report.setting |= {**size, "images": len(x)}
    first, second = copy.deepcopy(problem.model), copy.deepcopy(problem.other)
    settings: Any = {"device": run.device, "progress": False}
    calls: dict[str, Callable[[], Any]] = {
        "predict_barrier": lambda: predict_barrier(first, second, loader, **settings),
        "measure_barrier": lambda: measure_barrier(first, second, loader, **settings),
    }
    rows = [{"road": f"{name}, the first call", "seconds": seconds_once(call)[0]} for name, call in calls.items()]
    report.add("first", "The first call in the process", rows)
    rows += _add_occupation(report, run, calls, None, until=until)
    return _rows_figure(rows, ["road"], "seconds", "seconds")


def _add_occupation(
    report: Report,
    run: Run,
    calls: Mapping[str, Callable[[], Any]],
    bound: float | None,
    *,
    until: float = float("inf"),
) -> list[dict[str, Any]]:
    """Add a table with the share of each call's time that is kernels', and the bar on it for a GPU; its rows."""
    rows: list[dict[str, Any]] = []
    kind = "kernels" if run.cuda else "operators"
    report.add("occupation", f"Time within {kind} over the whole time, without the profiler", rows)
    for name, call in calls.items():
        if clock() > until:
            report.notes.append(f"{name} is missing in the table of {kind}: no time was left.")
            continue
        found = profiling.occupation(call, run.device)
        rows.append(
            {"road": name, "seconds": found.seconds, "kernel_seconds": found.kernel_seconds, "share": found.share}
        )
        if not found.kernel_seconds:
            report.notes.append(f"The share of {name} is missing: the profiler saw none of its {kind}.")
        elif run.cuda and bound is not None:
            report.bars.append(Bar(f"time in kernels / time of the {name}", found.share, "at least", bound))
    return rows


def run_language(run: Run, report: Report, until: float) -> Figure | None:
    """The projection of a language model."""
    # What they have captured takes memory.
    run.problems.clear()
    problem = language_problem(**run.size["gpt2"], device=run.device)
    report.setting |= {**run.size["gpt2"], "parameters": f"{problem.parameter_count:,}"}
    found = language.add_language(report, problem, run.pace(until))
    return _roads_figure(found, [language.SWEEP, language.OWN_LOOP], "forward passes for the whole matrix")


def run_growth(run: Run, report: Report, until: float) -> Figure | None:
    """Products against dense Hessians, of the whole network and of each layer, as the number of parameters grows."""
    problems = [mlp_problem(width, run.size["examples"], device=run.device) for width in run.size["widths"]]
    report.setting |= {"examples": run.size["examples"]}
    return draw_panels(hvp_vs_exact.add_growth(report, problems, run.pace(until)))


def run_spectrum(run: Run, report: Report, until: float) -> Figure | None:
    """The largest eigenvalues and a spectral density."""
    size = run.size["spectrum"]
    report.setting |= {"network": size.network, "examples": size.examples}
    problem, small = (spectrum.problem_of(size, width, run.device) for width in size.width)
    found = spectrum.add_eigenvalues(report, problem, size, run.pace(until))
    if clock() < until:
        found |= spectrum.add_densities(report, small, size, run.pace(until))
    else:
        report.notes.append("Densities are missing: no time was left.")
    return _roads_figure(found, [spectrum.OURS, spectrum.OUR_DENSITY], "forward passes")


SECTIONS = (
    Section("tests", "Do the tests that need a GPU pass?", 110, run_tests),
    Section("projection-resnet20", "What does UᵀHU cost?", 50, _projection_of("resnet20", exact=True)),
    Section("products", "What do one and several products cost?", 30, run_products),
    Section("projection-resnet18", "What does UᵀHU cost?", 60, _projection_of("resnet18", exact=False)),
    Section("training", "How fast are siblings trained?", 60, run_training),
    Section("memory", "Does the sweep keep to its budget of memory?", 20, run_memory),
    Section("barriers", "How long does a barrier take, and how much of it in kernels?", 30, run_barriers),
    Section("growth", "What does a dense Hessian cost, in Hessian-vector products?", 40, run_growth),
    Section("language", "What does UᵀHU of a language model cost?", 50, run_language),
    Section("spectrum", "What do eigenvalues and densities of equal accuracy cost?", 30, run_spectrum),
)


if __name__ == "__main__":
    # Its warnings are in the way of the sections' lines.
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
