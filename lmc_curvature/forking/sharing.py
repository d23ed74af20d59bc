"""Tasks that any number of processes do together.

Every process is given the same tasks and claims one at a time by locking a file, which the operating system releases
when the process ends, however it ends. So processes need not know of each other: helpers that one call starts, the
ranks of `torchrun`, and the same command in two terminals all share the work, and a task that was cut short is taken up
again.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from filelock import FileLock, Timeout

_PAUSE = 0.5


@runtime_checkable
class Task(Protocol):
    """Something that one process at a time may work on."""

    @property
    def lock_path(self) -> Path:
        """The file to lock."""
        ...

    def is_done(self) -> bool:
        """Whether nothing is left to do, whoever did it."""
        ...

    def is_ready(self) -> bool:
        """Whether what it needs is there."""
        ...

    def run(self) -> None:
        """Do it."""
        ...


def share(tasks: Sequence[Task], *, on_turn: Callable[[], None] = lambda: None) -> None:
    """Return when all tasks are done, by this process or by others.

    Args:
        tasks: In the order to try them.
        on_turn: Called before a task is chosen, and again and again while waiting for others.
    """
    remaining = list(tasks)
    while remaining := [task for task in remaining if not task.is_done()]:
        on_turn()
        if not any(_claim(task) for task in remaining):
            time.sleep(_PAUSE)
    on_turn()


def unless_claimed(lock_path: Path, action: Callable[[], None]) -> bool:
    """Do something under a lock unless another process holds it; whether it was done here."""
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock_path, timeout=0):
            action()
    except Timeout:
        return False
    return True


def _claim(task: Task) -> bool:
    """Do a task unless it is not ready or another process has it; whether it was done here."""

    def run() -> None:
        # Another process may have finished it between the two looks.
        if not task.is_done():
            task.run()

    return task.is_ready() and unless_claimed(task.lock_path, run)


@contextlib.contextmanager
def helpers(count: int, target: Callable[..., None], *args: Any) -> Iterator[None]:
    """Within the block, let `count` more processes run `target(*args)`; the block ends when they have.

    They end with this process, however it ends.
    """
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_help, args=(os.getpid(), target, args)) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            process.join()
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed:
            warnings.warn(
                f"{len(failed)} of {count} helper processes ended early (exit codes {failed}); their work was done by "
                "the others. Is there memory enough for so many workers?",
                stacklevel=3,
            )
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _help(parent: int, target: Callable[..., None], args: Sequence[Any]) -> None:
    # Ctrl-C reaches every process of a terminal; the first one decides, and ends its helpers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    target(*args)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PAUSE)
    os._exit(1)


def is_first_rank() -> bool:
    """Whether this process is the one of a `torchrun` to report progress; also without `torchrun`."""
    return os.environ.get("RANK", "0") == "0"


def device_of_rank(device: torch.device | str) -> torch.device:
    """The device to use: under `torchrun`, `"cuda"` is the one of the local rank."""
    device = torch.device(device)
    rank = os.environ.get("LOCAL_RANK")
    if device.type == "cuda" and device.index is None and rank is not None:
        return torch.device("cuda", int(rank) % torch.cuda.device_count())
    return device


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Within the block, let torch use so many CPU threads; as many as before for None."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
