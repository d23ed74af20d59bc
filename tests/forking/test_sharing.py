import functools
import os
import signal
import time

import pytest
from filelock import FileLock

from lmc_curvature.forking.sharing import Task, helpers, progress_of_rank, share


def write(directory, name, *, needs="", seconds=0.0):
    """The task of writing a file with the writer's process number."""

    def work(bar):
        time.sleep(seconds)
        with (directory / "order").open("a") as file:
            file.write(f"{name}\n")
        (directory / name).write_text(str(os.getpid()))

    return Task(
        name,
        directory / "locks" / name,
        is_done=(directory / name).exists,
        is_ready=lambda: not needs or (directory / needs).exists(),
        work=work,
    )


def order(directory):
    return (directory / "order").read_text().split()


def share_writes(directory, names="abcdefgh"):
    tasks = [write(directory, name, seconds=0.2) for name in names]
    share(tasks, total=len(tasks), count=lambda: sum(task.is_done() for task in tasks), progress=False)


def test_tasks_are_done_once_and_wait_for_what_they_need(tmp_path):
    tasks = [write(tmp_path, "b", needs="a"), write(tmp_path, "a"), write(tmp_path, "c", needs="b")]
    share(tasks, total=3, count=lambda: 0, progress=False)
    assert order(tmp_path) == ["a", "b", "c"]


def test_a_task_somebody_else_works_on_is_left_to_them(tmp_path):
    task, turns = write(tmp_path, "a"), []
    task.lock_path.parent.mkdir()
    lock = FileLock(task.lock_path)
    lock.acquire()

    def count():
        turns.append(1)
        if len(turns) == 2:
            # The other one ends, without having done it.
            lock.release()
        return 0

    share([task], total=1, count=count, progress=False)
    assert len(turns) >= 3
    assert order(tmp_path) == ["a"]


@pytest.mark.check
def test_processes_share_tasks(tmp_path):
    with helpers(1, functools.partial(share_writes, tmp_path)):
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("[a-h]")) and time.monotonic() < deadline:
            time.sleep(0.02)
        share_writes(tmp_path)
    assert sorted(order(tmp_path)) == list("abcdefgh")
    writers = {int((tmp_path / name).read_text()) for name in "abcdefgh"}
    assert len(writers) == 2
    assert os.getpid() in writers


def test_helpers_end_with_the_block_that_fails():
    start = time.monotonic()
    with pytest.raises(KeyError), helpers(1, functools.partial(time.sleep, 60)):
        raise KeyError
    assert time.monotonic() - start < 30


@pytest.mark.check
def test_helpers_that_end_early_are_mentioned():
    with (
        pytest.warns(UserWarning, match=r"1 of 1 helper processes ended early \(exit codes \[3\]\)"),
        helpers(1, functools.partial(os._exit, 3)),
    ):
        pass


def fail():
    raise ValueError("nothing to divide by")


@pytest.mark.check
def test_why_helpers_end_early_is_told_by_who_asked_for_them(capfd):
    message = r"2 of 2 helper processes ended early \(ValueError: nothing to divide by\); their work was done by the"
    with pytest.warns(UserWarning, match=message), helpers(2, fail):
        pass
    assert capfd.readouterr() == ("", "")


@pytest.mark.check
def test_interrupts_are_for_the_process_that_asked_for_help(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), helpers(1, functools.partial(interrupt_and_write, tmp_path / "a")):
        deadline = time.monotonic() + 60
        while not (tmp_path / "a").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        raise KeyError
    assert (tmp_path / "a").read_text() == "still here"
    assert signal.getsignal(signal.SIGINT) is handler


def interrupt_and_write(path):
    os.kill(os.getpid(), signal.SIGINT)
    path.write_text("still here")


def test_the_first_rank_reports(monkeypatch):
    assert [progress_of_rank(progress) for progress in (None, True, False)] == [None, True, False]
    monkeypatch.setenv("RANK", "1")
    assert [progress_of_rank(progress) for progress in (None, True)] == [False, False]
