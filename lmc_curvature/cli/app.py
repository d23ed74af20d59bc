"""The commands: each parses its arguments, calls the library and prints.

The library is imported inside the commands, because torch takes seconds to import: help, the version and a mistyped
command answer without it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmc_curvature import __version__
from lmc_curvature.cli.arguments import (
    Anchors,
    Device,
    ForkDir,
    Names,
    OtherData,
    Progress,
    Weights,
    Witness,
    Workers,
)
from lmc_curvature.cli.failures import end_if_partial, one_message, saving
from lmc_curvature.cli.files import register as register_file_commands
from lmc_curvature.cli.help import COMPUTATION, PlainCommand, PlainGroup
from lmc_curvature.cli.many import measure_many, predict_many, refuse_for_two
from lmc_curvature.cli.options import Comparison, with_comparison
from lmc_curvature.cli.parsing import anchor_positions, metric_names
from lmc_curvature.cli.printing import show
from lmc_curvature.cli.ranks import is_first
from lmc_curvature.cli.report import register as register_report
from lmc_curvature.cli.select import register as register_select
from lmc_curvature.errors import OptionError

if TYPE_CHECKING:
    from lmc_curvature import BarrierMeasurement, BarrierPrediction, BarriersMeasurement, BarriersPrediction

app = typer.Typer(
    help="Can two neural networks be averaged? Predict the loss barrier between them, and measure it.",
    cls=PlainGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    # Plain help: tables cut long words such as package.module:factory.
    rich_markup_mode=None,
)

_CONTINUES = "the same command continues where it stopped"


@app.command(cls=PlainCommand)
@one_message("the same command keeps the networks that are trained")
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where networks, results and figures go.")] = Path(
        "runs/demo"
    ),
    device: Device = "cpu",
    progress: Progress = None,
) -> None:
    """Train siblings on the digits, predict and measure their barriers, and draw the figures."""
    _check_writable(out)
    from lmc_curvature.cli.demo import run_demo
    from lmc_curvature.cli.tables import demo_tables

    result = run_demo(out, device=device, progress=progress)
    show(*demo_tables(result), *(f"drawn: {path}" for path in result.figures), _next_report(out))


@app.command(cls=PlainCommand)
@one_message(_CONTINUES)
def fork(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; the project's are in configs/.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where networks go. The same directory continues what was stopped.")
    ],
    data: OtherData = None,
    device: Device = "cpu",
    workers: Workers = 1,
    together: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=COMPUTATION,
            help="Networks that a process trains in turns; by default as many as fit on a GPU.",
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also log metrics there, for TensorBoard.")
    ] = None,
    progress: Progress = None,
) -> None:
    """Train a parent, and children forked from it at several epochs."""
    _check_writable(out, tensorboard)
    from lmc_curvature.forking import load_config, run_forks

    plan = load_config(config, **({} if data is None else {"data": data}))
    run_forks(plan, out, device=device, workers=workers, together=together, tensorboard=tensorboard, progress=progress)
    if is_first():
        show(f"trained: {out}; next: lmc-curvature trace {out}")


@app.command(cls=PlainCommand)
@one_message(_CONTINUES)
def trace(
    directory: ForkDir, data: OtherData = None, device: Device = "cpu", workers: Workers = 1, progress: Progress = None
) -> None:
    """Predict and measure the barriers between siblings, epoch by epoch."""
    _check_writable(directory)
    from lmc_curvature.cli.tables import trace_tables
    from lmc_curvature.tracing import trace_forks

    traces = trace_forks(directory, data=data, device=device, workers=workers, progress=progress)
    if is_first():
        show(*trace_tables(traces), f"tables: {directory / 'traces'}; next: lmc-curvature figures {directory}")


@app.command(cls=PlainCommand)
@one_message()
def figures(
    directory: ForkDir,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where figures go; by default DIRECTORY/figures.")
    ] = None,
    progress: Progress = None,
) -> None:
    """Draw every figure of the paper from what was traced."""
    out = out or directory / "figures"
    _check_writable(out)
    from lmc_curvature.figures.experiment import draw_all

    show(*(f"drawn: {path}" for path in draw_all(directory, out, progress=progress)), _next_report(directory))


@app.command(cls=PlainCommand)
@one_message()
@with_comparison
def predict(
    comparison: Comparison,
    anchors: Anchors = "3",
    witness: Witness = True,
    names: Names = None,
    weights: Weights = None,
) -> None:
    """Predict the barrier between networks A and B from the curvature at anchors from one to the other."""
    if comparison.others:
        _answer(comparison, *predict_many(comparison, names, weights, anchors=anchors, witness=witness))
        return
    refuse_for_two(names=names, weights=weights)
    from lmc_curvature import predict_barrier
    from lmc_curvature.cli.tables import prediction_record, prediction_table

    positions, options = anchor_positions(anchors), comparison.computation()
    first, second = comparison.pair()
    comparison.check_sets(first)
    sets, loader = comparison.sets(), comparison.batches()
    provenance = comparison.provenance(loader)
    prediction = predict_barrier(first, second, loader, anchors=positions, witness=witness, **options)
    _answer(
        comparison, prediction, prediction_record(prediction, sets) | provenance, prediction_table(prediction, sets)
    )


@app.command(cls=PlainCommand)
@one_message()
@with_comparison
def measure(
    comparison: Comparison,
    each: Annotated[bool, typer.Option("--each", help="Measure each layer alone.")] = False,
    alphas: Annotated[int, typer.Option(metavar="N", help="Evenly spaced positions, the ends included.")] = 11,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="loss, error, or both with a comma; by default the error, too, of classifiers."
        ),
    ] = None,
    names: Names = None,
    weights: Weights = None,
    subset: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B", help="Of three networks or more: some whose mean to measure, too. Repeatable."),
    ] = None,
) -> None:
    """Measure the barrier between networks A and B by evaluating the networks in between."""
    if each and comparison.sets():
        raise OptionError("--each measures every layer alone, and --set the sets that it names: choose one of them.")
    if comparison.others:
        options = {"each": each, "alphas": alphas, "metrics": metrics}
        _answer(comparison, *measure_many(comparison, names, weights, subset, **options))
        return
    refuse_for_two(names=names, weights=weights, subset=subset)
    from lmc_curvature import measure_barrier
    from lmc_curvature.cli.tables import measurement_record, measurement_table

    options = comparison.computation()
    chosen = metric_names(metrics, options["loss_fn"])
    networks, loader = comparison.pair(), comparison.batches()
    provenance = comparison.provenance(loader)
    measurement = measure_barrier(
        *networks,
        loader,
        sets="each" if each else comparison.sets(),
        alphas=alphas,
        metrics=chosen,
        **options,
    )
    tables = [measurement_table(measurement)] if measurement.sets else []
    _answer(comparison, measurement, measurement_record(measurement) | provenance, *tables)


register_select(app)
register_file_commands(app)
register_report(app)


def _print_version(asked: bool) -> bool:
    if asked:
        print(f"lmc-curvature {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _answer(
    comparison: Comparison,
    result: "BarrierPrediction | BarrierMeasurement | BarriersPrediction | BarriersMeasurement",
    record: dict[str, Any],
    *tables: Any,
) -> None:
    """Print an answer, and save and draw it whether or not it could be printed."""
    try:
        if comparison.as_json:
            print(json.dumps(record, indent=2), flush=True)
        else:
            # What a person reads last is the verdict.
            show(*tables, str(result))
    finally:
        with saving():
            # A file would look like the answer from all of the data.
            end_if_partial(getattr(result, "interruption", None))
            if comparison.save is not None:
                result.save(comparison.save)
            if comparison.plot is not None:
                from lmc_curvature.figures.files import write_figure

                write_figure(result.plot(), comparison.plot)


def _next_report(directory: Path) -> str:
    return f"next, all of it on one page: lmc-curvature report {directory} --out report.html"


def _check_writable(*directories: Path | None) -> None:
    """Refuse directories that cannot be written before anything is computed for them."""
    from lmc_curvature.storage import check_writable

    for directory in directories:
        if directory is not None:
            check_writable(directory)
