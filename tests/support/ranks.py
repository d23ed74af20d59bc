"""Processes that share the batches, as `torchrun` would start them, for tests to give work to."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


class Crew:
    """Ranks of one process group (gloo), whose store this process holds."""

    def __init__(self, size: int):
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        # What takes seconds is imported once.
        context.set_forkserver_preload(["torch.distributed", "lmc_curvature"])
        pipes = [context.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, size, self._store.port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, work: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """What `work(rank, *args)` returns on every rank; a string for an exception, None for a rank that is gone."""
        self.start(work, *args)
        return self.results(timeout)

    def start(self, work: Callable[..., Any], *args: Any) -> None:
        """Have every rank begin with `work(rank, *args)`."""
        for pipe in self._pipes:
            pipe.send((work, args))

    def results(self, timeout: float = 120) -> list[Any]:
        """What every rank returned, see `run`."""
        found: dict[Connection, Any] = {}
        while len(found) < len(self._pipes):
            ready = wait([pipe for pipe in self._pipes if pipe not in found], timeout)
            assert ready, f"ranks {[n for n, pipe in enumerate(self._pipes) if pipe not in found]} hang"
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    found[pipe] = pipe.recv()
                except EOFError:
                    found[pipe] = None
        return [found[pipe] for pipe in self._pipes]

    def close(self) -> None:
        for process in self.processes:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            process.join()


@contextlib.contextmanager
def crew(size: int) -> Iterator[Crew]:
    """A crew for as long as the block lasts."""
    made = Crew(size)
    try:
        yield made
    finally:
        made.close()


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    while True:
        work, args = pipe.recv()
        try:
            result = work(rank, *args)
        except Exception as error:  # noqa: BLE001 - it is told to the test
            traceback.print_exc()
            result = f"{type(error).__name__}: {error}"
        pipe.send(result)
