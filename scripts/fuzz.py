"""Which damaged or hostile files end otherwise than in an error that names them?

    python scripts/fuzz.py --minutes 10 --seed 0

Files of every kind that the library reads are changed, blindly and by their structure, and read. Whatever is raised but
the errors that the readers' documentation names, memory without bound, a file outside of its folder, and, where files
have checksums, other contents than were written, is a failure, which is reduced to a small one and printed. Each kind
is read in a process of its own, so that a crash is found, too. `--only PATTERN` chooses kinds.
"""

import contextlib
import csv
import dataclasses
import fnmatch
import io
import json
import math
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import typer
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from lmc_curvature import BarrierMeasurement, BarrierPrediction, measure_barrier, predict_barrier
from lmc_curvature.checkpoints import load_checkpoint, read_snapshot, write_snapshot
from lmc_curvature.cli.report import _merge_words, _record
from lmc_curvature.errors import CheckpointError, ConfigurationError, DataError, FileFormatError, LMCCurvatureError
from lmc_curvature.forking import ForkConfig, load_child, load_config, open_directory, run_forks
from lmc_curvature.forking.provenance import recorded_splits
from lmc_curvature.geometry import SiblingGeometry
from lmc_curvature.merging.checking import check_checkpoints
from lmc_curvature.merging.files import merge_checkpoints, plan_merge
from lmc_curvature.report.page import page
from lmc_curvature.report.reading import read_contents
from lmc_curvature.sources.data import load_image_folder
from lmc_curvature.storage import make_header
from lmc_curvature.tracing import read_traces, trace_forks

MEMORY = 400 << 20
"""How many bytes more a reader may take than it took before."""

EXAMPLES, SECONDS = 60, 180
"""What a process reads of a kind before others come, and how long it may take."""

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1.5, 10**30, 2**63, math.nan, math.inf, "", "a", "0", "9" * 5000, "nan", "@deep"),
    *(
        "../../outside",
        "/tmp/outside",
        "a\0b",
        "</script><script>alert(1)</script>",
        "\ud800",
        "\u2028",
        "self",
        "kind",
    ),
    *([], {}, [[]], [0, 1], ["a", "a"], {"a": {"b": [None]}}, "x" * 100_000),
)
"""Values to find in place of others; `@deep` stands for what is nested too deeply."""

YAML = (
    *(
        "&a",
        "*a",
        "<<: *a\n",
        "!!python/object/apply:os.system [echo]",
        "!!timestamp x",
        "!!bool x",
        "!!int x",
        "!!binary x",
    ),
    *(
        "\t",
        "- ",
        "? ",
        "{",
        "[",
        "]",
        ": ",
        "2001-99-99",
        "0x_",
        "1:99",
        "'",
        '"',
        "|",
        "\0",
        "---\n",
        "...\n",
        "%YAML 9.9\n",
    ),
    *("[" * 3000, "a: {" * 3000, "self: 1\n", "data: [&a [x, x], &b [*a, *a]]\n"),
)

Draw = Callable[[st.SearchStrategy[Any]], Any]


def network(seed_value: int | None = None) -> nn.Sequential:
    """A network with parameters, running statistics and a counter."""
    if seed_value is not None:
        torch.manual_seed(seed_value)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


# What is done to files.


def blindly(draw: Draw, contents: bytes) -> bytes:
    """The same bytes but for one to three edits."""
    for _ in range(draw(st.integers(1, 3))):
        contents = edited(draw, contents)
    return contents


