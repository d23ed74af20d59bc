"""The command line: parse, call the API, print."""

import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from torch import nn

from lmc_curvature import __version__
from lmc_curvature.barrier.measurement import measure_barrier
from lmc_curvature.barrier.prediction import predict_barrier
from lmc_curvature.checkpoints.files import load_checkpoint
from lmc_curvature.cli.demo import run_demo
from lmc_curvature.cli.tables import (
    demo_tables,
    measurement_record,
    measurement_table,
    prediction_record,
    prediction_table,
    trace_tables,
)
from lmc_curvature.errors import DataError, LMCCurvatureError, OptionError, check_choice
from lmc_curvature.figures.experiment import draw_all
from lmc_curvature.forking import load_config, run_forks
from lmc_curvature.objective.network import parse_device
from lmc_curvature.objective.normalization import BatchNormPolicy
from lmc_curvature.segment.partition import LayerPartition, layer_indices
from lmc_curvature.sources import load_data, make_model
from lmc_curvature.tracing import trace_forks

app = typer.Typer(
    help="Can two neural networks be averaged? Predict the loss barrier between them, and measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Checkpoint = Annotated[Path, typer.Argument(help="A safetensors file, or a torch.save file that holds tensors only.")]
ModelName = Annotated[
    str, typer.Option("--model", help="digits-resnet, resnet20, …; torchvision:NAME; or package.module:factory.")
]
ModelOptions = Annotated[
    list[str] | None,
    typer.Option("--model-option", help="KEY=VALUE for the network's factory, such as num_classes=10. Repeatable."),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="digits; a folder of images (ROOT/train/CLASS/*.png); or package.module:factory returning a loader.",
    ),
]
Split = Annotated[str, typer.Option(help="train or test, for digits and folders.")]
Limit = Annotated[int | None, typer.Option(help="Use a fixed random sample of this many examples.")]
BatchSize = Annotated[int, typer.Option(help="Examples a batch.")]
MaxBatches = Annotated[int | None, typer.Option(help="Use only this many batches.")]
BatchNorm = Annotated[str, typer.Option(help="interpolate, batch or recalibrate.")]
LayerSet = Annotated[
    list[str] | None, typer.Option("--set", help="Comma-separated layers to move together. Repeatable.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
DType = Annotated[str, typer.Option(help="float32 or float64.")]
ForkDir = Annotated[Path, typer.Argument(help="A directory that lmc-curvature fork wrote.")]
Workers = Annotated[
    int, typer.Option(help="Processes to work in. More may be started from elsewhere: they share the work.")
]
Save = Annotated[Path | None, typer.Option(help="Also save the full result here, for Python.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Progress = Annotated[bool, typer.Option(help="Show progress bars (on standard error).")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where networks, results and figures go.")] = Path("runs/demo"),
    device: Device = "cpu",
    progress: Progress = True,
) -> None:
    """Train siblings on the digits, predict and measure their barriers, and draw the figures."""
    result = run_demo(out, device=device, progress=progress)
    _print(*demo_tables(result))
    _print(*(f"drawn: {path}" for path in result.figures))


@app.command()
def fork(
    config: Annotated[Path, typer.Argument(help="A YAML file; the project's are in configs/.")],
    out: Annotated[Path, typer.Option(help="Where networks go. The same directory continues what was stopped.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Instead of the file's data: a folder of images, …")
    ] = None,
    device: Device = "cpu",
    workers: Workers = 1,
    tensorboard: Annotated[Path | None, typer.Option(help="Also log metrics there, for TensorBoard.")] = None,
    progress: Progress = True,
) -> None:
    """Train a parent, and children forked from it at several epochs."""
    changes = {} if data is None else {"data": data}
    parse_device(device)
    directory = run_forks(
        load_config(config, **changes),
        out,
        device=device,
        workers=workers,
        tensorboard=tensorboard,
        progress=progress,
    )
    _print(f"trained: {directory.path}; next: lmc-curvature trace {directory.path}")


@app.command()
def trace(
    directory: ForkDir,
    data: Annotated[str | None, typer.Option("--data", help="Where the data lie now, if they have moved.")] = None,
    device: Device = "cpu",
    workers: Workers = 1,
    progress: Progress = True,
) -> None:
    """Predict and measure the barriers between siblings, epoch by epoch."""
    parse_device(device)
    traces = trace_forks(directory, data=data, device=device, workers=workers, progress=progress)
    _print(*trace_tables(traces))
    _print(f"tables: {directory / 'traces'}; next: lmc-curvature figures {directory}")


@app.command()
def figures(
    directory: ForkDir,
    out: Annotated[Path | None, typer.Option(help="Where figures go; by default DIRECTORY/figures.")] = None,
    progress: Progress = True,
) -> None:
    """Draw every figure of the paper from what was traced."""
    paths = draw_all(directory, out or directory / "figures", progress=progress)
    _print(*(f"drawn: {path}" for path in paths))


@app.command()
def predict(
    a: Checkpoint,
    b: Checkpoint,
    model: ModelName,
    data: Data,
    model_option: ModelOptions = None,
    layers: Annotated[str, typer.Option(help="fused, module, tensor, block or block:DEPTH.")] = "fused",
    sets: LayerSet = None,
    batch_norm: BatchNorm = "interpolate",
    split: Split = "train",
    limit: Limit = None,
    batch_size: BatchSize = 256,
    max_batches: MaxBatches = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    save: Save = None,
    as_json: AsJson = False,
    progress: Progress = True,
) -> None:
    """Predict the barrier between networks A and B from the curvature at each of them."""
    _check_save(save)
    first, second = _load_pair(a, b, model, model_option, device)
    names = LayerPartition.of(first, layers, batch_norm=cast(BatchNormPolicy, batch_norm)).names
    parsed_sets = _parse_sets(sets)
    for members in parsed_sets:
        layer_indices(names, members)
    prediction = predict_barrier(
        first,
        second,
        _load_batches(data, split, limit, batch_size, progress),
        layers=layers,
        batch_norm=cast(BatchNormPolicy, batch_norm),
        max_batches=max_batches,
        dtype=_parse_dtype(dtype),
        progress=progress,
    )
    if save is not None:
        prediction.save(save)
    if as_json:
        _print_json(prediction_record(prediction, parsed_sets))
    else:
        _print(str(prediction), prediction_table(prediction, parsed_sets))


@app.command()
def measure(
    a: Checkpoint,
    b: Checkpoint,
    model: ModelName,
    data: Data,
    model_option: ModelOptions = None,
    layers: Annotated[
        str | None, typer.Option(help="Also measure each layer of a partition alone; with --set, those sets instead.")
    ] = None,
    sets: LayerSet = None,
    alphas: Annotated[int, typer.Option(help="Evenly spaced positions, the ends included.")] = 11,
    batch_norm: BatchNorm = "interpolate",
    split: Split = "train",
    limit: Limit = None,
    batch_size: BatchSize = 256,
    max_batches: MaxBatches = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    save: Save = None,
    as_json: AsJson = False,
    progress: Progress = True,
) -> None:
    """Measure the barrier between networks A and B by evaluating the networks in between."""
    _check_save(save)
    measurement = measure_barrier(
        *_load_pair(a, b, model, model_option, device),
        _load_batches(data, split, limit, batch_size, progress),
        layers=_parse_sets(sets) if sets else layers,
        partition=layers or "fused",
        alphas=alphas,
        batch_norm=cast(BatchNormPolicy, batch_norm),
        max_batches=max_batches,
        dtype=_parse_dtype(dtype),
        progress=progress,
    )
    if save is not None:
        measurement.save(save)
    if as_json:
        _print_json(measurement_record(measurement))
    else:
        _print(str(measurement), *([measurement_table(measurement)] if measurement.sets else []))


def _version(asked: bool) -> bool:
    if asked:
        _print(f"lmc-curvature {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; errors the library raises on purpose end it with one message and status 2."""
    # As `python -m` does, so that package.module:factory finds what lies in the current directory.
    sys.path.insert(0, str(Path.cwd()))
    try:
        app()
    except LMCCurvatureError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _load_pair(a: Path, b: Path, model: str, options: list[str] | None, device: str) -> tuple[nn.Module, nn.Module]:
    parsed = dict(_parse_model_option(option) for option in options or ())
    place = parse_device(device)
    first, second = (load_checkpoint(make_model(model, **parsed), path).to(place) for path in (a, b))
    return first, second


def _load_batches(data: str, split: str, limit: int | None, batch_size: int, progress: bool) -> Iterable[Any]:
    module, colon, factory = data.partition(":")
    # A path may hold a colon, too; an existing folder is meant as such, and cifar10:ROOT is a data set.
    if colon and module != "cifar10" and not Path(data).exists():
        try:
            make_loader = getattr(importlib.import_module(module), factory)
        except (ImportError, AttributeError) as error:
            raise DataError(f"--data {data}: {error}. Expected package.module:factory returning a loader.") from error
        try:
            return make_loader()
        except TypeError as error:
            raise DataError(f"--data {data}: {error}. Expected a function without arguments.") from error
    check_choice("split", split, ("train", "test"))
    return load_data(data, cast(Any, split), limit, progress=progress).batches(batch_size)


def _parse_model_option(option: str) -> tuple[str, Any]:
    key, equals, value = option.partition("=")
    if not equals or not key:
        raise OptionError(f"--model-option {option!r}: expected KEY=VALUE, such as num_classes=10.")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _parse_sets(sets: list[str] | None) -> list[list[str]]:
    return [[name.strip() for name in members.split(",") if name.strip()] for members in sets or ()]


def _check_save(save: Path | None) -> None:
    if save is not None and save.is_dir():
        raise OptionError(f"--save {save} is a directory; expected the name of a file.")


def _parse_dtype(dtype: str) -> torch.dtype:
    check_choice("dtype", dtype, ("float32", "float64"))
    return cast(torch.dtype, getattr(torch, dtype))


def _print(*things: Any) -> None:
    console = Console()
    # A pipe has no width; do not wrap what a program or a log file reads.
    if not console.is_terminal:
        console = Console(width=160)
    for thing in things:
        console.print(thing, highlight=False, markup=False)


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
