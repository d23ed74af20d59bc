"""What the documentation site shows of files outside docs: benchmarks, notebooks, and the help of every command."""

import re
from pathlib import Path

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
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the help of a command where a comment names it: `<!-- help: predict -->`."""
    return re.sub(
        r"<!-- help: (\w*) -->",
        lambda found: f"```text\n{command_help(found[1])}\n```",
        markdown,
    )


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
