"""The trainers of one process: as many as work in turns, each used again for the next network."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from lmc_curvature.forking.trainer import Trainer

# More of them no longer fill gaps that the others leave.
_MOST = 8
_SHARE_OF_MEMORY = 0.8


class Trainers:
    """Trainers on one device, made when they are needed and kept: recording the steps of one takes a second.

    Args:
        build: Makes one, on the device.
        device: The device.
    """

    def __init__(self, build: Callable[[], Trainer], device: torch.device):
        self._build, self._device = build, device
        self._idle: list[Trainer] = []

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[Trainer]:
        """Within the block, have a trainer to oneself, in a state that somebody else has left it in."""
        trainer = self._idle.pop() if self._idle else self._build()
        try:
            yield trainer
        finally:
            self._idle.append(trainer)

    def room(self, processes: int) -> int:
        """The number of networks that are best trained in turns: those that fit into a GPU's memory.

        It is one where steps are not replayed, and the CPU is what they wait for.

        Args:
            processes: How many share the device.
        """
        if self._device.type != "cuda":
            return 1
        before = torch.cuda.memory_reserved(self._device)
        with self.borrowed() as trainer:
            if not trainer.replays:
                return 1
            one = torch.cuda.memory_reserved(self._device) - before
        free, _ = torch.cuda.mem_get_info(self._device)
        return trainers_that_fit(free, one, processes)


def trainers_that_fit(free: int, one: int, processes: int) -> int:
    """How many trainers a process may have that has one already, with so many bytes free and needed for one."""
    more = int(_SHARE_OF_MEMORY * free) // (max(one, 1) * processes)
    return min(1 + more, _MOST)
