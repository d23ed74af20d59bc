"""Budgets: the largest rise of the loss that an average may have."""

import math

import numpy as np

from lmc_curvature.barrier import BarrierPrediction
from lmc_curvature.errors import OptionError
from lmc_curvature.merging.rises import mean_loss


def limit_of(prediction: BarrierPrediction, budget: float | int | None, relative_budget: float | int | None) -> float:
    """The largest rise of the loss that one of the two allows, in units of the loss.

    Raises:
        OptionError: Neither is given, or both are; or it is no finite number, or the relative one is negative.
    """
    if (budget is None) == (relative_budget is None):
        given = "neither was given" if budget is None else f"got {budget!r} and {relative_budget!r}"
        raise OptionError(f"Give budget, in units of the loss, or relative_budget, a part of the mean loss; {given}.")
    if budget is None:
        return check_not_negative("relative_budget", relative_budget) * abs(mean_loss(prediction))
    if isinstance(budget, bool) or not isinstance(budget, (int, float, np.number)) or not math.isfinite(budget):
        raise OptionError(f"budget={budget!r}: expected a finite number.")
    return float(budget)


def check_not_negative(name: str, value: object) -> float:
    """A number that is not negative; raise `OptionError` for anything else, with the option's name."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < math.inf:
        raise OptionError(f"{name}={value!r}: expected a number that is not negative.")
    return float(value)


def budget_in_words(prediction: BarrierPrediction, budget: float, digits: int = 4) -> str:
    """A budget, and how many times the mean loss it is where it is more than that."""
    mean = abs(mean_loss(prediction))
    return f"{budget:.{digits}g}" + (f" ({budget / mean:.3g} times the mean loss)" if 0 < mean < budget else "")
