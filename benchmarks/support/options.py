"""The command line of benchmarks."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.timing import PACES


def parse_options(
    script: str,
    description: str | None,
    argv: Sequence[str] | None,
    *add: Callable[[argparse.ArgumentParser], Any],
) -> argparse.Namespace:
    """Read the command line: options that all benchmarks have, and those of one script.

    Args:
        script: Path of the script.
        description: Its docstring.
        argv: Words of the command line; None for the program's own.
        add: Functions that add options to the parser.

    Returns:
        The options; besides them `script` (its name), `size` (`"full"`, `"quick"` or `"smoke"`), `pace`, and `command`
        as it was typed, without folders.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu, cuda, cuda:1, …")
    parser.add_argument("--threads", type=int, help="of a CPU; torch's choice by default")
    parser.add_argument("--quick", action="store_true", help="smaller networks and batches, timed more briefly")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where JSON, tables and figures go")
    for add_options in add:
        add_options(parser)
    options = parser.parse_args(argv)
    options.script = Path(script).stem
    options.size = "smoke" if options.smoke else "quick" if options.quick else "full"
    options.pace = PACES[options.size]
    options.command = " ".join(["python", "-m", f"benchmarks.{options.script}", *_without_places(argv)])
    if options.threads:
        torch.set_num_threads(options.threads)
    exactly_float32()
    return options


def exactly_float32() -> None:
    """Let every road compute in plain single precision: TF32 keeps ten bits, and libraries differ in who uses it."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def _without_places(argv: Sequence[str] | None) -> list[str]:
    """The words of the command line without folders, which belong to a machine."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    parser.add_argument("--other")
    return parser.parse_known_args(argv)[1]


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a network and a batch."""
    parser.add_argument("--network", help="resnet8, resnet14, resnet20, …, or torchvision's resnet18")
    parser.add_argument("--batch", type=int, help="examples in a batch")


def chosen_size(options: argparse.Namespace, sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The size for `options.size`, with the values that the command line gives instead."""
    size = dict(sizes[options.size])
    size |= {key: value for key in size if (value := getattr(options, key, None)) is not None}
    if size["network"] == "resnet18":
        # Its width is its own.
        size.pop("width")
    return size
