"""Write this folder's README.md from results, the scripts' docstrings and short prose.

Prose is in Jinja templates, in which every number is an expression over the JSON files: `prose/README.md` begins the
page, `prose/NAME.md` says what the results of a script mean.

    python -m benchmarks.readme
"""

import ast
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.support.report import Record, markdown
from benchmarks.support.tables import markdown_table, number_text

FOLDER = Path(__file__).parent
SCRIPTS = (
    "projection",
    "checks",
    "hvp",
    "blocks",
    "hvp_vs_exact",
    "language",
    "spectrum",
    "scaling",
    "training",
    "imports",
    "against",
    "on_gpu",
)


def main() -> None:
    """Write the file."""
    (FOLDER / "README.md").write_text(readme())


def readme(results: Path = FOLDER / "results") -> str:
    """The text of README.md, from the JSON files in the folders of `results`."""
    paths = sorted(results.glob("*/*.json"), key=lambda path: (SCRIPTS.index(script_of(path)), path.stem, path))
    records = {path: json.loads(path.read_text()) for path in paths}
    templates = _templates(list(records.values()))
    # What the sections of a run on a GPU promise is in its overview, too, where that is stored.
    repeated = "on_gpu-" if any(record["benchmark"] == "on_gpu" for record in records.values()) else None
    overall = [record for record in records.values() if not (repeated and record["benchmark"].startswith(repeated))]
    promises = [{"benchmark": record["benchmark"], **bar} for record in overall for bar in record["bars"]]
    text = templates.get_template("README.md").render(promises="\n".join(markdown_table(promises)))
    sections = [
        _section(templates, script, {path: record for path, record in records.items() if script_of(path) == script})
        for script in SCRIPTS
    ]
    return "\n\n".join([text.strip(), *sections]) + "\n"


def script_of(path: Path) -> str:
    """The script that has written a file of results, which is named after it and perhaps a network."""
    return path.stem.partition("-")[0]


def _templates(records: list[Record]) -> Environment:
    """Prose, with functions that look values up in the records: `row`, `bar` and `measured`."""
    by_name = {record["benchmark"]: record for record in records}

    def row(name: str, table: str, **where: Any) -> Mapping[str, Any]:
        rows = by_name[name]["tables"][table]["rows"]
        (found,) = [row for row in rows if all(row.get(key) == value for key, value in where.items())]
        return found

    def bars(name: str, *, having: str = "", lacking: str | None = None) -> list[Mapping[str, Any]]:
        return [
            bar
            for bar in by_name[name]["bars"]
            if having in bar["what"] and (lacking is None or lacking not in bar["what"])
        ]

    environment = Environment(
        loader=FileSystemLoader(FOLDER / "prose"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number_text, "percent": "{:.0%}".format}
    environment.globals |= {"row": row, "bars": bars, "records": by_name}
    return environment


def _section(templates: Environment, script: str, records: Mapping[Path, Record]) -> str:
    """The docstring of a script, its findings, and the figures and tables of its results."""
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{script}.py").read_text())) or ""
    parts = [f"## `{script}.py`", docstring]
    if f"{script}.md" in templates.list_templates():
        paragraphs = templates.get_template(f"{script}.md").render().strip().split("\n\n")
        parts += [textwrap.fill(paragraph, 120, break_on_hyphens=False) for paragraph in paragraphs]
    for path, record in records.items():
        network = path.stem.removeprefix(script).removeprefix("-")
        title = ", ".join(filter(None, ["Results", network, record["environment"]["device"]]))
        figure = path.with_suffix(".png")
        parts.append(f"<details>\n<summary>{title}</summary>")
        if figure.exists():
            parts.append(f"![{title}](results/{figure.parent.name}/{figure.name})")
        parts += ["\n".join(markdown(record)).strip(), "</details>"]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
