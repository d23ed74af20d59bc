"""The machine, the versions and the commit that a measurement belongs to."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import lmc_curvature


def environment(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions, and the commit of the library that was imported."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **commit_of(Path(lmc_curvature.__file__).parents[1]),
    }


def commit_of(folder: Path) -> dict[str, Any]:
    """The commit that is checked out in a folder, and whether its files differ from it (`dirty`).

    Both are None where the folder is not the root of a git repository.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) == folder.resolve():
            return {"commit": git("rev-parse", "--short", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        pass
    return {"commit": None, "dirty": None}


def processor_name(table: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system's table of processors gives it, else its architecture."""
    lines = table.read_text().splitlines() if table.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
