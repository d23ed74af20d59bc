"""Numbers and names as figures write them."""

import math
from collections.abc import Sequence


def short_number(value: float, digits: int = 2) -> str:
    """A number with few digits: 0.0029, 5.4e−5, 120."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    if 1e-3 <= abs(value) < 1e4:
        decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
        return f"{value:.{decimals}f}".replace("-", "−")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def number_with_error(value: float, error: float) -> str:
    """A number and its standard error, or that a single batch does not tell it: 0.0027 ± 0.0007, (9.6 ± 0.7)e−4."""
    if math.isnan(error) and value != 0:
        return f"{short_number(value)} ± unknown (one batch)"
    if not (math.isfinite(error) and error > 0 and value != 0):
        return short_number(value)
    power = math.floor(math.log10(max(abs(value), error)))
    shown = power if not 1e-3 <= abs(value) < 1e4 else 0
    decimals = max(shown - math.floor(math.log10(error)), 0)
    both = f"{value / 10.0**shown:.{decimals}f} ± {error / 10.0**shown:.{decimals}f}"
    return (f"({both})e{shown}" if shown else both).replace("-", "−")


def tick_numbers(values: Sequence[float]) -> list[str]:
    """The numbers of an axis's ticks as they are, in one notation: 0, 0.25, 0.5, or 0, 5e−4, 1e−3."""
    largest = max(map(abs, values), default=0.0)
    # Where ticks are multiples of a step, zero may be the rounding of another.
    values = [0.0 if abs(value) <= 1e-12 * largest else value for value in values]
    return [_tick_number(value, has_exponent=has_exponents(values)) for value in values]


def has_exponents(values: Sequence[float]) -> bool:
    """Whether numbers side by side are written with exponents, which one is enough to ask for."""
    return not all(value == 0 or 1e-3 <= abs(value) < 1e5 for value in values)


def _tick_number(value: float, *, has_exponent: bool) -> str:
    if value == 0 or not has_exponent:
        return f"{value:.6g}".replace("-", "−")
    mantissa, exponent = f"{value:.4e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")


def correlation_text(value: float) -> str:
    """A correlation with two decimals, or that it is undefined."""
    return f"{value:.2f}".replace("-", "−") if math.isfinite(value) else "undefined"


def short_name(name: str, longest: int = 30) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= longest else f"…{name[1 - longest :]}"
