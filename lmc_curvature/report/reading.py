"""The contents of a report from files: of results, of the demo, and of a forking experiment."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lmc_curvature.barrier import BarrierMeasurement, BarrierPrediction
from lmc_curvature.errors import CheckpointError, FileFormatError, OptionError
from lmc_curvature.figures.frames import by_fork, numbers
from lmc_curvature.forking import open_directory
from lmc_curvature.merging import Selection, Verification
from lmc_curvature.merging.trials import SetTrial
from lmc_curvature.report.contents import TITLE, Contents, Pair, pair_of
from lmc_curvature.storage import parse_json, read_safetensors, refuse_damage
from lmc_curvature.tracing import read_traces
from lmc_curvature.tracing.pair import Pair as TracedPair

_LOADERS: Mapping[str, Callable[[Path], Any]] = {
    "barrier-prediction": BarrierPrediction.load,
    "barrier-measurement": BarrierMeasurement.load,
}
# What files of a traced pair are called in a report.
_TITLES = {"train": "measured (training data)", "test": "measured (test data)", "sets": "measured (sets of layers)"}

MakePair = Callable[..., Pair]


def read_contents(
    paths: Sequence[Path],
    *,
    budget: float | None = None,
    relative_budget: float | None = None,
    merge: Sequence[str] | None = None,
    records: Mapping[str, Mapping[str, Any]] | None = None,
    raw: bool = False,
) -> Contents:
    """What a report on files shows.

    Args:
        paths: The directory of the demo or of a traced experiment; or files of results of the same two networks.
        budget: The largest rise of the loss where layers are averaged; by default what counts as none.
        relative_budget: The same, as a part of the mean loss of the two networks.
        merge: The words of the command that merges the two networks, where it is known.
        records: What commands printed as JSON about the same networks, by the names of the files: their provenance, and
            of `select` what was measured.
        raw: Whether the values of every batch become part of the page.

    Raises:
        OptionError: A directory stands beside other paths, or there is none.
        FileNotFoundError: There is no such file.
        CheckpointError: A directory holds nothing that was traced.
        FileFormatError: A file is damaged, or holds no result.
    """
    directories, records = [path for path in paths if path.is_dir()], records or {}
    if not paths or (directories and (len(paths) > 1 or records)):
        raise OptionError("Pass one directory of an experiment, or files of results of the same two networks.")
    options = {"budget": budget, "relative_budget": relative_budget}
    if directories:
        make = partial(pair_of, **options)
        return (_demo if (paths[0] / "barriers").is_dir() else _experiment)(paths[0], make, raw)
    pair = pair_of("", [read_result(path) for path in paths], merge=merge, **options)
    for name, record in records.items():
        with refuse_damage(name):
            pair = _verified(pair, record)
    provenance = {name: record.get("provenance") for name, record in records.items()}
    return Contents(title=TITLE, pairs=(pair,), provenance={"files": list(map(str, paths)), **provenance}, raw=raw)


def _verified(pair: Pair, record: Mapping[str, Any]) -> Pair:
    """The pair with the selection that `select` found, and what it measured; as it is by records of others."""
    if pair.selection is None or not record.get("measurements") or not record.get("measured"):
        return pair
    trials = [_trial(each) for each in record["measurements"]]
    held_out, chosen = record.get("held_out"), _trial(record["measured"])
    choice = replace(pair.selection.choice, budget=float(record["budget"]), bases=(chosen.base,))
    selection = Selection.of(choice, choice.members(chosen.members), chosen.base)
    caution = float(record.get("provenance", {}).get("options", {}).get("caution", 2.0))
    verification = Verification(
        selection, tuple(trials), chosen, caution, None if held_out is None else _trial(held_out)
    )
    return replace(pair, selection=selection, verification=verification)


def _trial(record: Mapping[str, Any]) -> SetTrial:
    numbers = {name: _number(record[name]) for name in ("predicted", "expected", "rise", "standard_error", "weight")}
    if not (math.isfinite(numbers["rise"]) and math.isfinite(numbers["weight"])):
        raise ValueError("a rise or a weight is no finite number")
    return SetTrial(members=tuple(record["layers"]), base=record["base"], **numbers)


def _number(value: float | None) -> float:
    """A number as it was before JSON, which has none that are not finite."""
    return math.nan if value is None else float(value)


def read_result(path: Path) -> BarrierPrediction | BarrierMeasurement:
    """The prediction or the measurement in a file.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: It is damaged, or holds neither.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    kind = read_safetensors(path, "np")[0].get("kind")
    if kind in ("barriers-prediction", "barriers-measurement"):
        raise FileFormatError(
            f"{path} is of three networks or more, and a page shows two: --save of predict, measure or select of two."
        )
    if not isinstance(kind, str) or kind not in _LOADERS:
        raise FileFormatError(
            f"{path} holds {'no result' if kind is None else repr(kind)}; expected a file that `save` of a prediction "
            "or a measurement wrote, as by --save of predict, measure and select."
        )
    return _LOADERS[kind](path)


