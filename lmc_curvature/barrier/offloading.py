"""Where the states of several anchors are while the loss is differentiated at one of them."""

from typing import Literal, get_args

import torch

from lmc_curvature.curvature.sweep.memory import free_bytes
from lmc_curvature.errors import OptionError, check_choice
from lmc_curvature.objective import Objective
from lmc_curvature.objective.sharding import is_spread
from lmc_curvature.segment import Segment

Offload = Literal["auto", "cpu", "none"]
"""Where the states of several anchors are: `"none"`, all on the device; `"cpu"`, in the host's memory, or to be made of
the two networks there, and on the device one at a time; `"auto"`, the first where they fit, see `is_offloaded`."""

# Of the states together: so many bytes are held anywhere; of more, a device holds a share of what it has free.
_SMALL, _SHARE = 256 * 2**20, 0.25


def is_offloaded(offload: Offload, size: int, device: torch.device, free: float) -> bool:
    """Whether the states of several anchors are not all held on the device.

    By default they are where they are small together, or, on a device with memory of its own, a quarter at most of what
    is free there. In the host's memory large ones are not: to make one takes a pass over the weights, which is nothing
    beside a sweep.

    Args:
        offload: What was asked for.
        size: Bytes of all that would be held.
        device: The device.
        free: Bytes that are free there.

    Raises:
        OptionError: `offload` is not a choice.
    """
    check_choice("offload", offload, get_args(Offload))
    if offload != "auto":
        return offload == "cpu"
    return size > _SMALL and (device.type == "cpu" or size > _SHARE * free)


def offloads(offload: Offload, objective: Objective, segment: Segment, anchors: int) -> bool:
    """Whether the states at some anchors of a segment, its ends among them, are held elsewhere than on the device.

    Args:
        offload: What was asked for.
        objective: The loss.
        segment: The segment.
        anchors: How many anchors there are.

    Raises:
        OptionError: `offload` is not a choice.
    """
    if is_spread(segment.start):
        if offload == "cpu" and objective.device.type != "cpu":
            raise OptionError(
                "offload='cpu': of networks that are spread over processes every rank holds its part alone, on its "
                "device. Leave offload out."
            )
        return False
    numbers = sum(tensor.numel() for tensor in segment.start.values())
    # With the directions, which are as large as a state.
    size = (anchors + 1) * numbers * objective.dtype.itemsize
    return is_offloaded(offload, size, objective.device, free_bytes(objective.device))


def offload_notes(device: torch.device) -> tuple[str, ...]:
    """What is said beside numbers whose states were offloaded from a device; nothing where it is the host itself."""
    if device.type == "cpu":
        return ()
    return (f"states were in the host's memory, and on {device} one at a time (offload='cpu')",)
