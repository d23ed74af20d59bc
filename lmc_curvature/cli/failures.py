"""How a command ends other than with its answer: in one message on standard error, and a status.

130 if it was interrupted, 143 if it was told to end by SIGTERM; 2 for mistakes that the library finds in options,
files, networks and data; 1 for all else, such as full disks, and errors in a network or a loader.
"""

import contextlib
import itertools
import os
import signal
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from lmc_curvature.errors import INTERRUPT, LMCCurvatureError, RankError, in_one_line

TRACEBACK = "LMC_CURVATURE_TRACEBACK"
"""The environment variable that shows the traceback of an error before its message."""

_PARTIAL = "the answer above is of the batches before, and is not saved"
_PACKAGE = str(Path(__file__).parents[1])


class _Termination(BaseException):
    """SIGTERM, which tells a process to end."""


@contextlib.contextmanager
def orderly_termination() -> Iterator[None]:
    """Within the block, let SIGTERM end this process as an interrupt does, so that nothing unfinished is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def end(number: int, _frame: object) -> None:
        if os.getpid() == owner:
            raise _Termination
        # A process that a loader has forked.
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def one_message(advice: str = "") -> Iterator[None]:
    """Within the block, or the function that it decorates, let what fails exit with one message and its status.

    Warnings are one message each.

    Args:
        advice: What can be done after an interrupt.
    """
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    except RankError as error:
        _exit(1, str(error), error)
    except LMCCurvatureError as error:
        _exit(2, str(error), error)
    except KeyboardInterrupt:
        _exit_early(130, "interrupted", advice)
    except _Termination:
        _exit_early(143, "terminated", advice)
    except SystemExit as stop:
        # typer ends silently, or with a word of its own, what is interrupted before a command begins.
        if isinstance(getattr(stop.__context__, "__cause__", None), KeyboardInterrupt):
            _exit_early(130, "interrupted", advice)
        raise
    except Exception as error:  # noqa: BLE001 - whatever a network, a loader or the system raises is told in one line
        _exit(1, f"{reason(error)}. {TRACEBACK}=1 shows the traceback.", error)
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Within the block, in which an answer is saved that was printed before, let errors exit with a message of that."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the answer is there, whatever keeps it from being saved
        _exit(1, f"the answer above was not saved: {reason(error)}.", error)


def end_if_partial(interruption: str | None) -> None:
    """Exit with a message if an answer that was printed is of the batches before an interruption; see `Extent`."""
    if interruption is None:
        return
    if interruption.startswith(INTERRUPT):
        _exit_early(130, "interrupted", _PARTIAL)
    _drop_unwritable_output()
    print(f"error: {interruption}; {_PARTIAL}.", file=sys.stderr)
    sys.exit(1)


def reason(error: Exception) -> str:
    """One line for an error that the library does not know: what it is, and where the user's code raised it."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None and _user_frame(error) is None:
        return f"{error.filename}: {error.strerror}"
    frame = _user_frame(error)
    return in_one_line(error, *([f"in {frame.filename}, line {frame.lineno}"] if frame else ()))


def _user_frame(error: Exception) -> traceback.FrameSummary | None:
    """The innermost frame of code that belongs neither to this library nor to an installed one."""
    installed = (_PACKAGE, "<", *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))
    frames = traceback.extract_tb(error.__traceback__)
    # What started the command line comes before its own frames.
    called = itertools.dropwhile(lambda frame: not frame.filename.startswith(_PACKAGE), frames)
    theirs = [frame for frame in called if not frame.filename.startswith(installed)]
    return theirs[-1] if theirs else None


def _exit_early(status: int, what: str, advice: str) -> None:
    print(f"{what}{advice and f'; {advice}'}.", file=sys.stderr)
    # Python dies of a signal at its end if the interrupt came within code that was executed from a string, as imports
    # of dataclasses do; it forgets that when it executes the next.
    exec("")
    sys.exit(status)


def _exit(status: int, message: str, error: BaseException) -> None:
    _drop_unwritable_output()
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _drop_unwritable_output() -> None:
    # Python would try again to write it at its end, and complain of that, too.
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
