"""The machine, the versions and the commit that a measurement belongs to."""

import platform
from pathlib import Path
from typing import Any

import torch

import lmc_curvature
from lmc_curvature.cli.provenance import commit_of


def environment(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions, and the commit of the library that was imported."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **short_commit(Path(lmc_curvature.__file__).parents[1]),
    }


def short_commit(folder: Path) -> dict[str, Any]:
    """The commit that is checked out in a folder, by seven digits, and whether its files differ from it (`dirty`)."""
    found = commit_of(folder)
    return found | {"commit": found["commit"] and found["commit"][:7]}


def processor_name(table: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system's table of processors gives it, else its architecture."""
    lines = table.read_text().splitlines() if table.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