def edited(draw: Draw, contents: bytes) -> bytes:
    """The same bytes, with some of them changed, left out, repeated or put in."""
    place = draw(st.integers(0, max(len(contents) - 1, 0)))
    # Headers are where it hurts.
    place = draw(st.sampled_from((place, place % 64, max(len(contents) - 1 - place % 128, 0))))
    length = draw(st.sampled_from((1, 2, 4, 8, 100)))
    before, part, after = contents[:place], contents[place : place + length], contents[place + length :]
    kind = draw(st.sampled_from(("bit", "bytes", "fill", "delete", "insert", "cut", "repeat", "reverse", "append")))
    if kind == "bit":
        return (
            before
            + bytes([(contents[place : place + 1] or b"\0")[0] ^ 1 << draw(st.integers(0, 7))])
            + contents[place + 1 :]
        )
    if kind == "bytes":
        return before + draw(st.binary(min_size=length, max_size=length)) + after
    if kind == "fill":
        return before + draw(st.sampled_from((b"\0", b"\xff", b"\x7f", b"9", b"("))) * len(part) + after
    if kind == "append":
        return contents + draw(st.binary(min_size=1, max_size=length))
    made = {"delete": b"", "insert": part + draw(st.binary(min_size=1, max_size=length)), "repeat": part * 3}
    return before if kind == "cut" else before + (part[::-1] if kind == "reverse" else made[kind]) + after


def edited_value(draw: Draw, value: Any) -> Any:
    """A value of JSON with something in it replaced, renamed, left out or doubled."""
    inner = value if isinstance(value, (dict, list)) and value and draw(st.integers(0, 4)) else None
    if inner is None:
        return draw(st.sampled_from(HOSTILE))
    key = draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))
    changed = dict(inner) if isinstance(inner, dict) else list(inner)
    what = draw(st.sampled_from(("within", "within", "within", "delete", "rename", "double")))
    if what == "within":
        changed[key] = edited_value(draw, changed[key])
    elif what == "delete":
        del changed[key]
    elif isinstance(changed, list):
        changed.append(changed[key])
    else:
        name = draw(st.sampled_from([each for each in HOSTILE if isinstance(each, str)] + list(changed)))
        changed[name] = changed.pop(key) if what == "rename" else changed[key]
    return changed


def json_text(value: Any) -> str:
    """A value as JSON, deep where it says so."""
    depth = 100_000
    return json.dumps(value).replace('"@deep"', "[" * depth + "]" * depth)


def in_json(draw: Draw, contents: bytes) -> bytes:
    """A file of JSON with another value in it."""
    return json_text(edited_value(draw, json.loads(contents))).encode()


def in_yaml(draw: Draw, contents: bytes) -> bytes:
    """A file of YAML with another value in it, or with a piece of its grammar somewhere."""
    if draw(st.booleans()):
        value = edited_value(draw, yaml.safe_load(contents))
        return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")
    text = contents.decode()
    places = [0, *(place + 1 for place, char in enumerate(text) if char in " \n:[")]
    place = draw(st.sampled_from(places))
    return (text[:place] + draw(st.sampled_from(YAML)) + text[place:]).encode()


def in_csv(draw: Draw, contents: bytes) -> bytes:
    """A table with another value in a cell."""
    rows = list(csv.reader(io.StringIO(contents.decode())))
    row = rows[draw(st.integers(0, len(rows) - 1))]
    row[draw(st.integers(0, len(row) - 1))] = str(draw(st.sampled_from(HOSTILE))).replace("\ud800", "?")
    written = io.StringIO()
    csv.writer(written).writerows(rows)
    return written.getvalue().encode()


def in_header(draw: Draw, contents: bytes) -> bytes:
    """A safetensors file with another header, or another length of it."""
    length = int.from_bytes(contents[:8], "little")
    header = json_text(edited_value(draw, json.loads(contents[8 : 8 + length]))).encode()
    said = draw(st.sampled_from((len(header), len(header), len(header), length, 2**63, 2**64 - 1, 10**8, 0)))
    order = draw(st.sampled_from(("little", "little", "little", "big")))
    return said.to_bytes(8, order) + header + contents[8 + length :]


