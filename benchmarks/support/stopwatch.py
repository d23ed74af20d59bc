"""Time and operations of the functions that a computation calls, each without those of the others within it."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch.utils.flop_counter import FlopCounterMode

Clock = Callable[[], float]


@dataclass(frozen=True)
class Part:
    """A function that is watched.

    Attributes:
        module: A module that calls the function by this name.
        function: Its name there.
        row: What its time is counted as.
    """

    module: ModuleType
    function: str
    row: str


@dataclass
class _Watch:
    clock: Clock
    spent: dict[str, float] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    last: float = 0.0

    def switch(self) -> None:
        now = self.clock()
        if self.running:
            self.spent[self.running[-1]] = self.spent.get(self.running[-1], 0.0) + now - self.last
        self.last = now

    @contextlib.contextmanager
    def counting(self, row: str) -> Iterator[None]:
        self.switch()
        self.running.append(row)
        try:
            yield
        finally:
            self.switch()
            self.running.pop()


def watched(
    run: Callable[[], Any], parts: list[Part], *, rest: str, clock: Clock = time.perf_counter
) -> Mapping[str, float]:
    """What a call spends in each row, and in the `rest`, by a clock that only goes forward."""
    watch = _Watch(clock)
    with contextlib.ExitStack() as patches:
        for part in parts:
            patches.enter_context(patch.object(part.module, part.function, _wrapped(watch, part)))
        with watch.counting(rest):
            run()
    return watch.spent


def _wrapped(watch: _Watch, part: Part) -> Callable[..., Any]:
    function = getattr(part.module, part.function)

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        with watch.counting(part.row):
            return function(*args, **kwargs)

    return counted


def operations_watched(run: Callable[[], Any], parts: list[Part], *, rest: str) -> Mapping[str, float]:
    """The multiplications and additions of convolutions and matrix products that a call spends in each row."""
    with FlopCounterMode(display=False) as counter:
        return watched(run, parts, rest=rest, clock=counter.get_total_flops)
