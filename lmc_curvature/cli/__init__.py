"""The command line: it parses arguments, calls the library and prints."""

from lmc_curvature.cli.entry import main

__all__ = ["main"]
