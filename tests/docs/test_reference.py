"""Claim: the reference shows every public name once, and every picture of the pages is drawn by the script."""

import importlib
import re

import pytest
import yaml

import lmc_curvature
from lmc_curvature import errors
from tests.docs.pages import DOCS, ROOT, pages

SHOWN = [name for page in pages() for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
ROOMS = (
    *("barrier", "merging", "objective", "segment", "checkpoints", "sources", "forking", "tracing", "figures"),
    *("report", "integrations"),
    *(f"curvature.{name}" for name in ("projection", "operators", "blocks", "backends", "spectra")),
)


def test_every_name_is_shown_once():
    assert len(SHOWN) == len(set(SHOWN))
    for shown in SHOWN:
        module, _, name = shown.rpartition(".")
        assert hasattr(importlib.import_module(module), name), shown


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_room_offers_is_shown(room):
    module = f"lmc_curvature.{room}"
    assert {f"{module}.{name}" for name in importlib.import_module(module).__all__} <= set(SHOWN)


def test_the_public_names_are_shown():
    shown = {name.rpartition(".")[2] for name in SHOWN}
    assert {name for name in lmc_curvature.__all__ if not name.startswith("__")} <= shown
    assert {
        name for name, each in vars(errors).items() if isinstance(each, type) and each.__module__ == errors.__name__
    } <= shown


def test_pages_that_are_written_by_the_site_say_so_to_those_who_read_files():
    for page in (DOCS / "reference").glob("*.md"):
        text = page.read_text()
        is_written = re.search(r"^(::: |<!-- help: )", text, re.MULTILINE)
        said = re.findall(r"^> Read as a file, .*`make docs` writes the text.*$", text, re.MULTILINE)
        assert len(said) == bool(is_written), page


def test_every_picture_is_drawn_by_the_script():
    script = (ROOT / "scripts" / "site_pictures.py").read_text()
    files = {path.name for path in (DOCS / "pictures").iterdir()}
    assert set(re.findall(r'^    "([\w-]+\.(?:svg|png))": draw_', script, re.MULTILINE)) == files
    used = {name for page in pages() for name in re.findall(r"pictures/([\w.-]+)", page.read_text())}
    assert used == files
    assert all((DOCS / "pictures" / name).stat().st_size < 200_000 for name in files)


def test_every_page_is_in_the_navigation():
    def files(entry):
        if isinstance(entry, str):
            return {entry}
        return set().union(*map(files, entry.values() if isinstance(entry, dict) else entry))

    shown = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    # The pages of benchmarks and notebooks are made of files elsewhere.
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")}
    assert shown == {str(page.relative_to(DOCS)) for page in pages()} | {"benchmarks.md"} | notebooks
