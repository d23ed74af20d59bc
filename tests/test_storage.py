"""Claim: files are written whole or not at all, come back bit for bit, and strange ones are refused."""

import errno
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.numpy import save_file

from lmc_curvature.checkpoints import write_snapshot
from lmc_curvature.errors import FileFormatError, NewerVersionError, OptionError
from lmc_curvature.storage import (
    check_arrays,
    check_writable,
    load_arrays,
    parse_json,
    read_json,
    save_arrays,
    write_atomically,
    write_json,
)

_ARRAYS = {
    "scalar": np.array(3.5),
    "turned": np.arange(6.0).reshape(2, 3).T,
    "empty": np.zeros((0, 2)),
    "whole": np.array([1, -2], dtype=np.int64),
    "strange": np.array([np.nan, np.inf, -0.0], dtype=np.float32),
}


def test_arrays_and_metadata_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "folder" / "file.safetensors"
    metadata = {"layers": ["α", "b"], "depth": {"x": None, "y": 0.1}}
    save_arrays(path, "test", _ARRAYS, **metadata)
    arrays, found = load_arrays(str(path), "test")
    assert found == metadata
    assert arrays.keys() == _ARRAYS.keys()
    for name, array in _ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].shape == array.shape
        assert arrays[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), write_atomically(path) as temporary:
        assert temporary.parent == tmp_path, "a move between file systems would not be atomic"
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with write_atomically(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    for name in ("before", "after"):
        with write_atomically(str(tmp_path / f"atomic {name}")):
            pass
        (tmp_path / name).write_text("")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_arrays_that_cannot_be_stored_leave_the_old_file(tmp_path):
    path = tmp_path / "file"
    save_arrays(path, "test", {"a": np.ones(2)})
    with pytest.raises(Exception, match="object"):
        save_arrays(path, "test", {"a": np.array([object()])})
    assert list(tmp_path.iterdir()) == [path]
    assert load_arrays(path, "test")[0]["a"].tolist() == [1.0, 1.0]


def _cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def _rewritten(header):
    metadata = None if header is None else {"lmc_curvature": json.dumps(header)}
    return lambda path: save_file({"a": np.ones(2)}, path, metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "is damaged or is not a safetensors file"),
        (lambda path: path.write_text("{}"), "is damaged or is not a safetensors file"),
        (_rewritten({"kind": "other", "version": "1"}), "holds 'other'; expected a file of kind 'test'"),
        (_rewritten(None), "holds None; expected a file of kind 'test'"),
        (
            _rewritten({"kind": "test", "version": "2"}),
            "has format version '2', of a newer release; this release reads '1'. Upgrade lmc_curvature",
        ),
        (
            _rewritten({"kind": "test", "version": "2", "release": "3.1.0"}),
            r"has format version '2', of a newer release, 3\.1\.0; this release reads '1'. Upgrade lmc_curvature",
        ),
    ],
)
def test_strange_files_are_refused_by_name(tmp_path, damage, message):
    path = tmp_path / "file.safetensors"
    save_arrays(path, "test", {"a": np.ones(2)})
    damage(path)
    with pytest.raises(FileFormatError, match=rf"file\.safetensors {message}"):
        load_arrays(path, "test")


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path.name} does not exist"):
            load_arrays(path, "test")


def test_the_same_result_gives_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        save_arrays(tmp_path / name, "test", {"a": np.arange(3.0), "b": np.ones((2, 2))}, one=1, two=[2.5])
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def _write_text(path):
    with write_atomically(path) as temporary:
        temporary.write_text("x" * 1000)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_arrays(path, "test", {"a": np.ones(1000)}),
        lambda path: write_json(path, {"a": "x" * 1000}),
        lambda path: write_snapshot(path, {"a": torch.ones(1000)}, {}, {}),
        _write_text,
    ],
)
def test_a_file_that_cannot_be_written_is_named(tmp_path, small_files, write):
    path = tmp_path / "file"
    path.write_text("old")
    small_files(100)
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
        write(path)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    for folder in (path, path / "folder"):
        with pytest.raises(OSError, match=re.escape(str(path))):
            write(folder / "file")


