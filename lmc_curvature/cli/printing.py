"""What the commands print for a person."""

from typing import Any


def show(*things: Any) -> None:
    """Print tables and lines of text, as wide as the terminal is."""
    from rich.console import Console

    console = Console()
    # A pipe has no width; do not wrap what a program or a log file reads.
    if not console.is_terminal:
        console = Console(width=160)
    for thing in things:
        console.print(thing, highlight=False, markup=False)
