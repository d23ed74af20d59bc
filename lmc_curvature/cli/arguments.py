"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from lmc_curvature.cli.help import COMPUTATION, OUTPUT

_FILE_OF_A_NETWORK = "a safetensors file, a torch.save file that holds tensors only, or a folder of either."

A = Annotated[Path, typer.Argument(metavar="A", help=f"The one network: {_FILE_OF_A_NETWORK}")]
B = Annotated[Path, typer.Argument(metavar="B", help="The other network, likewise.")]
Others = Annotated[
    list[Path] | None,
    typer.Argument(metavar="C", help="More networks, likewise: all are then compared, each with each and their mean."),
]
Names = Annotated[
    str | None,
    typer.Option(metavar="A,B,C", help="Of three networks or more: what to call them, by default as their files."),
]
Weights = Annotated[
    str | None,
    typer.Option(metavar="NUMBERS", help="Of three or more: what each counts for in the mean, by default all alike."),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", rich_help_panel=COMPUTATION, help="Where to compute: cpu, cuda, cuda:1, …")
]
ForkDir = Annotated[Path, typer.Argument(metavar="DIRECTORY", help="A directory that lmc-curvature fork wrote.")]
OtherData = Annotated[
    str | None, typer.Option("--data", metavar="FOLDER", help="Instead of the configured data, for moved folders.")
]
Workers = Annotated[
    int,
    typer.Option(
        metavar="N",
        rich_help_panel=COMPUTATION,
        help="Processes that share the work; more may be started from elsewhere.",
    ),
]
Anchors = Annotated[
    str,
    typer.Option(
        metavar="N|POSITIONS",
        help="Points to differentiate at: how many, evenly spaced, or their positions, such as 0,0.3,1.",
    ),
]
Witness = Annotated[
    bool,
    typer.Option(
        "--witness/--no-witness",
        show_default=False,
        help="Compare derivatives with differences of the loss first, as by default.",
    ),
]
Progress = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress",
        rich_help_panel=OUTPUT,
        help="Progress on standard error; by default on a terminal.",
    ),
]