def test_errors_that_are_not_of_writing_keep_their_names(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, write_atomically(tmp_path / "a"):
        (tmp_path / "another").read_text()
    assert caught.value.filename == str(tmp_path / "another")


def test_directories_are_tried_and_left_as_they_are(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "new", tmp_path / "new" / "folder"):
        check_writable(path)
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(OptionError, match=rf"{re.escape(str(tmp_path / 'file'))} is a file; expected a directory"):
            check_writable(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    if os.name == "posix":
        # The superuser may write anywhere but where the system does.
        (tmp_path / "closed").mkdir(mode=0o555)
        closed = Path("/proc") if os.geteuid() == 0 else tmp_path / "closed"
        for path in (closed, closed / "new" / "folder"):
            begins = str(closed) if path == closed else f"{path} cannot be written: {closed}"
            with pytest.raises(OptionError, match=f"^{re.escape(begins)}: [A-Z]"):
                check_writable(path)
        with pytest.raises(OptionError, match=rf"^the answer cannot be written: {re.escape(str(closed))}: [A-Z]"):
            check_writable(closed, what="the answer")


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("processes are not forked here")
    path = tmp_path / "[a]"
    pid = os.fork()
    if not pid:
        with write_atomically(path):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(rf"\.\[a\]\.\w+-{pid}-\w+\.partial", left.name)
    with write_atomically(tmp_path / "b") as other:
        # Others' files are left alone, and so is what is still written.
        with write_atomically(path) as temporary:
            assert not left.exists()
            with write_atomically(path) as second:
                assert temporary.exists()
                second.write_text("first")
            assert path.read_text() == "first"
        assert other.exists()
    assert {each.name for each in tmp_path.iterdir()} == {"[a]", "b"}


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, "9" * 5000, '"\\ud800"', '{"\\uDFFF": 1}', "\0", "nul"]
)
def test_texts_that_are_no_json_of_a_file(tmp_path, text):
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileFormatError, match=r"a\.json is damaged"):
        read_json(tmp_path / "a.json", "1")


def test_whole_characters_are_read():
    assert parse_json('["\\ud83d\\ude00", "\\u00e9"]') == ["\U0001f600", "é"]


@pytest.mark.parametrize("version", ["9" * 5000, "", None, 1, [], "-1", "\u0661"])
def test_strange_versions_are_of_other_releases(tmp_path, version):
    (tmp_path / "a.json").write_text(json.dumps({"version": version}))
    with pytest.raises(NewerVersionError, match=r"a\.json has format version"):
        read_json(tmp_path / "a.json", "2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "there is no array 'x'"),
        ({"x": np.ones((2, 3))}, r"'x' has shape \(2, 3\); expected \(n, n\)"),
        ({"y": np.ones(4)}, r"'y' has shape \(4,\); expected \(n, 2\)"),
        ({"y": np.ones((2, 2))}, r"'y' has shape \(2, 2\)"),
        ({"y": np.ones((3, 3))}, r"'y' has shape \(3, 3\)"),
        ({"x": np.full((3, 3), np.nan)}, "'x' has values that are no finite numbers"),
        ({"x": np.full((3, 3), "a")}, "'x' has values that are no finite numbers"),
        ({"z": np.ones(4)}, r"'z' has shape \(4,\); expected \(m\)"),
    ],
)
def test_arrays_that_do_not_belong_together(change, message):
    arrays = {"x": np.ones((3, 3)), "y": np.ones((3, 2)), "z": np.ones(5, dtype=int)}
    shapes = {"x": "n n", "y": "n 2", "z": "m"}
    check_arrays(arrays, shapes, m=5)
    changed = {name: array for name, array in (arrays | change).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        check_arrays(changed, shapes, m=5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_not_taken_for_damage(tmp_path, monkeypatch, number):
    class Told(BaseException):
        pass

    def tell(*_):
        raise Told

    opened = safetensors.safe_open

    class Foreign:
        """Loses what is raised in its midst, as code in other languages may."""

        def __init__(self, *arguments):
            self.file = opened(*arguments)

        def __enter__(self):
            try:
                signal.raise_signal(number)
            except Told:
                raise TypeError("no metadata") from None
            return self.file.__enter__()

        def __exit__(self, *error):
            return self.file.__exit__(*error)

    save_arrays(tmp_path / "a", "test", _ARRAYS)
    monkeypatch.setattr(safetensors, "safe_open", Foreign)
    before = signal.signal(number, tell)
    try:
        with pytest.raises(Told):
            load_arrays(tmp_path / "a", "test")
        assert signal.getsignal(number) is tell
    finally:
        signal.signal(number, before)
