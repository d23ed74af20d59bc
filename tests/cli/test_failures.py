"""Claim: whatever fails ends in one message and the right status, an answer is never lost, and nothing is raw."""

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.cli import failures, main
from lmc_curvature.errors import OptionError
from tests.support.configurations import SECONDS

HERE = __name__


class Network(nn.Module):
    """A small network that fails at a call."""

    def __init__(self, fails_at, error):
        super().__init__()
        self.linear, self.calls, self.fails_at, self.error = nn.Linear(4, 3), 0, fails_at, error

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fails_at:
            raise {"runtime": RuntimeError("a first line\nand more"), "interrupt": KeyboardInterrupt()}[self.error]
        return self.linear(x)


def network(fails_at=0, error="runtime"):
    return Network(fails_at, error)


class Files(Dataset):
    """Examples of which one is missing."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "5.png")
        return torch.ones(4), index % 3


def loader():
    return [(torch.ones(4, 4), torch.tensor([0, 1, 2, 0]))] * 3


class Deadly(Files):
    """Examples of which one ends the process that reads it, once something has happened."""

    def __init__(self, index, event):
        self.index, self.event = index, event

    def __getitem__(self, index):
        if index == self.index:
            self.event.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(4), index % 3


NETWORK_IS_CALLED = multiprocessing.Event()


class PatientNetwork(nn.Linear):
    """A network that is called while a process of the loader dies."""

    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        NETWORK_IS_CALLED.set()
        time.sleep(5)
        return super().forward(x)


def patient_network():
    return PatientNetwork()


def dies_while_waited_for():
    event = multiprocessing.Event()
    event.set()
    return DataLoader(Deadly(1, event), batch_size=2, num_workers=1)


def dies_while_the_network_is_called():
    NETWORK_IS_CALLED.clear()
    return DataLoader(Deadly(5, NETWORK_IS_CALLED), batch_size=2, num_workers=1)


def missing_file():
    return DataLoader(Files(), batch_size=2)


def missing_file_in_a_worker():
    return DataLoader(Files(), batch_size=2, num_workers=1)


def ends_early():
    yield loader()[0]
    raise ValueError


def cut_off():
    yield loader()[0]
    raise EOFError("Ran out of input")


def interrupted_loader():
    yield loader()[0]
    raise KeyboardInterrupt


def no_loader():
    raise ConnectionError("no data base")


@pytest.fixture
def comparison(tmp_path):
    """Arguments that compare two networks; the data come last."""
    torch.manual_seed(0)
    for name in ("a.pt", "b.pt"):
        torch.save(network().state_dict(), tmp_path / name)
    return [tmp_path / "a.pt", tmp_path / "b.pt", "--no-progress", "--model", f"{HERE}:network", "--data"]


def run_with(capture, arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capture.readouterr()
    return stop.value.code or 0, captured.out, captured.err


@pytest.fixture
def run(capsys):
    """Run the command line; returns exit status, standard output and standard error."""
    return lambda *arguments: run_with(capsys, arguments)


@pytest.fixture
def run_with_helpers(capfd):
    """The same, with what other processes print."""
    return lambda *arguments: run_with(capfd, arguments)


@pytest.fixture
def unwritable(tmp_path):
    """A directory in which nobody may write."""
    if os.name == "posix" and os.geteuid() == 0:
        return Path("/proc")
    (tmp_path / "unwritable").mkdir(mode=0o555)
    return tmp_path / "unwritable"


@pytest.mark.parametrize("command", ["predict", "measure"])
def test_an_answer_that_cannot_be_saved_is_printed(run, comparison, tmp_path, small_files, command):
    path = tmp_path / "answer.safetensors"
    small_files(100)
    status, out, err = run(command, *comparison, f"{HERE}:loader", "--json", "--save", path)
    assert (status, json.loads(out)["examples"]) == (1, 12)
    assert err == f"error: the answer above was not saved: {path}: {os.strerror(errno.EFBIG)}.\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_what_cannot_be_saved_is_refused_before_anything_is_read(run, tmp_path, unwritable):
    (tmp_path / "file").write_text("")
    absent = ["absent.pt", "absent.pt", "--model", "absent", "--data", "absent", "--save"]
    for path, message in {
        **{
            path: f"error: --save {path} cannot be written: {tmp_path / 'file'} is a file; expected a directory"
            for path in (tmp_path / "file" / "a", tmp_path / "file" / "b" / "a")
        },
        **{
            path: f"error: --save {path} cannot be written: {unwritable}: "
            for path in (unwritable / "a", unwritable / "new" / "a")
        },
        Path(os.devnull): f"error: --save {os.devnull} is not a file",
    }.items():
        status, out, err = run("predict", *absent, path)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(message)


def test_an_answer_does_not_replace_a_network(run, comparison, tmp_path):
    before = (tmp_path / "b.pt").read_bytes()
    status, out, err = run("measure", *comparison, f"{HERE}:loader", "--save", tmp_path / "." / "b.pt")
    assert (status, out, "b.pt would replace a network" in err) == (2, "", True)
    assert (tmp_path / "b.pt").read_bytes() == before


def test_a_folder_that_is_not_there_is_made_for_an_answer(run, comparison, tmp_path):
    path = tmp_path / "new" / "folder" / "m.safetensors"
    status, _, _ = run("measure", *comparison, f"{HERE}:loader", "--save", path)
    assert (status, BarrierMeasurement.load(path).examples) == (0, 12)
    status, out, err = run("measure", "absent.pt", "absent.pt", *comparison[2:], f"{HERE}:loader", "--save", "x/y/m")
    assert (status, out, Path("x").exists()) == (2, "", False)
    assert "absent.pt does not exist" in err


@pytest.mark.parametrize("command", ["fork", "trace", "figures", "demo"])
def test_directories_that_cannot_be_written_are_refused_at_once(run, unwritable, tmp_path, command):
    (tmp_path / "file").write_text("")
    arguments = {
        "fork": ["fork", "absent.yaml", "--out"],
        "trace": ["trace"],
        "figures": ["figures", "absent", "--out"],
        "demo": ["demo", "--out"],
    }[command]
    status, out, err = run(*arguments, unwritable)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {unwritable}: ")
    status, out, err = run(*arguments, tmp_path / "file")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{tmp_path / 'file'} is a file" in err


@pytest.mark.check(after=1)
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing_file", r"FileNotFoundError: \[Errno 2\] .*'5.png' \(batch 2 of the loader\), after 2 batches"),
        (
            "missing_file_in_a_worker",
            r"FileNotFoundError: \[Errno 2\] .*'5.png' \(batch 2 of the loader\), after 2 batches",
        ),
        ("cut_off", r"EOFError: Ran out of input \(batch 1 of the loader\), after 1 batch"),
        ("ends_early", r"ValueError \(batch 1 of the loader\), after 1 batch"),
        ("no_loader", r"ConnectionError: no data base \(in .*test_failures.py, line \d+\)"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "measure"])
def test_a_loader_that_fails_is_one_message(run, comparison, monkeypatch, source, message, command):
    monkeypatch.delenv(failures.TRACEBACK, raising=False)
    status, out, err = run(command, *comparison, f"{HERE}:{source}")
    assert (status, "partial: " in out) == (1, source != "no_loader")
    end = r"\. LMC_CURVATURE_TRACEBACK=1 shows the traceback\."
    if source != "no_loader":
        end = "; the answer above is of the batches before, and is not saved\\."
    assert re.fullmatch(rf"error: {message}{end}\n", err)


@pytest.mark.parametrize(
    ("network", "source", "place"),
    [
        ("network", "dies_while_waited_for", r" \(batch 0 of the loader\)"),
        ("patient_network", "dies_while_the_network_is_called", ".*"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "measure"])
def test_a_process_of_the_loader_that_dies_is_a_failure_of_the_loader(run, comparison, command, network, source, place):
    arguments = [f"{HERE}:{network}" if each == f"{HERE}:network" else each for each in comparison]
    status, out, err = run(command, *arguments, f"{HERE}:{source}")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert re.match(rf"error: RuntimeError: DataLoader worker \(pid.*\) .*{place}\. LMC_CURVATURE_TRACEBACK", err)
    assert "network failed" not in err


@pytest.mark.parametrize("command", ["predict", "measure"])
def test_a_network_that_fails_is_one_message(run, comparison, monkeypatch, command):
    arguments = [command, *comparison, f"{HERE}:loader", "--model-option", "fails_at=1"]
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.match(
        "error: The network failed on batch [01], whose inputs are a tensor of shape .*: RuntimeError: a fi", err
    )
    monkeypatch.setenv(failures.TRACEBACK, "1")
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("Traceback (most recent call last)")
    assert "RuntimeError: a first line" in err.splitlines()[-1]


@pytest.mark.parametrize("command", ["predict", "measure"])
@pytest.mark.parametrize("what", ["network", "loader"])
def test_an_interrupt_is_one_line(run, comparison, command, what):
    options = [f"{HERE}:interrupted_loader"]
    if what == "network":
        options = [f"{HERE}:loader", "--model-option", "fails_at=1", "--model-option", "error=interrupt"]
    status, out, err = run(command, *comparison, *options)
    assert (status, "partial: Ctrl-C" in out) == (130, what == "loader")
    assert err == (
        "interrupted; the answer above is of the batches before, and is not saved.\n" if out else "interrupted.\n"
    )


def test_an_interrupt_before_a_command_begins_is_one_line(run, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("typer.core.TyperGroup.invoke", interrupt)
    assert run("demo") == (130, "", "interrupted.\n")


@pytest.mark.parametrize(
    ("command", "function", "line"),
    [
        (["demo"], "cli.demo.run_demo", "interrupted; the same command keeps the networks that are trained.\n"),
        (["trace", "."], "tracing.trace_forks", "interrupted; the same command continues where it stopped.\n"),
        (["figures", "."], "figures.experiment.draw_all", "interrupted.\n"),
    ],
)  # fmt: skip
def test_an_interrupt_of_long_work_says_how_it_continues(run, monkeypatch, tmp_path, command, function, line):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"lmc_curvature.{function}", interrupt)
    assert run(*command) == (130, "", line)


def test_an_end_by_sigterm_is_one_line(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lmc_curvature.tracing.trace_forks", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert run("trace", ".") == (143, "", "terminated; the same command continues where it stopped.\n")
    assert signal.getsignal(signal.SIGTERM) is before


def _heed_interrupts():
    """What a shell starts in the background ignores them, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.check
