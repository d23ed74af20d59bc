"""Commands under `torchrun`: all ranks compute together, and rank 0 prints and writes."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmc_curvature.cli.options import Comparison


def is_rank() -> bool:
    """Whether this process was started by `torchrun`."""
    # As torch.distributed.is_torchelastic_launched tells it, without the seconds that importing torch takes.
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Whether this process is the one that prints: the only one, or rank 0."""
    return not is_rank() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def one_answer(comparison: "Comparison", own: dict[str, Any]) -> Iterator["tuple[Comparison, dict[str, Any]]"]:
    """Within the block, a command's options, by which ranks other than the first print and write nothing.

    Args:
        comparison: The options that commands share.
        own: The command's own options.
    """
    if not is_rank():
        yield comparison, own
        return
    import torch
    import torch.distributed as dist

    device = torch.device(comparison.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    comparison = dataclasses.replace(comparison, device=str(device))
    try:
        if dist.get_rank() == 0:
            yield comparison, own
            return
        silent = dataclasses.replace(comparison, save=None, plot=None, progress=False)
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield silent, {name: None if name == "out" else value for name, value in own.items()}
    finally:
        dist.destroy_process_group()
