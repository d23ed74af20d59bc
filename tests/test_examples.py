"""Claim: every example is short, uses public names alone, runs as it stands, and says what it found."""

import ast
import runpy
from pathlib import Path

import pytest

from lmc_curvature import __all__ as public

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
PRINTED = {
    "hessian_of_a_network": "largest eigenvalues",
    "two_checkpoints": "Barrier measured on 1437 examples",
    "which_layers": "interact most",
}


def test_every_example_is_run():
    assert [path.stem for path in EXAMPLES] == sorted(PRINTED)


@pytest.mark.check
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert PRINTED[path.stem] in capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_import_what_rooms_offer(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lmc_curvature"):
            offered = public if node.module == "lmc_curvature" else __import__(node.module, fromlist=["x"]).__all__
            assert {alias.name for alias in node.names} <= set(offered)
            assert str(node.module).count(".") <= 1
