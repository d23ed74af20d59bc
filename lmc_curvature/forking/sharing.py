"""Tasks that any number of processes do together.

Every process is given the same tasks and claims one at a time by locking a file, which the operating system releases
when the process ends, however it ends. So processes need not know of each other: helpers that one call starts, the
ranks of `torchrun`, and the same command in two terminals all share the work, and a task that was cut short is taken up
again.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from lmc_curvature.objective.network import parse_device

_PAUSE = 0.5
_SHOWN = 500
_OVER = object()
_Work = Generator[None, None, None]


@dataclasses.dataclass(frozen=True)
class Task:
    """Something that one process at a time may work on.

    Attributes:
        title: The name that the progress bar shows while it is worked on.
        lock_path: The file that whoever works on it locks.
        is_done: Tells whether nothing is left to do, whoever did it.
        work: Does it, given the progress bar of all tasks; or returns an iterator that does a little of it each time
            it is advanced, so that one process may work on several tasks in turns.
        is_ready: Tells whether what it needs is there.
    """

    title: str
    lock_path: Path
    is_done: Callable[[], bool]
    work: Callable[[tqdm], Iterable[None] | None]
    is_ready: Callable[[], bool] = lambda: True


def share(
    tasks: Sequence[Task],
    *,
    total: int,
    count: Callable[[], int],
    together: int = 1,
    threads: int | None = None,
    progress: bool | None = None,
) -> None:
    """Return when all tasks are done, by this process or by others.

    Args:
        tasks: The tasks, in the order to try them.
        total: The epochs that all tasks are about.
        count: Tells how many of these are done, whoever did them.
        together: How many tasks this process works on in turns.
        threads: CPU threads to work with; by default as many as torch uses.
        progress: Show one bar of epochs; by default on a terminal and in notebooks.
    """
    remaining, claims = list(tasks), dict[str, _Work]()
    off = None if progress is None else not progress
    with cpu_threads(threads), tqdm(total=total, initial=count(), unit="epoch", disable=off) as bar:
        try:
            while remaining := [task for task in remaining if task.title in claims or not task.is_done()]:
                claimed = sum(_claim(task, claims, together, bar) for task in remaining)
                if not claims:
                    time.sleep(_PAUSE)
                # What was begun may have made others ready; later on, with room for more, look now and then.
                until = time.monotonic() + (0.0 if claimed else _PAUSE)
                _advance(claims)
                while claims and (len(claims) == together or time.monotonic() < until):
                    _advance(claims)
                bar.update(max(count() - bar.n, 0))
        finally:
            for claim in claims.values():
                claim.close()


def unless_claimed(lock_path: Path, action: Callable[[], None]) -> bool:
    """Do something under a lock unless another process holds it; return whether it was done here."""
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock_path, timeout=0):
            action()
    except Timeout:
        return False
    return True


def _claim(task: Task, claims: dict[str, _Work], together: int, bar: tqdm) -> bool:
    """Claim a task if there is room for it; return whether it was."""
    if task.title in claims or len(claims) >= together or not task.is_ready():
        return False
    claim = _work(task, bar)
    if next(claim, _OVER) is _OVER:
        return False
    claims[task.title] = claim
    return True


def _advance(claims: dict[str, _Work]) -> None:
    """Do a little of every task, and forget those that are over."""
    for title, claim in list(claims.items()):
        if next(claim, _OVER) is _OVER:
            del claims[title]


def _work(task: Task, bar: tqdm) -> _Work:
    """Lock a task, and then do it in turns with others; at once over if another process has it."""
    task.lock_path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(Timeout), FileLock(task.lock_path, timeout=0):
        # Another process may have finished it between the two looks.
        if not task.is_done():
            bar.set_description(task.title)
            yield
            yield from task.work(bar) or ()


@contextlib.contextmanager
def helpers(count: int, work: Callable[[], object]) -> Iterator[None]:
    """Within the block, let `count` more processes do the work; the block ends when they have.

    They end with this process, however it ends.

    Args:
        count: The number of processes.
        work: A function that can be pickled.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    processes = [context.Process(target=_help, args=(os.getpid(), work, sender)) for _ in range(count)]
    with _interrupts_ignored():
        for process in processes:
            process.start()
    try:
        yield
        for process in processes:
            process.join()
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed:
            _warn_of(failed, count, receiver.recv() if receiver.poll() else None)
    finally:
        for process in processes:
            process.terminate()
            process.join()
        receiver.close()
        sender.close()


def _warn_of(exit_codes: Sequence[int], count: int, error: str | None) -> None:
    ended = f"{len(exit_codes)} of {count} helper processes ended early"
    reason = error or f"exit codes {list(exit_codes)}"
    remedy = "" if error else " Is there memory enough for so many workers?"
    warnings.warn(f"{ended} ({reason}); their work was done by the others.{remedy}", stacklevel=4)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Within the block, Ctrl-C does nothing here, and never anything in the processes that are started.

    Ctrl-C reaches every process of a terminal, also those that are still importing; the first one decides, and ends its
    helpers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def _help(parent: int, work: Callable[[], object], errors: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        work()
    except Exception as error:  # noqa: BLE001 - whatever it is, the process that asked for help tells of it
        # So little is written at once, so that those of several processes do not mix.
        errors.send(f"{type(error).__name__}: {error}"[:_SHOWN])
        sys.exit(1)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PAUSE)
    os._exit(1)


def progress_of_rank(progress: bool | None) -> bool | None:
    """Return whether to show progress: under `torchrun`, only the first rank does."""
    return progress if os.environ.get("RANK", "0") == "0" else False


def device_of_rank(device: torch.device | str) -> torch.device:
    """Return the device to use: under `torchrun`, `"cuda"` is the one of the local rank.

    Raises:
        OptionError: There is no such device here.
    """
    device = parse_device(device)
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
