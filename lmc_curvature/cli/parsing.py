"""Values that options hold as text: numbers with commas between them, keys with values, names."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmc_curvature.errors import OptionError

if TYPE_CHECKING:
    from lmc_curvature.barrier.metrics import Metric
    from lmc_curvature.objective import LossFunction


def numbers_in(option: str, text: str, kind: Callable[[str], float], expected: str) -> tuple[Any, ...]:
    """The numbers in an option's value, with commas between them.

    Raises:
        OptionError: They are not numbers of that kind.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"{option} {text!r}: expected {expected}.") from error


def names_in(option: str, text: str | None, of: str = "layer") -> list[str] | None:
    """The names of layers, or of something else, in an option's value, with commas between; None where it is not given.

    Raises:
        OptionError: It names none.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise OptionError(f"{option} {text!r} names no {of}; expected names with commas between them: A,B.")
    return names


def key_and_value(option: str) -> tuple[str, Any]:
    """The key and the value, which JSON may write, of one `--model-option`.

    Raises:
        OptionError: It is not KEY=VALUE.
    """
    key, equals, value = option.partition("=")
    if not equals or not key:
        raise OptionError(f"--model-option {option!r}: expected KEY=VALUE, such as num_classes=10.")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def anchor_positions(anchors: str) -> list[float]:
    """The positions that `--anchors` asks for.

    Raises:
        OptionError: It is neither a number of anchors nor positions that rise from 0 to 1.
    """
    from lmc_curvature.barrier.expansions import check_anchors

    counts = "," not in anchors
    expected = "a number of anchors, or positions that rise from 0 to 1, such as 0,0.3,1"
    found = numbers_in("--anchors", anchors, int if counts else float, expected)
    return check_anchors(found[0] if counts else found).tolist()


def metric_names(metrics: str | None, loss_fn: "LossFunction") -> "tuple[Metric, ...]":
    """The metrics that `--metrics` names; without it both, or the loss alone where there is no error.

    Raises:
        OptionError: A metric is unknown, or does not go with the loss.
    """
    import torch.nn.functional as F

    from lmc_curvature.barrier.metrics import METRICS, check_metrics
    from lmc_curvature.objective import BatchLoss

    alone = loss_fn is F.mse_loss or isinstance(loss_fn, BatchLoss)
    given: Any = (METRICS[:1] if alone else METRICS) if metrics is None else tuple(metrics.split(","))
    check_metrics(given, loss_fn)
    return given


def image_options(mean: str | None, std: str | None, resize: str | None, transform: str | None) -> dict[str, Any]:
    """How images become what networks take, as `load_data` takes it.

    Raises:
        OptionError: They are not numbers, or not all that belong together, or do not go with `--transform`.
    """
    given = [name for name, text in (("mean", mean), ("std", std), ("resize", resize)) if text is not None]
    if transform is not None and given:
        raise OptionError(f"--{given[0]} is part of what --transform does: choose one of them.")
    if (mean is None) != (std is None):
        raise OptionError(f"--{given[0]} is given alone: images are normalised by --mean and --std.")
    a_channel = "a number a channel, such as 0.485,0.456,0.406"
    return {
        "mean": None if mean is None else numbers_in("--mean", mean, float, a_channel),
        "std": None if std is None else numbers_in("--std", std, float, a_channel),
        "resize": None if resize is None else _size(resize),
    }


def _size(resize: str) -> int | tuple[int, int]:
    expected = "SIZE or SIZE,CROP, such as 256,224"
    match numbers_in("--resize", resize, int, expected):
        case (size,):
            return size
        case (size, crop):
            return size, crop
    raise OptionError(f"--resize {resize!r}: expected {expected}.")
