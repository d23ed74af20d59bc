"""What the library makes of a network of the zoo, as a row of docs/zoo.md, and the file that keeps the rows."""

import csv
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lmc_curvature import Objective, Projection, project_hessian
from lmc_curvature.errors import FallbackWarning, LMCCurvatureError
from tests.support.sweeping import compiled_batches, layer_directions, rules_of, swept_by_autodiff
from tests.support.zoo import ZOO, Specimen

ROOT = Path(__file__).parents[3]
PAGE, ROWS = ROOT / "docs" / "zoo.md", ROOT / "docs" / "results" / "zoo" / "networks.csv"
PACKAGES = ("torch", "torchvision", "timm", "transformers")

# Of these the one that suits a network best: long ones lose to kinks, short ones to rounding.
_STEPS = (1e-2, 1e-3, 1e-4, 1e-5)


@dataclass(frozen=True)
class Row:
    """A network of the zoo and the road that it takes.

    Attributes:
        network, family: Its name and kind.
        losses, policies: What was tried, one after the other.
        road: `"sweep"`, `"products"` or `"refused"`.
        reason: Why not the sweep, as the warning or the error says it.
        operations: Operations of the captured graphs that the directions reach; how many kinds of them go by autodiff.
        products, differences: The largest difference to Hessian-vector products, and to differences of the loss, as a
            share of the largest value; empty where there is none.
    """

    network: str
    family: str
    losses: str
    policies: str
    road: str
    reason: str
    operations: str
    products: str
    differences: str


@dataclass(frozen=True)
class Trial:
    """What came of one loss under one policy; not-a-number where nothing was compared."""

    road: str
    reason: str = ""
    operations: str = ""
    products: float = np.nan
    differences: float = np.nan


def row_of(name: str) -> Row:
    """Try a network with all its losses and policies."""
    specimen = ZOO[name]
    trials = [trial_of(specimen, loss, policy) for loss, policy in specimen.trials]
    return Row(
        name,
        specimen.family,
        ", ".join(specimen.losses),
        ", ".join(specimen.policies),
        _joined(trial.road for trial in trials),
        _joined(trial.reason for trial in trials),
        trials[0].operations,
        _largest(trial.products for trial in trials),
        _largest(trial.differences for trial in trials),
    )


def _joined(texts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(text for text in texts if text))


def _largest(values: Iterable[float]) -> str:
    known = [value for value in values if not np.isnan(value)]
    return f"{max(known):.0e}" if known else ""


def trial_of(specimen: Specimen, loss: str, policy: Any) -> Trial:
    """Project along a few layers and all of them together, and compare."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            objective = Objective(
                specimen.model(), specimen.batches(), loss_fn=specimen.losses[loss], batch_norm=policy
            )
            directions = layer_directions(objective, "module", most=3)
            found = project_hessian(objective, {}, directions)
        except LMCCurvatureError as error:
            return Trial("refused", sentence(str(error)))
        # Under "recalibrate" derivatives are those of "batch", and losses are not.
        differences = np.nan if policy == "recalibrate" else _by_differences(objective, directions, found)
        expected = project_hessian(objective, {}, directions, method="hvp")
    falls = [str(each.message) for each in caught if issubclass(each.category, FallbackWarning)]
    if falls:
        return Trial("products", sentence(falls[0]), differences=differences)
    compiled = compiled_batches(objective, directions)[0]
    count, own = len(rules_of(compiled)), len(swept_by_autodiff(compiled))
    operations = f"{count}, {own} by autodiff" if own else str(count)
    return Trial("sweep", "", operations, _difference(found, expected), differences)


def _difference(found: Projection, expected: Projection) -> float:
    pairs = [
        (found.batch_losses, expected.batch_losses),
        (found.batch_slopes, expected.batch_slopes),
        (found.batch_curvatures, expected.batch_curvatures),
    ]
    return max(np.abs(one - other).max() / np.abs(other).max() for one, other in pairs)


def _by_differences(objective: Objective, directions: Mapping[str, Mapping[str, Tensor]], found: Projection) -> float:
    """Slope and curvature along the last direction against differences of five losses."""
    state, along = objective.state(), list(directions.values())[-1]

    def loss(step: float) -> float:
        return objective.loss({name: state[name] + step * tensor for name, tensor in along.items()})

    errors, middle = [], loss(0.0)
    for step in _STEPS:
        before, back, ahead, beyond = (loss(places * step) for places in (-2, -1, 1, 2))
        slope = (before - 8 * back + 8 * ahead - beyond) / (12 * step)
        curvature = (-before + 16 * back - 30 * middle + 16 * ahead - beyond) / (12 * step**2)
        errors.append(
            max(
                abs(slope - found.slopes[-1]) / np.abs(found.slopes).max(),
                abs(curvature - found.curvature[-1, -1]) / np.abs(found.curvature).max(),
            )
        )
    return min(errors)


def sentence(message: str) -> str:
    """What an error or a warning says, without the line that it points to and numbers that rounding changes."""
    text = message.partition(" Falling back on")[0]
    text = re.sub(r" \(at .*\)(?=\.|: |$)", "", text, flags=re.DOTALL)
    return re.sub(r"-?\d+\.\d+(e[-+]?\d+)?|\d+e[-+]?\d+", "…", " ".join(text.split()))


# --- The file and the page


def read_rows() -> dict[str, Row]:
    """The rows that were computed before, by network."""
    if not ROWS.exists():
        return {}
    with ROWS.open(encoding="utf-8", newline="") as file:
        return {row["network"]: Row(**row) for row in csv.DictReader(file)}


def write_rows(rows: Mapping[str, Row]) -> None:
    """Write the rows, in the order of the zoo, and the page's table anew."""
    kept = [rows[name] for name in ZOO if name in rows]
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    with ROWS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in kept)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGINNING)
    after = rest.partition(_END)[2]
    PAGE.write_text(f"{before}{_BEGINNING}\n\n{table(kept)}\n{_END}{after}", encoding="utf-8")


_BEGINNING, _END = "<!-- table: the zoo -->", "<!-- end of the table -->"


def shown() -> str:
    """The table that the page shows."""
    return PAGE.read_text(encoding="utf-8").partition(_BEGINNING)[2].partition(_END)[0].strip("\n")


def versions() -> str:
    """The packages that rows depend on, with their versions."""
    return ", ".join(f"{package} {version(package).partition('+')[0]}" for package in PACKAGES)


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown, a table for each road, under a sentence that counts them."""
    rows = list(rows)
    by_road = {road: [row for row in rows if row.road == road] for road in ("sweep", "products", "refused")}
    count = {road: len(each) for road, each in by_road.items()}
    lines = [
        f"Of {len(rows)} networks {count['sweep']} go through the sweep, {count['products']} fall back on products and "
        f"{count['refused']} are refused ({versions()}).",
        *_table(
            "Through the sweep", ("network", "kind", "losses", "batch norm", "operations", "products", "differences")
        ),
        *(
            _line(row.network, row.family, row.losses, row.policies, row.operations, row.products, row.differences)
            for row in by_road["sweep"]
        ),
        *_table("By products", ("network", "kind", "why", "differences")),
        *(_line(row.network, row.family, row.reason, row.differences) for row in by_road["products"]),
        *_table("Refused", ("network", "kind", "why")),
        *(_line(row.network, row.family, row.reason) for row in by_road["refused"]),
    ]
    return "\n".join(lines) + "\n"


def _table(title: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return "", f"## {title}", "", _line(*names), _line(*("---" for _ in names))


def _line(*cells: str) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_") or "–"
