"""A stand-in for the recorder of CUDA graphs, which needs no device."""

from collections.abc import Callable
from typing import Any

from lmc_curvature import Objective
from lmc_curvature.replay import Outcome, Replays


class Repeater:
    """Records calls as a graph does: what repeats one reads and writes the same tensors.

    Attributes:
        recorded: Number of calls that were recorded.
        replayed: Number of times that one was repeated.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], Outcome]) -> tuple[Callable[[], Any], Outcome]:
        """Record a call."""
        self.recorded += 1
        tensors, layout = run()

        def replay() -> None:
            self.replayed += 1
            for tensor, again in zip(tensors, run()[0], strict=True):
                tensor.copy_(again)

        return replay, (tensors, layout)


def let_replay(objective: Objective) -> Repeater:
    """Let an objective on a CPU replay what it does on a CUDA device."""
    repeater = Repeater()
    objective.memo.replace("replays", Replays(repeater))
    return repeater
