"""The command `report`: results become one HTML file.

As in `app`, the library is imported inside the command.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lmc_curvature.cli.failures import one_message
from lmc_curvature.cli.help import PlainCommand
from lmc_curvature.cli.options import Comparison
from lmc_curvature.cli.printing import show
from lmc_curvature.errors import FileFormatError, OptionError


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(cls=PlainCommand)(one_message()(report))


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="A directory of demo, or of fork and trace; or files that --save wrote for the same two networks: a "
            "prediction, by predict or select, and measurements; and beside them what --json printed, which of select "
            "is what it measured.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", dir_okay=False, help="The HTML file to write.")],
    budget: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="The most that the loss may rise where layers are averaged.")
    ] = None,
    relative_budget: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="Instead: as a part of the mean loss of the two networks, such as 0.1."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Keep the values of every batch, too: every set gets its sampling error.")
    ] = False,
) -> None:
    """Write results as one page that opens without a network: the answer, curves, and a picker of layers."""
    _check(results, out, budget, relative_budget)
    from lmc_curvature.report import read_contents, write_page

    records = {path.name: _record(path) for path in results if path.suffix == ".json"}
    saved = [path for path in results if path.suffix != ".json"]
    _check_predictions(saved)
    contents = read_contents(
        saved,
        budget=budget,
        relative_budget=relative_budget,
        merge=next((words for record in records.values() if (words := _merge_words(record))), None),
        records=records,
        raw=raw,
    )
    write_page(contents, out)
    show(f"written: {out}")


def _check(results: list[Path], out: Path, budget: float | None, relative_budget: float | None) -> None:
    """Refuse what can be seen to be wrong before anything is read."""
    from lmc_curvature.merging.budgets import check_not_negative
    from lmc_curvature.storage import check_writable

    if budget is not None and relative_budget is not None:
        raise OptionError("Give one of --budget, in units of the loss, and --relative-budget, a part of the mean loss.")
    for option, value in (("--budget", budget), ("--relative-budget", relative_budget)):
        if value is not None:
            check_not_negative(option, value)
    if out.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"--out {out}: the report is a page; expected a name in .html.")
    for path in results:
        if not path.exists():
            raise OptionError(f"{path} does not exist; expected a directory of an experiment, or files of results.")
        if out.exists() and out.samefile(path):
            raise OptionError(f"--out {out} would replace what the report is made of; expected another name.")
    check_writable(out.parent, what=f"--out {out}")


def _check_predictions(saved: list[Path]) -> None:
    """Refuse several predictions: a page is of two networks."""
    from lmc_curvature.storage import read_safetensors

    kinds = {path: read_safetensors(path, "np")[0].get("kind") for path in saved if path.is_file()}
    predictions = [str(path) for path, kind in kinds.items() if kind == "barrier-prediction"]
    if len(predictions) > 1:
        raise OptionError(
            f"{' and '.join(predictions)} are predictions, and a page shows one: leave out all but one. What select "
            "saves is the prediction that it chose by; what it measured is in what it prints with --json: pass that, "
            "as a file in .json, beside the prediction. Other networks are another page."
        )


def _record(path: Path) -> dict[str, Any]:
    """What a command printed with --json."""
    from lmc_curvature.storage import parse_json

    try:
        record = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path} is not JSON ({error}); expected what --json printed.") from error
    if not isinstance(record, dict) or not isinstance(record.get("provenance"), dict):
        raise FileFormatError(f"{path} has no provenance; expected what predict, measure or select print with --json.")
    return record


def _merge_words(record: dict[str, Any]) -> list[str] | None:
    """The command that merges the two networks of a record; None of more, and where something is frozen or unknown."""
    from lmc_curvature.cli.conclusion import merge_words

    provenance = record["provenance"]
    try:
        model, options = provenance["model"], provenance["options"]
        if options.get("frozen") or len(provenance["networks"]) > 2:
            return None
        comparison = Comparison(
            a=Path(provenance["networks"]["a"]["path"]),
            b=Path(provenance["networks"]["b"]["path"]),
            model=model["name"],
            model_option=[f"{name}={_text(value)}" for name, value in model["options"].items()] or None,
            data=provenance["data"]["name"],
            key=model["key"],
            strip_prefix=model["strip_prefix"],
            layers=options["layers"],
        )
    except (LookupError, TypeError, AttributeError, ValueError):
        return None
    return merge_words(comparison)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
