"""Every error the library raises on purpose, derived from one base class.

A message names the offending entry and says what would be right. Classes also derive from the built-in
exception a caller would expect (`ValueError`, `KeyError`, …), so existing `except` clauses keep working.
"""

import contextlib
import difflib
import numbers
from collections.abc import Iterable, Iterator

INTERRUPT = "Ctrl-C"
"""What a partial result calls an interrupt from the keyboard."""


class LMCCurvatureError(Exception):
    """Base class of all errors that `lmc_curvature` raises on purpose: catch it around any call of the library."""


class ArchitectureMismatchError(LMCCurvatureError, ValueError):
    """The two networks do not have the same entries, shapes or fixed buffers, or compute something else from them.

    Catch it to skip pairs of networks that cannot be averaged entry by entry.
    """


class PartitionError(LMCCurvatureError, ValueError):
    """A layer partition does not cover every entry exactly once, or a set of layers names one that it does not have.

    Catch it where a user chooses the partition or the layers.
    """


class OptionError(LMCCurvatureError, ValueError):
    """An option, a position on the segment or a metric is not among the choices, or does not go with the others.

    Catch it where a user chooses the options; another call with the same options fails, too.
    """


class LoaderError(LMCCurvatureError, ValueError):
    """The loader is empty, is used up, or yields batches of another form than the loss expects.

    Catch it where data come from outside; some batches may have been visited already.
    """


class LossError(LMCCurvatureError, ValueError):
    """The loss is not a real scalar mean over the examples of a batch, or has no gradient in the network's entries.

    Catch it where a user passes `loss_fn`.
    """


class NonFiniteError(LMCCurvatureError, ArithmeticError):
    """A parameter, a loss or a curvature is infinite or not a number.

    Catch it to skip networks whose training diverged.
    """


class UnsupportedModelError(LMCCurvatureError, TypeError):
    """The loss is no function of the state: the network is random, uninitialised, cannot be copied or cannot move.

    Catch it to skip kinds of networks that the library cannot analyse, or to try another method.
    """


class FallbackWarning(UserWarning):
    """A faster road could not be taken, and the answer came by a slower one.

    Filter it once the slower road is accepted; turn it into an error where speed matters.
    """


class SweepError(LMCCurvatureError, ArithmeticError):
    """The sweep disagrees with a Hessian-vector product, so its answer cannot be trusted.

    Catch it to compute the same with `method="hvp"`, as `method="auto"` does by itself.
    """


class CaptureError(UnsupportedModelError):
    """The loss cannot be captured as a graph of operations, which the sweep needs.

    Catch it to compute the same with `method="hvp"`, as `method="auto"` does by itself.
    """


class DirectionError(LMCCurvatureError, ValueError):
    """A direction or vector has an unknown entry, a wrong shape, or a type that cannot move.

    Catch it where states or vectors come from outside.
    """


class OperatorError(LMCCurvatureError, ValueError):
    """An operator is not square or not symmetric, so it has no spectrum of real eigenvalues.

    Catch it where operators come from outside.
    """


class ConvergenceWarning(UserWarning):
    """An iteration ended before it reached the accuracy asked for; the result says how far it came.

    Turn it into an error where an inaccurate result is useless.
    """


class MemoryBudgetError(LMCCurvatureError, MemoryError):
    """A dense matrix or a computation, however it is cut, would need more memory than it was given.

    Catch it to ask for less, or again with a larger `memory_gib`.
    """


class BackendError(LMCCurvatureError, RuntimeError):
    """A library that was chosen as a backend is missing, cannot do what is asked, or computes something else.

    Catch it to compute the same with `backend="native"`.
    """


class RankError(LMCCurvatureError, RuntimeError):
    """Another of the processes that share the data has failed, has vanished, or yields other batches.

    Catch it to end this process in good order: what they were computing is lost on all of them.
    """


class FileFormatError(LMCCurvatureError, ValueError):
    """A file was not written by this library, or is damaged.

    Catch it around `load` to compute a stored result again.
    """


class CheckpointError(LMCCurvatureError, ValueError):
    """A checkpoint is missing, damaged, refused, or does not fit the network.

    Catch it where the weights of networks are read.
    """


class NewerVersionError(FileFormatError, CheckpointError):
    """A file was written by another release of this library, which has to read it.

    Catch it before its base classes wherever those lead to files being replaced: this one is whole.
    """


class DataError(LMCCurvatureError, ValueError):
    """A data set is missing or is not what it should be.

    Catch it where a user names the data.
    """


class ConfigurationError(LMCCurvatureError, ValueError):
    """A configuration has an unknown key or a bad value, or differs from the one on disk.

    Catch it where a user writes the configuration.
    """


@contextlib.contextmanager
def naming(subject: str) -> Iterator[None]:
    """Within the block, errors of this library begin with what they are about; as they are where nothing is named."""
    try:
        yield
    except LMCCurvatureError as error:
        if not subject:
            raise
        raise type(error)(f"{subject}: {error}") from error


def suggest(name: str, choices: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest choice if one is near, else the choices."""
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    shown = ", ".join(repr(choice) for choice in choices[:8])
    return f"choose from {shown}{', …' if len(choices) > 8 else ''}."


def in_one_line(error: BaseException, *places: str) -> str:
    """What an error is, in one line without a full stop, with its notes and other places in parentheses."""
    lines = str(error).strip().splitlines() or [""]
    # A loader's own processes pass on their traceback as text, which ends with the error.
    if "Original Traceback" in str(error):
        text = lines[-1]
    else:
        text = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
    places = (*getattr(error, "__notes__", ()), *places)
    return text.rstrip(".") + (f" ({', '.join(places)})" if places else "")


def counted(number: int, noun: str) -> str:
    """A number of things, in words: 1 layer, 3 layers, 2 entries, 4 batches."""
    if number == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith(("s", "tch")) else f"{noun}s"
    return f"{number} {plural}"


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raise `OptionError` unless `value` is one of `choices`, naming the option and the nearest choice."""
    choices = list(choices)
    if value not in choices:
        raise OptionError(f"{option}={value!r} is not a choice: {suggest(str(value), choices)}")


def check_flags(**options: bool) -> None:
    """Raise `OptionError` unless every option is True or False, naming the one that is not."""
    for option, value in options.items():
        if not isinstance(value, bool):
            raise OptionError(f"{option}={value!r}: expected True or False.")


def check_budget(memory_gib: float) -> None:
    """Raise `OptionError` unless the option `memory_gib` is a positive number."""
    if isinstance(memory_gib, bool) or not isinstance(memory_gib, numbers.Real) or not memory_gib > 0:
        raise OptionError(f"memory_gib={memory_gib!r}: expected a positive number of GiB.")


def check_memory(gib: float, memory_gib: float, what: str, remedy: str) -> None:
    """Raise `MemoryBudgetError` if something is too large, naming it and a remedy.

    Args:
        gib: Its size in GiB.
        memory_gib: The largest size allowed.
        what: Its name, the subject of the message.
        remedy: A sentence that says what to do instead.
    """
    check_budget(memory_gib)
    if gib > memory_gib:
        raise MemoryBudgetError(f"{what} takes {gib:.3g} GiB, more than memory_gib={memory_gib:g}: {remedy}")
