"""The tables of a traced experiment, one a quantity, tidy: a row an observation.

All have `fork`, the epoch of the parent that siblings were forked at, and `epoch`, of the common schedule. Losses are
in nats, errors are shares of examples.
"""

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lmc_curvature.barrier.expansions import EXPANSIONS
from lmc_curvature.barrier.measurement import BarrierMeasurement
from lmc_curvature.barrier.metrics import METRICS
from lmc_curvature.barrier.prediction import BarrierPrediction
from lmc_curvature.errors import CheckpointError, counted
from lmc_curvature.forking import ForkDirectory, open_directory
from lmc_curvature.forking.directory import explain_damage
from lmc_curvature.geometry import SiblingGeometry
from lmc_curvature.plotting.summary import Display, Summary, some
from lmc_curvature.sources.images import SPLITS
from lmc_curvature.storage import read_json, refuse_damage, write_atomically, write_json
from lmc_curvature.tracing.pair import Pair, cumulative_sets

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Traces(Display):
    """The tables of a traced experiment.

    Attributes:
        curves: `split`, `metric`, `alpha`, `value`, and `barrier`, the value over the chord: of whole networks.
        barriers: `split`, `metric`, `barrier` (the maximum of its curve), `standard_error`, `end_a`, `end_b`.
        predictions: `expansion`, `barrier`, `standard_error`, `expansion_error`: of the training loss. There are rows
            for `"anchored"` where there are anchors between the ends, and the others have no expansion error.
        layers: `position`, `layer`, `distance`, `hessian_energy` (Δ_ℓᵀHΔ_ℓ, mean of both ends), `predicted` (second
            order), `predicted_with_slopes`, `predicted_anchored` and its `expansion_error`, `measured`, and
            `measured_lowest`, the minimum of the measured curve: zero, or how far it sinks below the chord. The last
            two are not numbers where nothing was measured, nor are anchored predictions where there are no anchors.
        cumulative: `side` (`"first"` or `"last"`), `count`: barriers of the first and last `count` layers: `measured`,
            `predicted` (second order), `predicted_with_slopes`, `predicted_anchored`, its `expansion_error`,
            `predicted_shared`, the interactions' sum (eq. 21), and `measured_se`, the standard error of the first.
        geometry: `distance` between siblings, `cosine_origin` and `cosine_fork` of the angle between them, and
            `cosine_final` of their difference with the final one: of parameters.
    """

    curves: pd.DataFrame
    barriers: pd.DataFrame
    predictions: pd.DataFrame
    layers: pd.DataFrame
    cumulative: pd.DataFrame
    geometry: pd.DataFrame

    def _summary(self) -> Summary:
        forks, epochs = (sorted(set(self.barriers[name])) for name in ("fork", "epoch"))
        return Summary(
            f"Traces of {counted(len(forks), 'fork')} over {counted(len(epochs), 'epoch')}, in tables",
            {
                "forks at": some([str(fork) for fork in forks]),
                "epochs": some([str(epoch) for epoch in epochs]),
                "rows": ", ".join(f"{name} {len(table)}" for name, table in vars(self).items()),
            },
            ".curves, .barriers, .predictions, .layers, .cumulative, .geometry",
        )


_COLUMNS = {
    "curves": "fork epoch split metric alpha value barrier",
    "barriers": "fork epoch split metric barrier standard_error end_a end_b",
    "predictions": "fork epoch expansion barrier standard_error expansion_error",
    "layers": "fork epoch position layer distance hessian_energy predicted predicted_with_slopes predicted_anchored "
    "expansion_error measured measured_lowest",
    "cumulative": "fork epoch side count measured predicted predicted_with_slopes predicted_anchored expansion_error "
    "predicted_shared measured_se",
    "geometry": "fork epoch distance cosine_origin cosine_fork cosine_final",
}
# Columns that tables of earlier versions do not have.
_LATER = ("predicted_anchored", "expansion_error", "measured_se")
_VERSION = "1"
_CHOICES = {"split": SPLITS, "metric": METRICS, "expansion": EXPANSIONS, "side": ("first", "last")}
_WHOLE = ("fork", "epoch", "position", "count")


