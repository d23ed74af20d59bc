import dataclasses
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from lmc_curvature.forking.sharing import helpers, is_first_rank, share


@dataclasses.dataclass
class Write:
    """The task of writing a file with the writer's process number."""

    directory: Path
    name: str
    needs: str = ""
    seconds: float = 0.0

    @property
    def lock_path(self):
        return self.directory / "locks" / self.name

    def is_done(self):
        return (self.directory / self.name).exists()

    def is_ready(self):
        return not self.needs or (self.directory / self.needs).exists()

    def run(self):
        time.sleep(self.seconds)
        with (self.directory / "order").open("a") as file:
            file.write(f"{self.name}\n")
        (self.directory / self.name).write_text(str(os.getpid()))


def order(directory):
    return (directory / "order").read_text().split()


def share_writes(directory):
    share([Write(directory, name, seconds=0.4) for name in "abcdefgh"])


def test_tasks_are_done_once_and_wait_for_what_they_need(tmp_path):
    share([Write(tmp_path, "b", needs="a"), Write(tmp_path, "a"), Write(tmp_path, "c", needs="b")])
    assert order(tmp_path) == ["a", "b", "c"]


def test_a_task_somebody_else_works_on_is_left_to_them(tmp_path):
    task, turns = Write(tmp_path, "a"), []
    task.lock_path.parent.mkdir()
    lock = FileLock(task.lock_path)
    lock.acquire()

    def turn():
        turns.append(1)
        if len(turns) == 2:
            # The other one ends, without having done it.
            lock.release()

    share([task], on_turn=turn)
    assert len(turns) >= 3
    assert order(tmp_path) == ["a"]


def test_processes_share_tasks(tmp_path):
    with helpers(1, share_writes, tmp_path):
        share_writes(tmp_path)
    assert sorted(order(tmp_path)) == list("abcdefgh")
    assert os.getpid() in {int((tmp_path / name).read_text()) for name in "abcdefgh"}


def fail():
    time.sleep(60)


def test_helpers_end_with_the_block_that_fails():
    start = time.monotonic()
    with pytest.raises(KeyError), helpers(1, fail):
        raise KeyError
    assert time.monotonic() - start < 30


def test_the_first_rank_reports(monkeypatch):
    assert is_first_rank()
    monkeypatch.setenv("RANK", "1")
    assert not is_first_rank()


def test_helpers_take_part(tmp_path):
    with helpers(1, share_writes, tmp_path):
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("[a-h]")) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert os.getpid() not in {int((tmp_path / name).read_text()) for name in "abcdefgh"}


def end_early():
    os._exit(3)


def test_helpers_that_end_early_are_mentioned():
    with (
        pytest.warns(UserWarning, match=r"1 of 1 helper processes ended early \(exit codes \[3\]\)"),
        helpers(1, end_early),
    ):
        pass
