"""Roads to the same result, timed side by side in one run.

A machine's speed drifts while a benchmark runs. So the roads take turns, in several rounds whose order alternates, and
each sample stands between two samples of F, the network's own forward pass, which tell how fast the machine was then.
"""

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer as clock
from tqdm.auto import tqdm

from benchmarks.support.memory import graph_pool_bytes, peak_bytes

Run = Callable[[], Any]
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Road:
    """One way to a result.

    Attributes:
        name: Name in tables.
        run: Does the work once.
        forward: One forward pass without gradients, of the same network on the same data: the unit F.
        vectors: Number of vectors that `run` treats together; times are given for one of them. A road that does only a
            share of the work has that share, and times are extrapolated.
        warms_up: True if the first call does more than later ones, so that it is never a sample.
        memory_run: Does as much of the work as reaches its peak of memory, for work too long to profile.
        note: A remark for readers of the table.
    """

    name: str
    run: Run
    forward: Run
    vectors: float = 1
    warms_up: bool = False
    memory_run: Run | None = None
    note: str = ""


@dataclass(frozen=True)
class Pace:
    """Number and length of samples.

    Attributes:
        rounds: Number of samples of each road.
        seconds: Least duration of a sample; a single call may take longer.
        budget: Seconds after which a road gets no further sample.
        until: Time of the clock after which no road is begun, or sampled another time.
    """

    rounds: int
    seconds: float
    budget: float
    until: float = math.inf

    @property
    def is_over(self) -> bool:
        """Whether the clock has passed `until`."""
        return clock() > self.until


PACES = {"full": Pace(5, 0.5, 15.0), "quick": Pace(3, 0.2, 4.0), "smoke": Pace(1, 0.0, 0.0)}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a few samples."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """The spread of some samples; not-a-number if there are none."""
        if not len(samples):
            return cls(float("nan"), float("nan"), float("nan"))
        low, median, high = np.quantile(np.asarray(samples, dtype=float), [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high)

    @classmethod
    def exactly(cls, value: float) -> "Spread":
        """A single value, without width."""
        return cls(value, value, value)

    def over(self, other: "Spread") -> "Spread":
        """The ratio of two medians, and how far the quartiles let it go."""
        return Spread(self.median / other.median, self.low / other.high, self.high / other.low)


@dataclass(eq=False)
class Measurement:
    """Times and memory of a road.

    Attributes:
        road: The road.
        result: Its result at the first call.
        seconds: Time of each sample, for one vector.
        multiples: The same in F.
        peak: Bytes it had allocated at most, over what was allocated before, and those that the CUDA graphs of its
            first call keep; None if that was not measured.
        spent: Seconds that all samples took together.
        first_call_only: True if the road takes so long that the first call, which warms up, is the only sample.
        failure: The reason for missing values; empty if there is none.
    """

    road: Road
    result: Any = None
    seconds: list[float] = field(default_factory=list)
    multiples: list[float] = field(default_factory=list)
    peak: float | None = None
    spent: float = 0.0
    first_call_only: bool = False
    failure: str = ""

    @property
    def time(self) -> Spread:
        """Seconds for one vector."""
        return Spread.of(self.seconds)

    @property
    def in_forwards(self) -> Spread:
        """Time for one vector, in F."""
        return Spread.of(self.multiples)

    def add(self, seconds: float, forward: float) -> None:
        """Add a sample."""
        self.seconds.append(seconds / self.road.vectors)
        self.multiples.append(seconds / self.road.vectors / forward)


def measure(roads: Sequence[Road], pace: Pace, device: torch.device) -> dict[str, Measurement]:
    """Run every road once, measure its peak of memory, and time the roads in rounds.

    Args:
        roads: The roads, each with another name.
        pace: Number and length of samples.
        device: The device whose memory is observed.

    Returns:
        Measurements by name, in the order given.
    """
    forwards = _Forwards(pace)
    found = {road.name: Measurement(road) for road in roads}
    with _garbage_frozen(), tqdm(total=len(found) * (1 + pace.rounds), desc="roads", unit="sample") as bar:
        for measurement in found.values():
            bar.set_description(measurement.road.name)
            _run_first(measurement, forwards, pace, device)
            bar.update()
        forwards.forget()
        for number in range(pace.rounds):
            for measurement in list(found.values())[:: 1 if number % 2 == 0 else -1]:
                bar.set_description(measurement.road.name)
                spent = measurement.multiples and measurement.spent >= pace.budget
                if not (measurement.failure or spent or (measurement.multiples and pace.is_over)):
                    _sample(measurement, forwards, pace)
                bar.update()
    return found


@contextlib.contextmanager
def _garbage_frozen() -> Iterator[None]:
    """Exempt all living objects from garbage collection, which then takes almost no time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _sample(measurement: Measurement, forwards: "_Forwards", pace: Pace) -> None:
    road = measurement.road
    before = forwards.fresh(road.forward)
    # `Timer` switches the collector off, and a road may leave garbage with cycles.
    gc.collect()
    start = clock()
    seconds = sample_seconds(road.run, pace.seconds)
    measurement.spent += clock() - start
    measurement.add(seconds, (before + forwards.sample(road.forward)) / 2)


def _run_first(measurement: Measurement, forwards: "_Forwards", pace: Pace, device: torch.device) -> None:
    """The first call, which warms up; where it takes long, it is the only sample."""
    road = measurement.road
    if pace.is_over:
        measurement.failure = "no time was left"
        return
    road.forward()
    before = forwards.sample(road.forward)
    pools = graph_pool_bytes(device)
    try:
        gc.collect()
        start = clock()
        measurement.result = road.run()
        seconds = clock() - start
        if seconds >= pace.budget and not road.warms_up:
            measurement.spent, measurement.first_call_only = seconds, True
            measurement.add(seconds, (before + forwards.sample(road.forward)) / 2)
        kept = max(graph_pool_bytes(device) - pools, 0.0)
        measurement.peak = kept + peak_bytes(road.memory_run or road.run, device)
    except torch.OutOfMemoryError:
        measurement.failure = "out of memory"
    except RuntimeError as error:
        measurement.failure = f"fails: {str(error).partition('. ')[0].splitlines()[0]}"


class _Forwards:
    """Samples of F; the last one serves as long as nothing else has run."""

    def __init__(self, pace: Pace):
        self._seconds = pace.seconds / 4
        self._last: tuple[Run, float] | None = None

    def sample(self, forward: Run) -> float:
        self._last = (forward, sample_seconds(forward, self._seconds))
        return self._last[1]

    def forget(self) -> None:
        """Something else has run."""
        self._last = None

    def fresh(self, forward: Run) -> float:
        if self._last is not None and self._last[0] == forward:
            return self._last[1]
        return self.sample(forward)


def sample_seconds(run: Run, least: float) -> float:
    """Median time of a call, from calls that take `least` seconds together; waits for the device."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=max(least, 1e-6)).median


def seconds_once(run: Run) -> tuple[float, Any]:
    """Time of a single call, for what cannot be repeated, and what it returned."""
    start = clock()
    result = run()
    return clock() - start, result


def in_turns(runs: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """Results of every run in each round, by name; the order alternates between rounds."""
    results: dict[str, list[Result]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        for name in names[:: 1 if number % 2 == 0 else -1]:
            results[name].append(runs[name]())
    return results


def seconds_in_turns(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in each round; see `in_turns`."""
    return in_turns({name: lambda run=run: seconds_once(run)[0] for name, run in runs.items()}, rounds)
