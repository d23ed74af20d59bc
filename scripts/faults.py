"""What is lost when something goes wrong in the midst of a command?

    python scripts/faults.py --seed 0

Every command is killed, interrupted and told to end at random moments, finds full disks, places where it cannot write,
files that are damaged or vanish, loaders, networks and losses that raise or give numbers that are none, another process
at the same work, and clocks that run back. Afterwards every result must be what an undisturbed run gives, or not be
there; nothing unfinished is left; the command has ended by itself, with a last line that says why and the status that
the reference names; and the same command, given again, gives what an undisturbed run gives. What violates that is
printed, and counted in the table of `docs/reliability.md`.

Commands run in processes that are forked from this one, which has imported what they need. `--only PATTERN` chooses
faults by their names, and what was injected before (`--out`) is not injected again.
"""

import contextlib
import dataclasses
import errno
import fnmatch
import importlib
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Threads do not survive a fork.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
LONGEST = 60.0
"""Seconds after which a command that has not ended hangs."""

CONFIG = """
model: faults:image_network
training: {epochs: 2, learning_rate: 0.1, batch_size: 25}
fork_epochs: [0]
snapshot_epochs: 1
limit: 100
threads: 1
trace: {batch_size: 50, alphas: 3, layer_alphas: 3, test: false, layers: last, cumulative: last}
"""


# Networks, data and losses of the commands, by the name of this module.


class Trip:
    """Counts the calls of something, and does something else at one of them."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.set("", 0, lambda value: value)

    def set(self, where: str, at: int, action: Callable[[Any], Any]) -> None:
        """Let the action have the value of call number `at` of `where`, and give another or raise."""
        self.where, self.at, self.action = where, at, action

    def __call__(self, where: str, value: Any) -> Any:
        """The value of a call of `where`, or what the action makes of it."""
        self.calls[where] += 1
        return self.action(value) if (where, self.calls[where]) == (self.where, self.at) else value


TRIP = Trip()


class Network(nn.Sequential):
    """A small network, at whose calls something may go wrong."""

    def forward(self, x: Tensor) -> Tensor:
        """The outputs."""
        return TRIP("network", super().forward(x))


def network() -> nn.Module:
    """A network of the comparisons."""
    return Network(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def image_network(num_classes: int = 10) -> nn.Module:
    """A network of the experiments."""
    return Network(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, num_classes))


class Loader:
    """Four batches, at each of which something may go wrong."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            x, y = torch.randn(12, 4, generator=generator), torch.randint(3, (12,), generator=generator)
            yield TRIP("loader", (x, y))


