"""The entry of the command line: it imports little before it is ready to tell of interrupts and errors."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lmc_curvature.cli.failures import one_message, orderly_termination


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line on `sys.argv` or other arguments, and exit; see `failures` for messages and statuses."""
    with orderly_termination(), one_message():
        # As `python -m` does, so that package.module:factory finds what lies in the current directory.
        sys.path.insert(0, str(Path.cwd()))
        from lmc_curvature.cli.app import app

        try:
            # Also where it is started as a module, by torchrun or `python -m`.
            app(arguments, prog_name="lmc-curvature")
        finally:
            # What cannot be written any more is told of here, and not by Python at its end.
            sys.stdout.flush()
