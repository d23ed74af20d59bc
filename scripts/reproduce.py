"""Make every figure of the paper from configurations: fork, trace and draw, each continued where it was stopped.

    python scripts/reproduce.py configs/cifar10-small.yaml --data DIRECTORY_OF_IMAGES --workers 2
    python scripts/reproduce.py --device cuda                        # the paper's own scale, every configuration

Networks, tables and figures of configs/NAME.yaml go to runs/NAME/.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lmc_curvature.cli.tables import trace_tables
from lmc_curvature.errors import CheckpointError, LMCCurvatureError, NonFiniteError, OptionError
from lmc_curvature.figures.experiment import draw_all
from lmc_curvature.forking import load_config, run_forks
from lmc_curvature.objective.network import parse_device
from lmc_curvature.tracing import read_traces, trace_forks

CONFIGS = Path(__file__).parents[1] / "configs"
PAPER = sorted(path for path in CONFIGS.glob("cifar10-resnet*.yaml"))


def main(
    configs: Annotated[list[Path] | None, typer.Argument(help="By default those of the paper.")] = None,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs"),
    data: Annotated[str | None, typer.Option(help="Instead of the configurations' data: a folder of images, …")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes to work in.")] = 1,
    progress: Annotated[bool | None, typer.Option(help="Show progress bars; by default on a terminal.")] = None,
) -> None:
    """Fork, trace and draw."""
    parse_device(device)
    chosen = configs or PAPER
    changes = {} if data is None else {"data": data}
    names = [path.stem for path in chosen]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise OptionError(f"Two configurations are called {twice[0]!r}, and would share {out / twice[0]}: rename one.")
    # All are read before the first is trained.
    experiments = {path.stem: load_config(path, **changes) for path in chosen}
    console = Console()
    failed = False
    for name, config in experiments.items():
        console.rule(name)
        try:
            run_forks(config, out / name, device=device, workers=workers, progress=progress)
        except NonFiniteError as error:
            console.print(f"[red]{escape(str(error))}[/red]")
            failed = True
        try:
            trace_forks(out / name, device=device, workers=workers, progress=progress)
        except NonFiniteError as error:
            console.print(f"[red]{escape(str(error))}[/red]")
            failed = True
        try:
            traces = read_traces(out / name)
        except CheckpointError as error:
            # Every fork diverged. The other configurations are not to suffer for it.
            console.print(f"[red]{escape(str(error))}[/red]")
            continue
        for table in trace_tables(traces):
            console.print(table)
        paths = draw_all(out / name, out / name / "figures", progress=progress)
        console.print(f"{len(paths)} files in {out / name / 'figures'}")
    if failed:
        raise typer.Exit(2)


if __name__ == "__main__":
    try:
        typer.run(main)
    except LMCCurvatureError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