def loader() -> Loader:
    """The data of the comparisons."""
    return Loader()


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Their loss."""
    return TRIP("loss", F.cross_entropy(output, target))


# The commands.

_FILES = ("a.safetensors", "b.safetensors", "--model", "faults:network")
_BOTH = (*_FILES, "--data", "faults:loader", "--loss", "faults:loss", "--no-progress", "--json")
_SELECT = ("--budget", "0.5", "--measurements", "3", "--save", "out/s.safetensors", "--out", "out/merged.safetensors")
COMMANDS: dict[str, tuple[str, ...]] = {
    "predict": ("predict", *_BOTH, "--save", "out/p.safetensors", "--plot", "out/p.png"),
    "measure": ("measure", *_BOTH, "--each", "--save", "out/m.safetensors"),
    "select": ("select", *_BOTH, *_SELECT, "--force"),
    "merge": (
        "merge",
        *_FILES,
        "--out",
        "out/merged.safetensors",
        "--mergekit",
        "out/merged.yaml",
        "--force",
        "--json",
    ),
    "check": ("check", *_FILES, "--distances", "--json"),
    "fork": ("fork", "config.yaml", "--out", "runs", "--no-progress"),
    "trace": ("trace", "runs", "--no-progress"),
    "figures": ("figures", "runs", "--out", "figures", "--no-progress"),
    "report": ("report", "runs", "--out", "report.html"),
    "demo": ("demo", "--out", "demo", "--no-progress"),
}
COMPARISONS = ("predict", "measure", "select")
# What a command begins with: an experiment that is trained, or traced as well.
_BEGINS = {"trace": "fork", "figures": "trace", "report": "trace"}
_IMPORTS = (
    *("matplotlib.backends.backend_agg", "matplotlib.backends.backend_pdf", "plotly.offline", "sklearn.datasets"),
    *("sklearn.model_selection", "torch._dynamo", "torch.fx.experimental.proxy_tensor", "lmc_curvature.cli.app"),
    *(
        "lmc_curvature.cli.tables",
        "lmc_curvature.merging.checking",
        "lmc_curvature.merging.files",
        "lmc_curvature.report",
    ),
)
# Files of work in progress, which are complete but for what is still to come.
_INTERIM = ("manifest.json", "metrics.csv", "latest.safetensors", "checksums.json", "config.json", "provenance.json")
_TABLES = "traces"


def warm() -> None:
    """Import what commands need, and make the longest of them short."""
    for name in _IMPORTS:
        importlib.import_module(name)
    import lmc_curvature.cli.demo as demo
    import lmc_curvature.cli.provenance as provenance
    import lmc_curvature.figures.experiment as experiment

    torch.set_num_threads(1)
    # The commit may change while faults are injected, and so may what is compiled.
    provenance.commit_of, sys.dont_write_bytecode = lambda folder: {}, True
    training = demo.CONFIG.training.model_copy(update={"epochs": 2, "milestones": (), "warmup_epochs": 0})
    changes = {
        "training": training,
        "fork_epochs": (0,),
        "limit": 100,
        "model": "faults:image_network",
        "model_options": {},
    }
    demo.CONFIG = demo.CONFIG.model_copy(update=changes)
    demo._draw = lambda predictions, measurements, out: ()
    every = experiment._drawings
    experiment._drawings = lambda traces: dict([*every(traces).items()][:2])


# Processes.


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended: its status, negative by a signal, and what it printed; None where it did not end."""

    status: int | None
    out: str
    err: str
    seconds: float
    operations: int = 0


Stop = tuple[int, float]
"""A signal, and after how many seconds it comes."""