def _demo(path: Path, make: MakePair, raw: bool) -> Contents:
    pairs = []
    folders = {folder.name.removeprefix("fork-"): folder for folder in sorted((path / "barriers").glob("fork-*"))}
    for fork, folder in ((int(number), folder) for number, folder in folders.items() if number.isdecimal()):
        results = {name: read_result(folder / f"{name}.safetensors") for name in ("predicted", "measured")}
        pairs.append(make(_fork_title(fork), results, merge=_merge_words(path / "forks", fork, None)))
    if not pairs:
        raise CheckpointError(f"{path / 'barriers'} holds no results; lmc-curvature demo --out {path} makes them.")
    title = f"Can siblings be averaged? The demo in {path.name}"
    return Contents(title=title, pairs=tuple(pairs), provenance=_provenance(path / "forks"), raw=raw)


def _experiment(path: Path, make: MakePair, raw: bool) -> Contents:
    traces, directory = read_traces(path), open_directory(path)
    pairs = []
    for fork, rows in by_fork(traces.geometry).items():
        epoch = int(numbers(rows, "epoch").max())
        traced = TracedPair(directory, fork, epoch)
        results: dict[str, Any] = {}
        for file in traced.files():
            if file.is_file() and file.stem != "geometry":
                results[_TITLES.get(file.stem, file.stem)] = read_result(file)
        if results:
            pairs.append(make(_fork_title(fork), results, merge=_merge_words(path, fork, epoch)))
    title = f"Can siblings be averaged? The experiment in {path.name}"
    return Contents(title=title, pairs=tuple(pairs), traces=traces, provenance=_provenance(path), raw=raw)


def _fork_title(fork: int) -> str:
    return f"fork at epoch {fork}"


def _merge_words(path: Path, fork: int, epoch: int | None) -> list[str]:
    """The command that merges the first two siblings of a fork at an epoch, by default the last."""
    directory = open_directory(path)
    config = directory.config
    last = config.training.epochs if epoch is None else epoch
    files = [str(directory.child(fork, child).snapshot_path(last)) for child in (0, 1)]
    words = ["lmc-curvature", "merge", *files, "--model", str(config.model)]
    for name, value in config.model_options.items():
        words += ["--model-option", f"{name}={json.dumps(value) if not isinstance(value, str) else value}"]
    partition = config.trace.partition
    return words + (["--partition", partition] if partition != "fused" else [])


def _provenance(path: Path) -> dict[str, Any]:
    """The configuration of an experiment, and what it was begun with."""
    files = {"experiment": path / "config.json", "begun with": path / "provenance.json"}
    found = {}
    for name, file in files.items():
        if file.is_file():
            with refuse_damage(file):
                found[name] = parse_json(file.read_text(encoding="utf-8"))
    return found
