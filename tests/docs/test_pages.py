"""Claim: every block of code on the site's pages runs as it stands, and every command on them is one."""

import re
import subprocess
import sys
import warnings

import pytest
import typer.main

from lmc_curvature.cli import main
from lmc_curvature.cli.app import app
from tests.docs.pages import DOCS, README, ROOT, blocks, pages

NAMES = [str(page.relative_to(DOCS)) for page in pages()]
WITH_CODE = [name for name in NAMES if any(block.language == "python" for block in blocks(DOCS / name))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, from which modules are imported only for as long as the test runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def _run(page):
    """Run a page's blocks of Python in order; those with a title are written to files."""
    namespace = {"__name__": "__page__"}
    for block in blocks(page):
        if block.language == "python" and not block.title:
            block.run(namespace)


@pytest.mark.check
@pytest.mark.parametrize("name", [name for name in WITH_CODE if name != "two-checkpoints.md"])
def test_blocks_run_in_order(name, folder, capsys):
    with warnings.catch_warnings():
        # A page that makes the library warn would have to say so.
        warnings.simplefilter("error", UserWarning)
        _run(DOCS / name)
    assert capsys.readouterr().out


@pytest.mark.check
def test_two_checkpoints_become_one_as_the_page_says(folder, capsys):
    every = blocks(DOCS / "two-checkpoints.md")
    files = {block.title: block for block in every if block.title}
    for title in ("my_networks.py", "train.py"):
        (folder / title).write_text(files[title].text)
    files["train.py"].run({})
    for block in every:
        if block.language == "bash":
            for program, *words in block.commands():
                assert program == "lmc-curvature"
                with pytest.raises(SystemExit) as stop:
                    main(words)
                assert not stop.value.code, capsys.readouterr().err
        elif not block.title:
            capsys.readouterr()
            block.run({})
    assert float(capsys.readouterr().out) > 0.85
    assert {path.name for path in folder.iterdir()} >= {
        "prediction.png",
        "report.html",
        "merged.safetensors",
        "average.safetensors",
    }


COMMANDS = [
    (block, words)
    for page in (README, *pages())
    for block in blocks(page)
    if block.language == "bash"
    for words in block.commands()
]


@pytest.mark.parametrize(
    ("block", "words"), COMMANDS, ids=[f"{block.page.stem}: {' '.join(words)[:60]}" for block, words in COMMANDS]
)
def test_commands_are_understood(block, words):
    program, *arguments = words
    if program == "lmc-curvature":
        group = typer.main.get_command(app)
        name, *rest = arguments
        if name == "--version":
            return
        assert name in group.commands, name
        # Parses every option and argument, and runs nothing.
        group.commands[name].make_context(name, rest, resilient_parsing=False)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    else:
        if program == "torchrun":
            # What it starts is looked at as the command that it is.
            start = arguments.index("lmc_curvature")
            test_commands_are_understood(block, ["lmc-curvature", *arguments[start + 1 :]])
            return
        assert (program, *arguments[:2]) in {("python", "-m", "pip"), ("git", "clone", arguments[1])}


def test_every_fence_is_of_a_kind_that_is_looked_at():
    for page in pages():
        text = page.read_text(encoding="utf-8")
        found = blocks(page)
        assert len(re.findall(r"^```\w", text, re.MULTILINE)) == len(found), page
        assert {block.language for block in found} <= {"python", "bash", "text"}, page


@pytest.mark.check
def test_the_site_is_built_without_a_warning_or_a_network(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    site = tmp_path / "site"
    assert (site / "index.html").exists()
    assert (site / "search" / "search_index.js").exists()
    # What is said of pages as files would be wrong here, where the text is.
    for page in (site / "reference").glob("*.html"):
        assert "Read as a file" not in page.read_text(), page
    assert "Usage: lmc-curvature select" in (site / "reference" / "cli.html").read_text()
    notebook = (site / "notebooks" / "two_checkpoints.html").read_text()
    # Its text, what it prints, its tables and its pictures.
    for part in (
        "Two networks were trained",
        "measured sets",
        "<th>expansion error</th>",
        "data:image/png;base64,",
    ):
        assert part in notebook
    assert (site / "notebooks" / "two_checkpoints.ipynb").exists()
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert not [url for url in loaded if "fonts" in url or url.endswith((".js", ".css", ".png", ".svg"))], page


def test_code_fits_into_the_column_of_a_page():
    for page in pages():
        for block in blocks(page):
            for line in block.text.splitlines():
                assert len(line) <= 88, f"{page}: {line}"