def sealed_anew(draw: Draw, contents: bytes) -> bytes:
    """A file of ours with other arrays or metadata, and the checksum of these."""
    arrays = dict(safetensors.numpy.load(contents))
    length = int.from_bytes(contents[:8], "little")
    header = json.loads(json.loads(contents[8 : 8 + length])["__metadata__"]["lmc_curvature"])
    if draw(st.booleans()):
        header["metadata"] = edited_value(draw, header["metadata"])
    elif arrays:
        name = draw(st.sampled_from(sorted(arrays)))
        changed = {
            "delete": lambda array: None,
            "other type": lambda array: array.astype(
                draw(st.sampled_from((np.int8, np.float16, np.bool_, np.complex64)))
            ),
            "other shape": lambda array: array.reshape(-1) if array.ndim != 1 else array[None],
            "shorter": lambda array: array[:-1] if array.ndim else array,
            "other number": lambda array: np.full_like(array, draw(st.sampled_from((0, -1, 1e300, np.nan, np.inf)))),
            "empty": lambda array: array[..., None][..., :0],
        }
        with np.errstate(all="ignore"):
            array = changed[draw(st.sampled_from(sorted(changed)))](arrays.pop(name))
        arrays |= {} if array is None else {name: np.ascontiguousarray(array)}
    try:
        again = make_header(header["kind"], arrays, header["metadata"])
    except (TypeError, ValueError):
        return contents
    return safetensors.numpy.save(
        arrays, {name: text.replace('"@deep"', "[" * 9999 + "]" * 9999) for name, text in again.items()}
    )


def in_archive(draw: Draw, contents: bytes) -> bytes:
    """An archive of torch with a member changed, renamed, left out, doubled, or compressed."""
    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    index = draw(st.integers(0, len(members) - 1))
    name, data = members[index]
    what = draw(
        st.sampled_from(("edit", "edit", "edit", "pickle", "pickle", "rename", "delete", "double", "bomb", "big"))
    )
    how = members
    if what == "pickle":
        index = next(k for k, (each, _) in enumerate(members) if each.endswith("data.pkl"))
        name, data = members[index]
    if what in ("edit", "pickle"):
        how[index] = (name, blindly(draw, data))
    elif what == "rename":
        how[index] = (name + str(draw(st.sampled_from(HOSTILE[9:20]))).replace("\ud800", "?")[:300], data)
    elif what == "delete":
        del how[index]
    elif what == "double":
        how.append((name, blindly(draw, data)))
    elif what == "bomb":
        del how[index]
    else:
        how = [(each, b"big" if each.endswith("byteorder") else part) for each, part in members]
    written = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(written, "w") as archive:
        # Of names that are there twice.
        warnings.simplefilter("ignore")
        for each, part in how:
            archive.writestr(each, part)
        if what == "bomb":
            archive.compression = zipfile.ZIP_DEFLATED
            with archive.open(name, "w") as stream:
                stream.write(data)
                for _ in range(600):
                    stream.write(bytes(1 << 20))
    return written.getvalue()


# What is read.


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file, or of folder.

    Attributes:
        make: Writes one into a folder that is there, and returns the path to read.
        read: Reads it, and returns what it holds, as what can be compared; uses a folder beside it for what it writes.
        errors: What it may raise.
        ways: How files are changed besides blindly: pattern of the files to the way.
        is_sealed: Whether what is read after a single blind edit is what was written, since there are checksums.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    errors: type[Exception]
    ways: Mapping[str, tuple[Callable[[Draw, bytes], bytes], ...]]
    is_sealed: bool = False


def _saved(folder: Path, **options: Any) -> Path:
    torch.save({"state_dict": network(0).state_dict(), "epoch": 3}, folder / "a.pt", **options)
    return folder / "a.pt"


def _safetensors(folder: Path) -> Path:
    save_file(network(0).state_dict(), folder / "a.safetensors", {"format": "pt"})
    return folder / "a.safetensors"