class Command:
    """A command in a forked process, in a folder.

    Args:
        arguments: The words after `lmc-curvature`.
        folder: Where it runs.
        inject: Called in the process before the command begins.
        out: Where its output goes, instead of here.
    """

    def __init__(
        self, arguments: Sequence[str], folder: Path, inject: Callable[[], None] = lambda: None, *, out: str = ""
    ):
        sys.stdout.flush()
        sys.stderr.flush()
        # Its output, its error stream, and the number of its operations on files: few enough for pipes to hold them.
        pipes = [os.pipe() for _ in range(3)]
        self.pid = os.fork()
        if not self.pid:
            _run_here(arguments, folder, inject, out, [writer for _, writer in pipes])
        self._readers = [reader for reader, _ in pipes]
        for _, writer in pipes:
            os.close(writer)
        # The command begins now.
        os.read(self._readers[2], 1)
        self.begun = time.monotonic()

    def end(self, stop: Stop | None = None) -> Outcome:
        """Wait until the command ends, and stop it if that is to be."""
        status = None
        while status is None and (seconds := time.monotonic() - self.begun) < LONGEST:
            if stop is not None and seconds >= stop[1] + 0.01:
                os.kill(self.pid, stop[0])
                stop = None
            found, code = os.waitpid(self.pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if found else None
            time.sleep(0.002)
        seconds = time.monotonic() - self.begun
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if status is None:
            os.waitpid(self.pid, 0)
        texts = [os.fdopen(reader, errors="replace").read() for reader in self._readers]
        return Outcome(status, texts[0], texts[1], seconds, int(texts[2] or 0))


def _run_here(
    arguments: Sequence[str], folder: Path, inject: Callable[[], None], out: str, writers: Sequence[int]
) -> None:
    """Run a command in this process, and end it."""
    status = 99
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        for number, handle in enumerate((os.open(os.devnull, os.O_RDONLY), *writers[:2])):
            os.dup2(os.open(out, os.O_WRONLY) if out and number == 1 else handle, number)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(number, "wb")) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from lmc_curvature.cli import main

        inject()
        os.write(writers[2], b"!")
        try:
            main(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
        sys.stdout.flush()
        os.write(writers[2], str(OPERATIONS.number).encode())
    except BaseException:  # noqa: BLE001 - this process ends here
        traceback.print_exc(file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(arguments: Sequence[str], folder: Path, inject: Callable[[], None] = lambda: None) -> Outcome:
    """Run a command to its end."""
    return Command(arguments, folder, inject).end()


class Operations:
    """Counts what a process does to files besides reading them, and acts before one of these operations."""

    def __init__(self) -> None:
        self.number, self.at, self.action = 0, -1, lambda: None

    def watch(self, at: int = -1, action: Callable[[], Any] = lambda: None) -> None:
        """Count from here on, and act before one of the operations."""
        self.at, self.action = at, action
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.chmod"):
            self.number += 1
            if self.number == self.at:
                self.action()


OPERATIONS = Operations()


# The undisturbed runs.


class Bench:
    """Folders in which commands begin, and what undisturbed runs make of them."""

    def __init__(self, root: Path, commands: Iterable[str]):
        self.root = root
        self.begins: dict[str, Path] = {}
        self.results: dict[str, dict[str, bytes]] = {}
        self.outcomes: dict[str, Outcome] = {}
        inputs = root / "inputs"
        inputs.mkdir(parents=True)
        from safetensors.torch import save_file

        for seed, name in enumerate(("a", "b")):
            torch.manual_seed(seed)
            save_file(network().state_dict(), inputs / f"{name}.safetensors")
        (inputs / "config.yaml").write_text(CONFIG)
        for command in tqdm(self._in_order(commands), desc="undisturbed", unit="command"):
            self._run(command, inputs)

    def _in_order(self, commands: Iterable[str]) -> list[str]:
        needed = list(commands)
        for command in needed:
            needed += [each for each in [_BEGINS.get(command)] if each and each not in needed]
        return [command for command in COMMANDS if command in needed]

    def _run(self, command: str, inputs: Path) -> None:
        before = self.root / f"{_BEGINS[command]}-undisturbed" if command in _BEGINS else inputs
        self.begins[command], folder = before, self.root / f"{command}-undisturbed"
        shutil.copytree(before, folder)
        outcome = run(COMMANDS[command], folder, OPERATIONS.watch)
        assert outcome.status == 0, outcome
        self.outcomes[command], self.results[command] = outcome, contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, locks apart."""
    files = (path for path in folder.rglob("*") if path.is_file() and "locks" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Faults.


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that goes wrong while a command runs.

    Attributes:
        kind: The row of the table that it belongs to.
        command: The command.
        what: What goes wrong.
        inject: Called in the command's process before it begins.
        stop: A signal from outside.
        damage: What happens to the folder before the command begins.
        repair: What is done to the folder before the command is given again.
        statuses: How the command may end.
        names: What the last line must name.
        out: Where standard output goes instead.
        spares: Whether results of an undisturbed run must be there, or absent; not where they are taken away.
        again: Whether the same command then gives what an undisturbed run gives.
        others: Further processes that are given the same command at the same time.
        fresh: The program of a process of its own that is run instead.
    """

    kind: str
    command: str
    what: str
    inject: Callable[[], None] = lambda: None
    stop: Stop | None = None
    damage: Callable[[Path], None] = lambda folder: None
    repair: Callable[[Path], None] = lambda folder: None
    statuses: tuple[int, ...] = (1, 2)
    names: str = ""
    out: str = ""
    spares: bool = True
    again: bool = True
    others: int = 0
    fresh: str = ""

    @property
    def name(self) -> str:
        """What tells it from others."""
        return f"{self.kind}/{self.command}/{self.what}"


def attempt(fault: Fault, bench: Bench) -> dict[str, Any]:
    """Inject a fault; return its name, how the command ended, and what was violated."""
    folder = bench.root / "attempt"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bench.begins[fault.command], folder)
    arguments, expected = COMMANDS[fault.command], bench.results[fault.command]
    fault.damage(folder)
    before = contents(folder)
    if fault.fresh:
        outcome = _run_fresh(fault.fresh, folder)
        is_finished = outcome.status == 0
    else:
        others = [Command(arguments, folder) for _ in range(fault.others)]
        outcome = Command(arguments, folder, fault.inject, out=fault.out).end(fault.stop)
        ended = [outcome, *(other.end() for other in others)]
        # What another process says counts where it is worse.
        outcome = next((each for each in reversed(ended) if each.status != 0), outcome)
        is_finished = any(each.status == 0 for each in ended)
    violations = _violations(fault, outcome)
    left = contents(folder)
    # A process that is killed cannot tidy up: the next one does.
    killed = outcome.status == -signal.SIGKILL
    partial = [] if killed else [path for path in left if path.endswith(".partial")]
    violations |= {"left over": ", ".join(partial)} if partial else {}
    if fault.spares:
        wrong = [path for path, data in left.items() if not _is_right(path, data, before, expected)]
        violations |= {"wrong": ", ".join(wrong)} if wrong else {}
        lost = [path for path in expected if path not in left] if is_finished else []
        violations |= {"lost": ", ".join(lost)} if lost else {}
    if fault.again:
        violations |= _again(fault, bench, folder)
    result = {"name": fault.name, "kind": fault.kind, "status": outcome.status, "violations": violations}
    return result | ({"said": outcome.err[-2000:]} if violations else {})


def _is_right(path: str, data: bytes, before: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    """Whether a file is as it was or as it should be, or one of work in progress."""
    parts = Path(path).parts
    is_interim = parts[-1] in _INTERIM or (parts[-2:-1] == (_TABLES,) and path.endswith(".csv"))
    return is_interim or path.endswith(".partial") or data in (before.get(path), expected.get(path))


def _violations(fault: Fault, outcome: Outcome) -> dict[str, str]:
    found = {}
    if outcome.status is None:
        return {"hung": f"no end after {LONGEST:g} seconds"}
    if outcome.status not in fault.statuses:
        found["status"] = f"{outcome.status}, expected one of {fault.statuses}"
    lines = outcome.err.strip().splitlines()
    if "Traceback" in outcome.err or "Exception ignored" in outcome.err:
        found["unclear"] = "a traceback"
    starts = {1: "error: ", 2: "error: ", 130: "interrupted", 143: "terminated"}.get(outcome.status)
    # A message may have several lines, of which the first says what it is.
    if starts is not None and not any(line.lower().startswith(starts) for line in lines):
        found["unclear"] = f"the last line is {lines[-1] if lines else 'nowhere'!r}"
    if starts and fault.names and fault.names not in outcome.err:
        found["unclear"] = f"{fault.names} is not named"
    return found


def _again(fault: Fault, bench: Bench, folder: Path) -> dict[str, str]:
    """What is violated when the same command is given again, after a repair."""
    fault.repair(folder)
    for path, data in contents(bench.begins[fault.command]).items():
        if path in ("a.safetensors", "b.safetensors", "config.yaml"):
            (folder / path).unlink(missing_ok=True)
            (folder / path).write_bytes(data)
    outcome, expected = run(COMMANDS[fault.command], folder), bench.results[fault.command]
    if outcome.status != 0:
        return {"not again": f"status {outcome.status}: {outcome.err[-500:]}"}
    found = contents(folder)
    differ = [path for path in {**found, **expected} if found.get(path) != expected.get(path)]
    printed = outcome.out != bench.outcomes[fault.command].out
    return {"not again": f"other contents: {', '.join(differ)}{' other output' * printed}"} if differ or printed else {}


def _run_fresh(program: str, folder: Path) -> Outcome:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])}
    begun = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=LONGEST,
            # What is started in the background ignores interrupts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        )
    except subprocess.TimeoutExpired:
        return Outcome(None, "", "", LONGEST)
    return Outcome(done.returncode, done.stdout, done.stderr, time.monotonic() - begun)


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


