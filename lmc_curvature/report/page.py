"""The page: what a report shows, written into one HTML file that loads nothing and runs nothing but its own scripts."""

import base64
import hashlib
import json
import platform
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

import lmc_curvature
from lmc_curvature.barrier import BarrierMeasurement, BarrierPrediction
from lmc_curvature.barrier.losses import unit_of
from lmc_curvature.report.answers import answer_of
from lmc_curvature.report.charts import pair_charts, spectrum_chart
from lmc_curvature.report.contents import Contents, Results, gather
from lmc_curvature.report.experiments import experiment_charts, experiment_record
from lmc_curvature.report.picking import picker_record
from lmc_curvature.report.tables import pair_tables
from lmc_curvature.storage import write_atomically

_SCRIPTS = ("formula.js", "picker.js", "experiment.js", "page.js")
_TEMPLATE = Path(__file__).parent / "template"


def write_report(
    results: Results | Mapping[Any, Results],
    path: str | PathLike[str],
    *,
    title: str | None = None,
    budget: float | None = None,
    relative_budget: float | None = None,
    provenance: Mapping[str, Any] | None = None,
    raw: bool = False,
) -> None:
    """Write results as one HTML file that opens without a network.

    Its first screen answers whether the networks can be averaged, which layers are in the way, and how sure that is. A
    layer picker computes the predicted barrier of any set of layers at any α from the anchors' arrays, by the formula
    of `BarrierPrediction.set_barriers`.

    Typical calls are `write_report([prediction, measurement], "report.html")`, of several pairs
    `write_report({"early": [prediction, measurement], "late": other}, "forks.html")`, and of an experiment
    `write_report(read_traces("runs/digits"), "run.html")`.

    Args:
        results: A prediction, a measurement, a selection, its verification, the tables of traces or a spectral density;
            several of the same two networks; or, of several pairs, a mapping from the name of each to either.
        path: Where to write.
        title: The heading.
        budget: Without a selection among the results, the largest rise of the loss where layers are averaged; by
            default what counts as none, 2 % of one more than the mean loss of the two networks.
        relative_budget: The same, as a part of the mean loss of the two networks.
        provenance: What the results were computed from, as what JSON can hold.
        raw: Let the page hold the values of every batch, too, from which the picker gives each set its sampling error.

    Raises:
        OptionError: There is nothing to show, something that is no result, or an option does not fit.
        OSError: The file cannot be written.
    """
    options = {"title": title, "budget": budget, "relative_budget": relative_budget, "provenance": provenance}
    write_page(gather(results, raw=raw, **options), path)


def write_page(contents: Contents, path: str | PathLike[str]) -> None:
    """Write what a report shows as an HTML file.

    Raises:
        OSError: The file cannot be written.
    """
    text = page(contents)
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(contents: Contents) -> str:
    """The text of the page."""
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), *((_TEMPLATE / name).read_text(encoding="utf-8") for name in _SCRIPTS)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _code, "tidy": _tidy}
    traces = contents.traces
    return environment.get_template("page.html").render(
        title=contents.title,
        answers=[answer_of(pair) for pair in contents.pairs],
        tables=[pair_tables(pair) for pair in contents.pairs],
        picks=[pair.prediction is not None for pair in contents.pairs],
        densities=list(contents.densities),
        experiment=traces is not None,
        provenance=_provenance(contents),
        style=Markup((_TEMPLATE / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(f"'sha256-{_hash(script)}'" for script in scripts),
        data=Markup(_embedded(page_data(contents))),
    )


def page_data(contents: Contents) -> dict[str, Any]:
    """What the scripts of the page work with."""
    traces = contents.traces
    return {
        "pairs": [
            {"charts": pair_charts(pair), "picker": picker_record(pair, raw=contents.raw)} for pair in contents.pairs
        ],
        "spectra": [spectrum_chart(name, density) for name, density in contents.densities.items()],
        "experiment": None if traces is None else experiment_record(traces) | {"charts": experiment_charts(traces)},
    }


def _provenance(contents: Contents) -> dict[str, Any]:
    """What was computed, from what, and by which versions."""
    found: dict[str, Any] = {}
    for pair in contents.pairs:
        about: dict[str, Any] = {}
        if pair.prediction is not None:
            about |= {
                "predicted from": f"{_data(pair.prediction)} in {_batches(pair.prediction)} batches",
                "anchors": [anchor.alpha for anchor in pair.prediction.anchors],
                "batch normalisation": pair.prediction.batch_norm,
            }
        for name, each in pair.measurements.items():
            about[name] = f"{_data(each)}, {len(each.alphas)} positions, {len(each.sets)} sets of layers"
        found[pair.title or "results"] = about
    versions = {"lmc_curvature": lmc_curvature.__version__, "python": platform.python_version()}
    return {**found, **contents.provenance, "report written by": versions | {"numpy": np.__version__}}


def _data(result: BarrierPrediction | BarrierMeasurement) -> str:
    return f"{result.examples:,} {unit_of(result.loss)}s"


def _batches(prediction: Any) -> int:
    return len(prediction.endpoints[0].batch_sizes)


def _embedded(data: dict[str, Any]) -> str:
    """JSON that ends no script, whatever names it holds."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _tidy(text: str) -> str:
    """Text in which no line ends between a number and what belongs to it."""
    for sign in ("%", "±", "="):
        text = text.replace(f" {sign}", f"\u00a0{sign}")
    return text.replace("± ", "±\u00a0").replace("= ", "=\u00a0")


def _code(text: str) -> Markup:
    """Text whose parts in backticks are code."""
    parts = [escape(part) for part in _tidy(text).split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(part) if k % 2 else part for k, part in enumerate(parts))
