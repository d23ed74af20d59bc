"""How far a pass over a loader goes: to its end, until an estimate is good enough, or until it is interrupted."""

import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from lmc_curvature.errors import INTERRUPT, OptionError, counted, in_one_line

# A standard error is looked at from so many batches on, and then whenever there are so many times as many.
_LEAST, _GROWTH = 8, 1.1


class Extent:
    """How far one pass goes, and why it ended before the loader did.

    Args:
        estimate: Of the batches so far, a number and its standard error; called by all ranks at once.
        tolerance: The standard error that is good enough; None to go on to the end.
        keep_partial: Whether an interrupted pass ends without an error.

    Attributes:
        interruption: What interrupted the pass, and after how many batches; None if nothing did.
    """

    def __init__(
        self, estimate: Callable[[], tuple[float, float]], tolerance: float | int | None, *, keep_partial: bool
    ):
        self.tolerance, self.interruption = tolerance, None
        self._keep_partial = keep_partial
        self._estimate, self._next, self._count = estimate, _LEAST, 0
        self._failure: BaseException | None = None

    def is_enough(self, count: int, bar: tqdm) -> bool:
        """Whether the estimate from so many batches is good enough; the bar shows it."""
        self._count = count
        if self.tolerance is None or count < self._next:
            return False
        self._next = max(count + 1, int(_GROWTH * count))
        value, error = self._estimate()
        bar.set_postfix_str(f"{value:.3g} ± {error:.2g}, {self.tolerance:.2g} wanted")
        return error <= self.tolerance

    @property
    def notes(self) -> tuple[str, ...]:
        """What belongs beside numbers from a pass that was interrupted."""
        return () if self.interruption is None else (f"partial: {self.interruption}",)

    def note_failure(self, error: BaseException) -> None:
        """Note an error that the loader has raised."""
        self._failure = error

    def keeps(self, error: BaseException) -> bool:
        """Whether what was computed before an error is kept: it comes from outside, and after whole batches."""
        is_from_outside = isinstance(error, KeyboardInterrupt) or error is self._failure
        if not (self._keep_partial and self._count and is_from_outside):
            return False
        what = INTERRUPT if isinstance(error, KeyboardInterrupt) else in_one_line(error)
        self.interruption = f"{what}, after {counted(self._count, 'batch')}"
        warnings.warn(f"Interrupted ({self.interruption}): the numbers are of the batches before.", stacklevel=2)
        return True


def check_tolerance(tolerance: Any) -> None:
    """Refuse a tolerance that is no positive number.

    Raises:
        OptionError: It is none.
    """
    if tolerance is not None and not (
        isinstance(tolerance, numbers.Real) and not isinstance(tolerance, bool) and 0 < float(tolerance) < math.inf
    ):
        raise OptionError(
            f"tolerance={tolerance!r}: expected a positive standard error, in units of the loss, or None."
        )