def read_traces(out_dir: str | os.PathLike[str]) -> Traces:
    """Read the tables that `trace_forks` wrote.

    Raises:
        CheckpointError: The directory has none, or one is damaged.
    """
    directory = open_directory(out_dir)
    remedy = f"trace_forks({os.fspath(out_dir)!r}), or lmc-curvature trace {os.fspath(out_dir)}, makes it."
    with explain_damage(remedy):
        checksums = _read_checksums(directory)
    tables = {}
    for name, columns in _COLUMNS.items():
        path = _table_path(directory, name)
        try:
            contents = path.read_bytes()
            whole = not contents or contents.endswith(b"\n")
            if not whole or checksums.get(name, _checksum(contents)) != _checksum(contents):
                raise ValueError("it is not as it was written")
            tables[name] = _with_later(_parse(contents), columns.split())
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing; {remedy}") from error
        except (ValueError, OverflowError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from error
        found, expected = list(tables[name].columns), columns.split()
        if found != expected:
            raise CheckpointError(f"{path} has columns {found}; expected {expected}; {remedy}")
    return Traces(**tables)


def write_tables(directory: ForkDirectory, pairs: Sequence[Pair]) -> Traces:
    """Gather the results of the pairs that are done into tables, and write each as CSV, whole or not at all.

    Where nothing was traced, nothing is written.
    """
    # Whether a pair is done is asked when no other process writes tables, so that none can lose rows by it.
    with directory.writing(directory.path / "traces"):
        rows: dict[str, list[Row]] = {name: [] for name in _COLUMNS}
        for pair in pairs:
            for name, found in (_rows_of(pair.path) if pair.is_done() else {}).items():
                rows[name] += [{"fork": pair.fork_epoch, "epoch": pair.epoch, **row} for row in found]
        tables = {name: pd.DataFrame(rows[name], columns=columns.split()) for name, columns in _COLUMNS.items()}
        if rows["geometry"]:
            for name, table in tables.items():
                with write_atomically(_table_path(directory, name)) as temporary:
                    table.to_csv(temporary, index=False)
            checksums = {name: _checksum(_table_path(directory, name).read_bytes()) for name in tables}
            write_json(_checksums_path(directory), {"version": _VERSION, "sha256": checksums})
    return Traces(**tables)


def _with_later(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """A table with all columns of today, if it lacks some that came later: nothing is known of these."""
    found = list(table.columns)
    earlier = [column for column in columns if column in found or column not in _LATER]
    return table.reindex(columns=pd.Index(columns)) if found == earlier else table


def _parse(contents: bytes) -> pd.DataFrame:
    """A table from CSV.

    Raises:
        ValueError: It is none, or has other values than its columns are for.
    """
    # A layer may be called 0, or nan.
    table = pd.read_csv(io.BytesIO(contents), dtype={"layer": str}, keep_default_na=False, na_values=[""])
    for column in table.columns if len(table) else ():
        values = np.asarray(table[column])
        if column in _CHOICES:
            is_right = {*values} <= {*_CHOICES[column]}
        elif column in _WHOLE:
            is_right = values.dtype.kind == "i"
        else:
            is_right = column == "layer" or (values.dtype.kind in "if" and not bool(np.isinf(values).any()))
        if not is_right:
            raise ValueError(f"column {column!r} has values that do not belong there")
    return table


def _table_path(directory: ForkDirectory, name: str) -> Path:
    return directory.path / "traces" / f"{name}.csv"


def _checksums_path(directory: ForkDirectory) -> Path:
    return directory.path / "traces" / "checksums.json"


def _checksum(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def _read_checksums(directory: ForkDirectory) -> dict[str, str]:
    """The checksum of each table; none of experiments that were traced before there were checksums."""
    path = _checksums_path(directory)
    with refuse_damage(path):
        return dict(read_json(path, _VERSION).get("sha256", {})) if path.is_file() else {}


def _rows_of(path: Path) -> dict[str, list[Row]]:
    files = {file.stem: file for file in path.glob("*.safetensors")}
    prediction = BarrierPrediction.load(files["predicted"])
    measured = {split: BarrierMeasurement.load(files[split]) for split in ("train", "test") if split in files}
    sets: dict[tuple[str, ...], np.ndarray] = {}
    errors: dict[tuple[str, ...], float] = {}
    if "sets" in files:
        measurement = BarrierMeasurement.load(files["sets"])
        sets = dict(zip(measurement.sets, measurement.layer_curves(), strict=True))
        errors = dict(zip(measurement.sets, measurement.layer_standard_errors().tolist(), strict=True))
    return {
        "curves": [
            {"split": split, "metric": metric, "alpha": alpha, "value": value, "barrier": barrier}
            for split, found in measured.items()
            for metric in found.metrics
            for alpha, value, barrier in zip(found.alphas, found.values(metric), found.curve(metric), strict=True)
        ],
        "barriers": [
            {
                "split": split,
                "metric": metric,
                "barrier": found.barrier(metric),
                "standard_error": found.standard_error(metric),
                **dict(zip(("end_a", "end_b"), found.ends(metric), strict=True)),
            }
            for split, found in measured.items()
            for metric in found.metrics
        ],
        "predictions": [
            {
                "expansion": expansion,
                "barrier": prediction.barrier(None, expansion),
                "standard_error": prediction.standard_error(None, expansion),
                "expansion_error": prediction.expansion_error() if expansion == "anchored" else np.nan,
            }
            for expansion in EXPANSIONS
            if expansion != "anchored" or prediction.expansion == "anchored"
        ],
        "layers": list(_layer_rows(prediction, sets)),
        "cumulative": list(_cumulative_rows(prediction, sets, errors)),
        "geometry": [dataclasses.asdict(SiblingGeometry.load(files["geometry"]))],
    }


def _layer_rows(prediction: BarrierPrediction, curves: dict[tuple[str, ...], np.ndarray]) -> Iterator[Row]:
    second_order, with_slopes = prediction.layer_barriers("second-order"), prediction.layer_barriers("with-slopes")
    for position, layer in enumerate(prediction.layers):
        curve = curves.get((layer,), np.array([np.nan]))
        yield {
            "position": position,
            "layer": layer,
            "distance": prediction.distances[position],
            "hessian_energy": prediction.hessian_energy[position],
            "predicted": second_order[position],
            "predicted_with_slopes": with_slopes[position],
            **_anchored(prediction, (layer,)),
            "measured": curve.max(),
            "measured_lowest": curve.min(),
        }


def _cumulative_rows(
    prediction: BarrierPrediction, curves: dict[tuple[str, ...], np.ndarray], errors: dict[tuple[str, ...], float]
) -> Iterator[Row]:
    for side, count, members in cumulative_sets(prediction.layers):
        # Not every epoch has these if the configuration says so.
        if members in curves and prediction.layers in curves:
            yield {
                "side": side,
                "count": count,
                "measured": curves[members].max(),
                "predicted": prediction.barrier(members, "second-order"),
                "predicted_with_slopes": prediction.barrier(members, "with-slopes"),
                **_anchored(prediction, members),
                "predicted_shared": prediction.barrier(members, "shared-hessian"),
                "measured_se": errors[members],
            }


def _anchored(prediction: BarrierPrediction, members: Sequence[str]) -> Row:
    if prediction.expansion != "anchored":
        return {"predicted_anchored": np.nan, "expansion_error": np.nan}
    barrier = prediction.barrier(members, "anchored")
    return {"predicted_anchored": barrier, "expansion_error": prediction.expansion_error(members)}