def signals(bench: Bench, dice: random.Random) -> Iterator[Fault]:
    """Signals at random moments, and before random operations on files, where it matters most."""
    for command, outcome in bench.outcomes.items():
        for number, status in SIGNALS.items():
            word = number.name
            for _ in range(2):
                share = dice.uniform(0.02, 0.95)
                when = share * outcome.seconds
                yield Fault(word, command, f"after {share:.0%}", stop=(number, when), statuses=(status, 0))
            for _ in range(2 if outcome.operations else 0):
                at = dice.randint(1, outcome.operations)

                def watch(at: int = at, number: int = number) -> None:
                    OPERATIONS.watch(at, lambda: os.kill(os.getpid(), number))

                yield Fault(word, command, f"before operation {at}", inject=watch, statuses=(status, 0))


_PROGRAM = """
import signal, sys

class Stop:
    left = {left}
    def find_spec(self, name, *_):
        Stop.left -= 1
        if Stop.left == 0:
            signal.raise_signal({number})

from lmc_curvature.cli import main
sys.meta_path.insert(0, Stop())
main({arguments})
"""


def imports(bench: Bench, dice: random.Random) -> Iterator[Fault]:
    """Signals in a process of its own, which is still importing."""
    for command in bench.outcomes:
        for number in (signal.SIGINT, signal.SIGTERM):
            left = dice.randint(1, 1200)
            program = _PROGRAM.format(left=left, number=int(number), arguments=list(COMMANDS[command]))
            what = f"{number.name} at import {left}"
            yield Fault("still importing", command, what, fresh=program, statuses=(SIGNALS[number],))


