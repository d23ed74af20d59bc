"""Memory that is free: of a CUDA device, or of the machine and the container that the process runs in."""

import math
from pathlib import Path

import psutil
import torch

# Of each version of Linux's control groups: where they are, and the files with the limit, with what is in use, and the
# line in memory.stat with what is in use as a cache of files, which gives way.
_GROUPS = {
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_bytes(device: torch.device) -> float:
    """Bytes that could still be taken on a device."""
    if device.type == "cuda":
        # What torch has taken and does not use is free, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    return min(float(psutil.virtual_memory().available), container_bytes())


def container_bytes(root: Path = Path("/")) -> float:
    """Bytes that the control groups of this process still allow it; infinite where there are none, or no limit.

    Args:
        root: Root of the file system.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    least = math.inf
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            mount, *names = _GROUPS[2 if number == "0" else 1]
            group = root / mount / path.lstrip("/")
            # A limit of a group holds for those within it; a container may see its own as the outermost.
            folders = [folder for folder in (group, *group.parents) if folder.is_relative_to(root / mount)]
            least = min([least, *(_left(folder, *names) for folder in folders)])
    return least


def _left(folder: Path, limit: str, used: str, cache: str) -> float:
    try:
        most, now = int((folder / limit).read_text()), int((folder / used).read_text())
        lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        # Without a limit the file says "max".
        return math.inf
    return float(max(0, most - now + int(lines.get(cache, 0))))
