"""Roads that are made ready in a process of their own, and measured there when their turn comes.

A compiler may take minutes, or not come back. So it works beside what is measured first, and whoever is not ready when
its turn comes is left out, and said to be.
"""

import dataclasses
import math
import multiprocessing
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.compilation import first_line
from benchmarks.support.timing import Measurement, Pace, Road, clock, measure

Makers = Mapping[str, Callable[[], Road]]
Measured = tuple[dict[str, Measurement], list[str]]
"""Measurements by name, and notes on what is missing."""


class Elsewhere:
    """A process that makes roads, one after another, and measures those that it has when it is asked to.

    Args:
        what: What it makes, for notes.
        makers: Importable function that returns, from `arguments`, the functions that make the roads.
        arguments: What it is called with.
        pace: Number and length of samples.
        device: The device of the roads.
    """

    def __init__(
        self, what: str, makers: Callable[..., Makers], arguments: Mapping[str, Any], pace: Pace, device: torch.device
    ):
        self._what = what
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # It ends by itself once nobody is left at the other end; a daemon could not have the compiler's processes.
        self._process = context.Process(target=_serve, args=(theirs, makers, dict(arguments), pace, str(device)))
        self._process.start()
        theirs.close()

    def measured(self, seconds: float) -> Measured:
        """What it measures within some seconds, after which it is ended; in half of them it may still make roads."""
        missing = f"{self._what} are missing: they were not ready, or not measured, in time."
        try:
            self._pipe.send(seconds)
            if not self._pipe.poll(max(seconds, 0.0)):
                return {}, [missing]
            found, notes = self._pipe.recv()
        except (EOFError, OSError):
            return {}, [f"{self._what} are missing: their process ended."]
        finally:
            self.stop()
        return {name: _restored(name, values) for name, values in found.items()}, notes

    def stop(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, makers: Callable[..., Makers], arguments: dict[str, Any], pace: Pace, device: str) -> None:
    roads, notes, until = [], [], math.inf
    try:
        for name, make in makers(**arguments).items():
            if until == math.inf and pipe.poll():
                until = clock() + pipe.recv() / 2
            if clock() > until:
                notes.append(f"{name} is missing: there was no time to make it.")
                continue
            try:
                roads.append(make())
            except (RuntimeError, NotImplementedError) as error:
                notes.append(f"{name} is missing, since it cannot be made: {first_line(error)}")
            # Others are measured meanwhile, and need the memory.
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        if until == math.inf:
            pipe.recv()
        found = measure(roads, pace, torch.device(device))
        pipe.send(({name: _sent(measurement) for name, measurement in found.items()}, notes))
    except EOFError:
        return
    except Exception:  # noqa: BLE001 (it is passed on)
        pipe.send(({}, [*notes, f"A process that made roads failed: {traceback.format_exc().splitlines()[-1]}"]))


def _sent(measurement: Measurement) -> dict[str, Any]:
    """A measurement without functions, and with its result on the host."""
    result = measurement.result
    values = {field.name: getattr(measurement, field.name) for field in dataclasses.fields(measurement)}
    values["result"] = result.detach().cpu().numpy() if isinstance(result, Tensor) else None
    road = measurement.road
    values["road"] = {"vectors": road.vectors, "note": road.note}
    return values


def _restored(name: str, values: dict[str, Any]) -> Measurement:
    result = values["result"]
    return Measurement(
        **{
            **values,
            "road": Road(name, _not_here, _not_here, **values["road"]),
            "result": None if result is None else torch.from_numpy(result),
        }
    )


def _not_here() -> None:
    raise RuntimeError("This road is in another process.")