def _shards(folder: Path) -> Path:
    entries = network(0).state_dict()
    places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(entries)}
    for shard in set(places.values()):
        save_file({name: entries[name] for name in entries if places[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def _snapshot(folder: Path) -> Path:
    state = {"epoch": 3, "history": [[1, 0.1, 0.5, 0.9]]}
    write_snapshot(folder / "own.safetensors", network(0).state_dict(), {"0.weight": torch.ones(5, 4)}, state)
    return folder / "own.safetensors"


def _loader() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(3)]


def _prediction(folder: Path) -> Path:
    predict_barrier(network(0), network(1), _loader(), progress=False).save(folder / "p.safetensors")
    return folder / "p.safetensors"


def _measurement(folder: Path) -> Path:
    measured = measure_barrier(network(0), network(1), _loader(), sets="each", alphas=5, progress=False)
    measured.save(folder / "m.safetensors")
    return folder / "m.safetensors"


def _geometry(folder: Path) -> Path:
    SiblingGeometry(1.25, 0.5, -0.25, 1.0).save(folder / "g.safetensors")
    return folder / "g.safetensors"


def _report(folder: Path) -> Path:
    prediction, measurement = BarrierPrediction.load(_prediction(folder)), BarrierMeasurement.load(_measurement(folder))
    trial = {
        "layers": list(prediction.layers),
        "base": "a",
        "weight": 5.0,
        "predicted": 0.1,
        "expected": 0.1,
        "rise": 0.1,
    }
    trial |= {"standard_error": 0.01, "share": 1.0}
    record = {"budget": 0.1, "measurements": [trial], "measured": trial, "held_out": None}
    networks = {name: {"path": f"{name}.pt", "sha256": {}} for name in ("a", "b")}
    model = {"name": "digits-resnet", "options": {"width": 2}, "key": None, "strip_prefix": None}
    record["provenance"] = {
        "networks": networks,
        "model": model,
        "data": {"name": "digits"},
        "options": {"caution": 2.0},
    }
    (folder / "r.json").write_text(json.dumps(record))
    assert measurement.sets
    return folder


def _configuration(folder: Path) -> Path:
    text = (Path(__file__).parents[1] / "configs" / "digits.yaml").read_text(encoding="utf-8")
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    return folder / "c.yaml"


def _experiment(folder: Path) -> Path:
    config = ForkConfig(
        training={"epochs": 2, "learning_rate": 0.1, "batch_size": 50},
        fork_epochs=[0],
        snapshot_epochs=1,
        limit=100,
        model_options={"width": 1},
        threads=1,
        trace={"batch_size": 50, "alphas": 3, "layer_alphas": 3, "test": False},
    )
    run_forks(config, folder, progress=False)
    trace_forks(folder, progress=False)
    return folder


def _images(folder: Path) -> Path:
    for name, kind in {"a": "png", "b": "jpeg", "c": "bmp", "d": "webp", "e": "gif", "f": "tiff", "g": "ppm"}.items():
        (folder / "train" / name).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train" / name / f"x.{kind}")
    return folder


def _read_checkpoint(path: Path) -> Any:
    return load_checkpoint(network(1), path).state_dict()


def _read_snapshot(path: Path) -> Any:
    model, optimizer, metadata = read_snapshot(path)
    with contextlib.suppress(CheckpointError):
        load_checkpoint(network(1), path)
    return {**model, **{f"optimizer.{name}": entry for name, entry in optimizer.items()}, "metadata": metadata}


def _merge(path: Path) -> Any:
    out = path.parent / "out"
    other = out / "b.safetensors"
    out.mkdir(exist_ok=True)
    save_file(network(1).state_dict(), other)
    for options in ({}, {"key": "state_dict"}):
        with contextlib.suppress(LMCCurvatureError):
            check_checkpoints(path, other, distances=True, **options)
    merge_checkpoints(plan_merge(path, other, partition="module"), out / "m.safetensors", mergekit=out / "m.yaml")
    # What was written can be read.
    check_checkpoints(out / "m.safetensors", other)
    return None


def _read_prediction(path: Path) -> Any:
    prediction = BarrierPrediction.load(path)
    with np.errstate(all="ignore"):
        assert str(prediction)
        assert repr(prediction)
        prediction.to_dataframe()
    return {
        "layers": prediction.layers,
        "distances": prediction.distances,
        "curvature": prediction.endpoints[0].curvature,
    }


def _read_measurement(path: Path) -> Any:
    measurement = BarrierMeasurement.load(path)
    with np.errstate(all="ignore"):
        assert str(measurement)
        measurement.to_dataframe()
    return {"sets": measurement.sets, "values": measurement.batch_values}


def _read_report(path: Path) -> Any:
    record = _record(path / "r.json")
    results = [path / "p.safetensors", path / "m.safetensors"]
    contents = read_contents(results, records={"r.json": record}, merge=_merge_words(record))
    with np.errstate(all="ignore"):
        text = page(contents)
    assert "<script>alert(1)" not in text
    text.encode()
    return None


def _read_experiment(path: Path) -> Any:
    directory = open_directory(path)
    recorded_splits(directory)
    assert isinstance(directory.failures(), dict)
    for run in directory.runs()[:4]:
        assert run.status
    traces = read_traces(path)
    child = load_child(path, directory.config.fork_epochs[0], 1)
    return {**child.state_dict(), "traces": {name: table.to_csv() for name, table in vars(traces).items()}}


def _read_images(path: Path) -> Any:
    return {"images": len(load_image_folder(path, resize=6, progress=False))}


_TORCH = {"*.pt": (in_archive,)}
_TENSORS = {"*.safetensors": (in_header,)}
_OWN = {"*.safetensors": (in_header, sealed_anew)}
KINDS: dict[str, Kind] = {
    "torch.save": Kind(_saved, _read_checkpoint, CheckpointError, _TORCH, is_sealed=True),
    "torch.save before 1.6": Kind(
        lambda folder: _saved(folder, _use_new_zipfile_serialization=False), _read_checkpoint, CheckpointError, {}
    ),
    "safetensors": Kind(_safetensors, _read_checkpoint, CheckpointError, _TENSORS),
    "shards": Kind(_shards, _read_checkpoint, CheckpointError, _TENSORS | {"*.json": (in_json,)}),
    "snapshots": Kind(_snapshot, _read_snapshot, CheckpointError, _OWN, is_sealed=True),
    "merges of torch.save": Kind(_saved, _merge, LMCCurvatureError, _TORCH),
    "merges of safetensors": Kind(_safetensors, _merge, LMCCurvatureError, _TENSORS),
    "predictions": Kind(_prediction, _read_prediction, FileFormatError, _OWN, is_sealed=True),
    "measurements": Kind(_measurement, _read_measurement, FileFormatError, _OWN, is_sealed=True),
    "geometries": Kind(_geometry, lambda path: vars(SiblingGeometry.load(path)), FileFormatError, _OWN, is_sealed=True),
    "reports": Kind(_report, _read_report, LMCCurvatureError, _OWN | {"*.json": (in_json,)}),
    "configurations": Kind(
        _configuration, lambda path: load_config(path) and None, ConfigurationError, {"*": (in_yaml,)}
    ),
    "experiments": Kind(
        _experiment,
        _read_experiment,
        LMCCurvatureError,
        {"*.json": (in_json,), "*.csv": (in_csv,), "*.safetensors": (in_header, sealed_anew)},
    ),
    "images": Kind(_images, _read_images, DataError, {}),
}


# How that is done.


class ReadingError(AssertionError):
    """What a reader must not do."""


def make_all(root: Path, names: list[str]) -> None:
    """Write a whole file or folder of each kind."""
    for name in names:
        (root / name).mkdir(parents=True)
        KINDS[name].make(root / name)


def fuzz(name: str, root: Path, *, examples: int, seed_value: int, count: Callable[[], None] = lambda: None) -> None:
    """Read changed files of a kind.

    Args:
        name: The kind.
        root: Where `make_all` wrote one.
        examples: How many to read.
        seed_value: Decides what is changed.
        count: Called for each.

    Raises:
        ReadingError: A reader did what it must not, with the smallest change that was found to make it.
    """
    kind, whole = KINDS[name], root / name
    files = sorted(
        str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file() and path.suffix != ".lock"
    )
    expected = None if not kind.is_sealed else _plain(kind.read(whole / files[0]))

    @seed(seed_value)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        count()
        file = data.draw(st.sampled_from(files))
        contents = (whole / file).read_bytes()
        ways = [way for pattern, found in kind.ways.items() if fnmatch.fnmatch(file, pattern) for way in found]
        way = data.draw(st.sampled_from([*ways, blindly, edited]))
        changed = way(data.draw, contents)
        with tempfile.TemporaryDirectory(dir=root) as outer:
            _read(kind, whole, Path(outer) / "inner", file, changed, expected if way is edited else None)
            outside = [path.name for path in Path(outer).iterdir() if path.name != "inner"]
            if outside:
                raise ReadingError(f"written outside of the folder: {outside}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt()


def _read(kind: Kind, whole: Path, folder: Path, file: str, contents: bytes, expected: Any) -> None:
    """Read a copy of a whole folder in which a file has other contents."""
    shutil.copytree(whole, folder)
    (folder / file).write_bytes(contents)
    # What may be changed without a checksum is what a stranger could write.
    if file.endswith(".csv") and len(contents) % 2:
        (folder / "traces" / "checksums.json").unlink()
    single = list(folder.iterdir())
    path = folder / file if len(single) == 1 and single[0].is_file() else folder
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = kind.read(path)
    except kind.errors as error:
        names = [each.name for each in folder.rglob("*")] + [folder.name]
        if not any(each in str(error) for each in names):
            raise ReadingError(f"the error names no file: {error}") from error
        return
    finally:
        taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if taken > MEMORY:
        raise ReadingError(f"reading took {taken >> 20} MiB")
    if expected is not None and _plain(found) != expected:
        raise ReadingError("other contents were read than were written, in spite of their checksum")


def _plain(value: Any) -> Any:
    """A value as what can be compared."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return str(value.dtype), tuple(value.shape), np.asarray(value).tobytes()
    return value


def _in_a_process(name: str, root: Path, seed_value: int, examples: int, counter: Any, said: Any) -> None:
    def count() -> None:
        counter.value += 1

    try:
        fuzz(name, root, examples=examples, seed_value=seed_value, count=count)
    except BaseException:  # noqa: BLE001 - the other process prints it
        said.send(traceback.format_exc()[-8000:])
        raise SystemExit(1) from None


def main(minutes: float = 0.5, seed: int = 0, only: str = "*", examples: int = EXAMPLES) -> None:
    """Read changed files of all kinds in turns, and print how many, and what failed."""
    torch.set_num_threads(1)
    names = [name for name in KINDS if fnmatch.fnmatch(name, only)]
    context, counts, failures = multiprocessing.get_context("fork"), dict.fromkeys(names, 0), dict[str, str]()
    print(f"seed {seed}, {minutes:g} minutes, kinds: {', '.join(names)}")
    number = 0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=round(60 * minutes), unit="s") as bar:
        maker = context.Process(target=make_all, args=(Path(folder), names))
        maker.start()
        maker.join()
        begun = time.monotonic()
        while time.monotonic() - begun < 60 * minutes and len(failures) < len(names):
            name = names[number % len(names)]
            number += 1
            if name in failures:
                continue
            bar.set_description(name)
            counter, (receiver, sender) = context.Value("l", 0), context.Pipe(duplex=False)
            arguments = (name, Path(folder), seed + number, examples, counter, sender)
            process = context.Process(target=_in_a_process, args=arguments)
            process.start()
            process.join(SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
                failures[name] = f"it hung: no end after {SECONDS} seconds"
            elif process.exitcode:
                failures[name] = receiver.recv() if receiver.poll() else f"the process ended with {process.exitcode}"
            counts[name] += counter.value
            bar.update(round(time.monotonic() - begun) - bar.n)
    for name, text in failures.items():
        print(f"\n{name} (rounds begin with seed {seed}):\n{text}")
    print("| files | read | failures |\n| --- | ---: | ---: |")
    for name in names:
        print(f"| {name} | {counts[name]:,} | {int(name in failures)} |")
    sys.exit(bool(failures))


if __name__ == "__main__":
    typer.run(main)