@pytest.mark.parametrize("module", ["typer", "lmc_curvature.cli.options", "torch"])
def test_an_interrupt_of_the_first_imports_is_one_line(module):
    # What is imported before `main` runs is little: of the command line, what tells of interrupts.
    program = f"""
import signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "{module}":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from lmc_curvature.cli import main
main(["measure", "a", "b", "--model", "resnet20", "--data", "digits"])
"""
    command, options = [sys.executable, "-c", program], {"capture_output": True, "text": True, "check": False}
    done = subprocess.run(command, preexec_fn=_heed_interrupts, **options)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted.\n")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.yaml").write_text(SECONDS.replace("epochs: 2", "epochs: 500"))
    return tmp_path / "config.yaml"


@pytest.mark.check
def test_an_interrupt_of_several_processes_is_one_line(config, tmp_path):
    # Ctrl-C reaches all processes of a terminal, at once: those that train, and those that are still importing.
    for sent_after in (0.0, 4.0):
        command = [sys.executable, "-m", "lmc_curvature", "fork", config, "--out", tmp_path / f"out{sent_after}"]
        command += ["--workers", "3", "--no-progress"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, start_new_session=True, preexec_fn=_heed_interrupts, **pipes) as process:
            trains = tmp_path / f"out{sent_after}" / "parent" / "manifest.json"
            deadline = time.monotonic() + 60
            while not trains.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(sent_after)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, ""), err
        assert err == "interrupted; the same command continues where it stopped.\n"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_message_however_many_work(run_with_helpers, config, tmp_path, small_files, workers):
    small_files(3000)
    out = tmp_path / "out"
    arguments = ["fork", config, "--out", out, "--workers", workers, "--no-progress"]
    status, printed, err = run_with_helpers(*arguments)
    assert (status, printed, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: {out}")
    assert os.strerror(errno.EFBIG) in err


@pytest.mark.check
def test_a_full_device_as_standard_output(comparison, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no device that is always full")
    # What is printed last is written when the process ends.
    for words in (["check", *comparison[:2]], ["--version"]):
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-m", "lmc_curvature", *words]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith(f"error: OSError: [Errno {errno.ENOSPC}] ")
    command = [sys.executable, "-m", "lmc_curvature", "measure", *comparison, f"{HERE}:loader", "--json"]
    command += ["--save", tmp_path / "m.safetensors"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: OSError: [Errno {errno.ENOSPC}] ")
    assert done.stderr.count("\n") == 1
    assert BarrierMeasurement.load(tmp_path / "m.safetensors").examples == 12


def test_warnings_are_one_line_each(capsys):
    before = warnings.formatwarning
    with pytest.raises(SystemExit), failures.one_message():
        message = UserWarning("slower than need be")
        assert warnings.formatwarning(message, UserWarning, "file.py", 3, "code()") == "warning: slower than need be\n"
        raise OptionError("no such option")
    assert capsys.readouterr().err == "error: no such option\n"
    assert warnings.formatwarning is before


def broken_loader():
    """Yields three batches, and then fails."""
    yield from loader()
    raise {"error": OSError("no disk"), "interrupt": KeyboardInterrupt()}[os.environ["LMC_TEST_ENDS_WITH"]]


@pytest.mark.check(after=1)
@pytest.mark.parametrize(
    ("ends_with", "status", "said"),
    [
        (
            "error",
            1,
            "error: OSError: no disk (batch 3 of the loader), after 3 batches; "
            "the answer above is of the batches before, and is not saved.",
        ),
        ("interrupt", 130, "interrupted; the answer above is of the batches before, and is not saved."),
    ],
)
@pytest.mark.parametrize("command", ["predict", "measure"])
def test_an_interrupted_pass_prints_what_it_has(command, ends_with, status, said, run, tmp_path, monkeypatch):
    monkeypatch.setenv("LMC_TEST_ENDS_WITH", ends_with)
    for seed, name in enumerate(("a.pt", "b.pt")):
        torch.manual_seed(seed)
        torch.save(network().state_dict(), tmp_path / name)
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    found, out, err = run(command, *files, "--model", f"{HERE}:network", "--data", f"{HERE}:broken_loader")
    assert found == status
    assert "partial: " in out
    assert err.splitlines()[-1] == said