def disks(bench: Bench, dice: random.Random) -> Iterator[Fault]:
    """Full disks: large files cannot be written, or none, or what was written is refused when it is to be kept."""
    for command, outcome in bench.outcomes.items():
        if command != "check":
            made = [len(data) for path, data in bench.results[command].items() if _is_made(bench, command, path)]
            sizes = sorted({0, dice.randrange(1, max(made))})
            for size in sizes:

                def limit(size: int = size) -> None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

                yield Fault("full disk", command, f"files of {size} bytes", inject=limit, statuses=(1,))
            for name, module in (("fsync", os), ("mkstemp", tempfile)):
                at = dice.randint(1, 3)

                def patch(name: str = name, module: Any = module, at: int = at) -> None:
                    setattr(module, name, _failing(getattr(module, name), at))

                yield Fault("full disk", command, f"{name} {at}", inject=patch, statuses=(1, 0))
        if Path("/dev/full").exists() and outcome.out:
            yield Fault("full disk", command, "standard output", out="/dev/full", statuses=(1,))


def _is_made(bench: Bench, command: str, path: str) -> bool:
    return not (bench.begins[command] / path).exists()


def _failing(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The function, whose call number `at` finds the disk full."""
    left = [at]

    def call(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments, **options)

    return call


_PLACES = {
    **dict.fromkeys(("predict", "measure", "select", "merge"), ("out",)),
    "fork": ("runs", "runs/parent", "runs/locks", "runs/fork-0000"),
    "trace": ("runs/traces", "runs/locks", "runs/traces/fork-0000"),
    "figures": ("figures",),
    "report": ("report.html/x",),
    "demo": ("demo", "demo/barriers", "demo/forks"),
}


def places(bench: Bench, dice: random.Random) -> Iterator[Fault]:
    """Places where nobody may write, nor the superuser: a file where a folder should be, and the other way round."""
    for command in bench.outcomes:
        for place in _PLACES.get(command, ()):

            def block(folder: Path, place: str = place) -> None:
                shutil.rmtree(folder / place, ignore_errors=True)
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                (folder / place).write_text("")

            def free(folder: Path, place: str = place, command: str = command) -> None:
                shutil.rmtree(folder / Path(place).parts[0], ignore_errors=True)
                (folder / Path(place).parts[0]).unlink(missing_ok=True)
                before = bench.begins[command] / Path(place).parts[0]
                if before.is_dir():
                    shutil.copytree(before, folder / before.name)

            yield Fault("no place to write", command, place, damage=block, repair=free)


def _cut(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])


def _flip(path: Path, dice: random.Random) -> None:
    # A checkpoint of others has no checksum: only its header tells damage.
    data, place = bytearray(path.read_bytes()), dice.randrange(8)
    data[place] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def _flip_anywhere(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def _replace(path: Path, dice: random.Random) -> None:
    path.write_text("<!DOCTYPE html>\n")


def _remove(path: Path, dice: random.Random) -> None:
    path.unlink()


def _empty(path: Path, dice: random.Random) -> None:
    path.write_bytes(b"")


DAMAGES = {"cut": _cut, "a flipped bit": _flip, "a page in its place": _replace, "removed": _remove, "empty": _empty}
_INPUTS = {
    **dict.fromkeys(("predict", "measure", "select", "merge", "check"), ("a.safetensors", "b.safetensors")),
    "fork": ("config.yaml",),
}
# What is made again, with a warning.
_RENEWED = {
    "fork": (
        "runs/parent/epoch-0000.safetensors",
        "runs/fork-0000/child-1/epoch-0002.safetensors",
        "runs/parent/metrics.csv",
    ),
    "trace": (
        "runs/traces/fork-0000/epoch-0002/predicted.safetensors",
        "runs/traces/curves.csv",
        "runs/traces/checksums.json",
    ),
}
_KEPT = {
    "trace": ("runs/fork-0000/child-0/epoch-0002.safetensors", "runs/config.json", "runs/provenance.json"),
    "figures": ("runs/traces/layers.csv", "runs/config.json", "runs/traces/checksums.json"),
    "report": ("runs/traces/fork-0000/epoch-0002/train.safetensors", "runs/traces/geometry.csv"),
}


def damages(bench: Bench, dice: random.Random) -> Iterator[Fault]:
    """Files that are damaged before a command begins."""
    for command in bench.outcomes:
        for path in _INPUTS.get(command, ()):
            for what in dice.sample(sorted(DAMAGES), 3):
                if path.endswith(".yaml") and what in ("cut", "a flipped bit"):
                    # What is left may be a configuration.
                    continue
                yield _damaged(command, path, what, DAMAGES[what], dice.random(), statuses=(2,), names=path)
        for path in _KEPT.get(command, ()):
            what, damage = dice.choice((("a flipped bit", _flip_anywhere), ("cut", _cut), ("removed", _remove)))
            # A place in a file of JSON may be white space; without checksums there are tables all the same.
            yield _damaged(command, path, what, damage, dice.random(), statuses=(2, 0))
        for path in _RENEWED.get(command, ()):
            for what, damage in (("a flipped bit", _flip_anywhere), ("cut", _cut), ("removed", _remove)):
                found = _damaged(command, path, what, damage, dice.random(), statuses=(0, 2))
                yield dataclasses.replace(
                    found, damage=_after(bench, command, found.damage), repair=lambda folder: None
                )


def _damaged(command: str, path: str, what: str, damage: Any, seed: float, **options: Any) -> Fault:
    saved: dict[str, bytes] = {}

    def harm(folder: Path) -> None:
        if (folder / path).exists():
            saved[path] = (folder / path).read_bytes()
            damage(folder / path, random.Random(seed))

    def heal(folder: Path) -> None:
        for name, data in saved.items():
            (folder / name).write_bytes(data)

    return Fault("damaged file", command, f"{path}, {what}", damage=harm, repair=heal, spares=False, **options)


def _after(bench: Bench, command: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """Damage to what the command itself has made."""

    def harm(folder: Path) -> None:
        shutil.copytree(bench.root / f"{command}-undisturbed", folder, dirs_exist_ok=True)
        damage(folder)

    return harm


def vanishing(bench: Bench, dice: random.Random) -> Iterator[Fault]:
    """Files and folders that somebody else removes while a command works with them."""
    targets = {"predict": ("out", "a.safetensors"), "measure": ("out",), "select": ("out", "b.safetensors")}
    targets |= {"merge": ("out", "a.safetensors"), "fork": ("runs", "runs/parent"), "report": ("runs/traces",)}
    targets |= {"trace": ("runs/traces", "runs/fork-0000"), "figures": ("figures", "runs"), "demo": ("demo",)}
    for command, outcome in bench.outcomes.items():
        for target in targets.get(command, ()) if outcome.operations else ():
            at = dice.randint(1, outcome.operations)

            def remove(at: int = at, target: str = target) -> None:
                OPERATIONS.watch(at, lambda: _take_away(Path(target)))

            def restore(folder: Path, command: str = command) -> None:
                shutil.rmtree(folder)
                shutil.copytree(bench.begins[command], folder)

            what = f"{target} before operation {at}"
            yield Fault("vanishing", command, what, inject=remove, repair=restore, spares=False, statuses=(0, 1, 2))


def _take_away(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class OwnError(Exception):
    """An error of somebody's own, of several lines."""

    def __str__(self) -> str:
        return "first line\n\nlast line"


ERRORS: tuple[Callable[[], BaseException], ...] = (
    *(RuntimeError, KeyError, AssertionError, MemoryError, RecursionError, StopIteration, ConnectionError, OwnError),
    *(
        lambda: OSError(errno.EIO, os.strerror(errno.EIO), "5.png"),
        lambda: ValueError("bad label"),
        lambda: ZeroDivisionError("x / 0"),
    ),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
)


def errors(bench: Bench, dice: random.Random) -> Iterator[Fault]:
    """Exceptions of loaders, networks and losses at random calls."""
    for command in COMPARISONS:
        for where in ("loader", "network", "loss") if command in bench.outcomes else ():
            for make in dice.sample(ERRORS, 3):
                at, error = dice.randint(1, 4), make()

                def trip(where: str = where, at: int = at, error: BaseException = error) -> None:
                    TRIP.set(where, at, _raiser(error))

                what = f"{type(error).__name__} in call {at} of the {where}"
                # Checks go on where a call fails that gives no number of the answer.
                yield Fault("exception", command, what, inject=trip, statuses=(0, 1, 2))


def _raiser(error: BaseException) -> Callable[[Any], Any]:
    def act(value: Any) -> Any:
        raise error

    return act


def numbers(bench: Bench, dice: random.Random) -> Iterator[Fault]:
    """One number that is none, in one example of one batch, or of what the network gives for it."""
    for command in COMPARISONS if all(command in bench.outcomes for command in COMPARISONS) else ():
        for where in ("loader", "loader", "network"):
            at, example = dice.randint(1, 4), dice.randrange(12)

            def trip(where: str = where, at: int = at, example: int = example) -> None:
                TRIP.set(where, at, lambda found: _spoilt(found, example))

            what = f"nan in example {example} of call {at} of the {where}"
            # The network's may be in a check that looks at other examples.
            yield Fault("no number", command, what, inject=trip, statuses=(2,) if where == "loader" else (2, 0))
    if "fork" in bench.outcomes:
        at = dice.randint(4, 20)

        def trip_training(at: int = at) -> None:
            TRIP.set("network", at, lambda found: found * float("nan"))

        def begin_anew(folder: Path) -> None:
            shutil.rmtree(folder / "runs")

        what = f"nan in step {at}"
        yield Fault("no number", "fork", what, inject=trip_training, repair=begin_anew, spares=False, statuses=(2,))


def _spoilt(found: Any, example: int) -> Any:
    x = (found[0] if isinstance(found, tuple) else found).clone()
    x[example % len(x), 0] = float("nan")
    return (x, *found[1:]) if isinstance(found, tuple) else x


def together(bench: Bench, dice: random.Random) -> Iterator[Fault]:
    """Several processes that are given the same command in the same folder, of which one may be killed."""
    for command, outcome in bench.outcomes.items():
        if command == "check":
            continue
        yield Fault("two processes", command, "both to their end", others=1, statuses=(0,))
        share = dice.uniform(0.1, 0.9)
        stop = (signal.SIGKILL, share * outcome.seconds)
        yield Fault("two processes", command, f"one killed after {share:.0%}", others=1, stop=stop, statuses=(0, -9))


def clocks(bench: Bench, dice: random.Random) -> Iterator[Fault]:
    """Clocks that run back, from a day on which files were made that have not been made yet."""

    def set_back() -> None:
        now, calls = time.time(), Counter[str]()

        def earlier() -> float:
            calls["time"] += 1
            return now - 1e6 * calls["time"]

        time.time, time.time_ns = earlier, lambda: int(1e9 * earlier())

    def make_later(folder: Path) -> None:
        for path in folder.rglob("*"):
            os.utime(path, (time.time() + 1e7,) * 2)

    for command in bench.outcomes:
        yield Fault(
            "clock set back", command, "by days at every look", inject=set_back, damage=make_later, statuses=(0,)
        )


KINDS = (signals, imports, disks, places, damages, vanishing, errors, numbers, together, clocks)
_TITLES = {
    "SIGINT": "interrupted (SIGINT), at random moments and before random operations on files",
    "SIGTERM": "told to end (SIGTERM), likewise",
    "SIGKILL": "killed (SIGKILL), likewise",
    "still importing": "interrupted or told to end while still importing",
    "full disk": "a full disk: files too large, none at all, refused when synchronised; standard output",
    "no place to write": "a file where a folder should be, and the other way round",
    "damaged file": "inputs and stored results cut, emptied, removed, replaced, with a flipped bit",
    "vanishing": "inputs and outputs removed in the midst",
    "exception": "an exception of a loader, a network or a loss, at a random call",
    "no number": "NaN in one example of one batch, or of what a network gives for it",
    "two processes": "two processes in one folder, of which one may be killed",
    "clock set back": "a clock that runs back, and files of the future",
}


def faults_of(bench: Bench, seed: int) -> list[Fault]:
    """Every fault that there is, with what is random decided by the seed."""
    return [fault for kind in KINDS for fault in kind(bench, random.Random(f"{seed} {kind.__name__}"))]


def table(results: Sequence[dict[str, Any]]) -> str:
    """How many faults of each kind, how commands ended, and how many violated something, in Markdown."""
    lines = ["| fault | injected | status: times | violations |", "| --- | ---: | --- | ---: |"]
    for kind, title in _TITLES.items():
        rows = [result for result in results if result["kind"] == kind]
        if rows:
            statuses = Counter(str(row["status"]).replace("-9", "killed") for row in rows)
            ended = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
            lines.append(f"| {title} | {len(rows)} | {ended} | {sum(bool(row['violations']) for row in rows)} |")
    lines.append(f"| all | {len(results)} | | {sum(bool(row['violations']) for row in results)} |")
    return "\n".join(lines)


def write_table(text: str) -> None:
    """Put the table between the markers of the page."""
    page = PAGE.read_text(encoding="utf-8")
    begin, finish = "<!-- faults: by scripts/faults.py -->", "<!-- /faults -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(finish)}", re.DOTALL)
    assert pattern.search(page)
    PAGE.write_text(pattern.sub(f"{begin}\n\n{text}\n\n{finish}", page), encoding="utf-8")


