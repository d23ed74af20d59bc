"""What the documentation site shows of files outside docs: benchmarks, notebooks, and the help of every command."""

import json
import re
from pathlib import Path
from typing import Any

import typer.main
from click import Context
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from lmc_curvature.cli.app import app

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
NOTEBOOKS = ROOT / "examples" / "notebooks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of the benchmarks with its pictures, and the notebooks."""
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    # Markdown within HTML is asked for here; and options in brackets, outside of code, are no links.
    content = re.sub(
        r"^(python -m .*)$",
        r"`\1`",
        text.replace("<details>", "<details markdown>"),
        flags=re.MULTILINE,
    )
    files.append(File.generated(config, "benchmarks.md", content=content))
    for name in sorted(set(re.findall(r"\]\((results/[^)]+\.png)\)", text))):
        files.append(File.generated(config, name, abs_src_path=str(BENCHMARKS / name)))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the help of a command where a comment names it: `<!-- help: predict -->`.

    What a page of the reference says to those who read it as a file is left out.
    """
    return re.sub(
        r"<!-- help: (\w*) -->",
        lambda found: f"```text\n{command_help(found[1])}\n```",
        re.sub(r"^> Read as a file, .*\n+", "", markdown, flags=re.MULTILINE),
    )


def notebook_page(path: Path) -> str:
    """A notebook as a page: its text, its code, and the outputs that it is kept with."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += map(_shown, cell.get("outputs", ()))
    about = f"*This page is a notebook: [{path.name}]({path.name}) is the file to run.*"
    return "\n\n".join([*parts, about])


def _shown(output: dict[str, Any]) -> str:
    """An output as a picture, a table or text, whichever it has first."""
    data = {kind: "".join(lines) for kind, lines in output.get("data", {"text/plain": output.get("text", "")}).items()}
    if "image/png" in data:
        return f'<img alt="What the code above draws" src="data:image/png;base64,{data["image/png"].strip()}">'
    # Without pandas' own style, a table looks like the others of the site.
    if found := re.search(r"<table[^>]*>(.*</table>)", data.get("text/html", ""), re.DOTALL):
        return f"<table>{found[1]}"
    return f"```text\n{data['text/plain'].rstrip()}\n```"


def command_help(name: str) -> str:
    """What `lmc-curvature NAME --help` prints, 80 columns wide; of the whole if there is no name."""
    group = typer.main.get_command(app)
    program = Context(group, info_name="lmc-curvature", max_content_width=80, terminal_width=80)
    if not name:
        return group.get_help(program)
    command = group.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    return command.get_help(
        Context(
            command,
            info_name=name,
            parent=program,
            max_content_width=80,
            terminal_width=80,
        )
    )