def spread(faults: list[Fault], most: int, seed: int) -> list[Fault]:
    """So many of the faults, drawn at random, of every kind as many as of the others."""
    by_kind: dict[str, list[Fault]] = {}
    for fault in random.Random(seed).sample(faults, len(faults)):
        by_kind.setdefault(fault.kind, []).append(fault)
    turns = itertools.zip_longest(*by_kind.values())
    return list(itertools.islice((fault for turn in turns for fault in turn if fault), most))


def main(
    seed: int = 0, only: str = "*", out: Path = Path("runs/faults.jsonl"), page: bool = True, most: int | None = None
) -> None:
    """Inject faults, print a table, and write it to the page if every kind was injected."""
    sys.modules["faults"] = sys.modules[__name__]
    tqdm.monitor_interval = 0
    warm()
    commands = [
        name for name in COMMANDS if only == "*" or re.search(rf"\b{name}\b", only) or not _names_commands(only)
    ]
    print(f"seed {seed}, torch {torch.__version__}")
    out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), commands)
        faults = [fault for fault in faults_of(bench, seed) if fnmatch.fnmatch(fault.name, only)]
        if most is not None:
            faults = spread(faults, most, seed)
        names = {fault.name for fault in faults}
        results = [result for result in done if result["name"] in names]
        left = [fault for fault in faults if fault.name not in {result["name"] for result in results}]
        with out.open("a") as log, tqdm(left, unit="fault") as bar:
            for fault in bar:
                bar.set_description(fault.name[:50].ljust(50))
                results.append(attempt(fault, bench))
                log.write(json.dumps(results[-1]) + "\n")
                log.flush()
    for result in results:
        if result["violations"]:
            print(f"\n{result['name']}: {result['violations']}\n{result.get('said', '')}")
    print(table(results))
    if page and only == "*" and most is None:
        write_table(table(results))
    sys.exit(any(result["violations"] for result in results))


def _names_commands(pattern: str) -> bool:
    return any(re.search(rf"\b{name}\b", pattern) for name in COMMANDS)


if __name__ == "__main__":
    typer.run(main)
