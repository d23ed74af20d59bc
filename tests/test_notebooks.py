"""Claim: every notebook runs as it stands, uses public names alone, and is kept with what it prints and draws."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

from lmc_curvature import __all__ as public

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
PRINTED = {
    "forks_and_figures": "second-order",
    "spectra_and_blocks": "relative difference",
    "two_checkpoints": "measured sets",
}


def _script():
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _code(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def _texts(outputs):
    """What a cell has printed or shown as text."""
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "".join("".join(text) for text in shown)


def _is_told(output):
    return output.get("name") == "stderr"


def test_every_notebook_is_run():
    assert [path.stem for path in NOTEBOOKS] == sorted(PRINTED)


@pytest.mark.check
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    script = _script()
    # Cells check what they claim by assertions, which end the run.
    notebook = script.executed(path)
    told = "".join(output.text for cell in notebook.cells for output in cell.get("outputs", ()) if _is_told(output))
    # Of tqdm, which has no widgets here.
    assert not [line for line in told.splitlines() if "Warning" in line and "Tqdm" not in line]
    cells = [cell for cell in script.kept(notebook).cells if cell.cell_type == "code"]
    assert PRINTED[path.stem] in "".join(_texts(cell.outputs) for cell in cells)
    assert [bool(cell.outputs) for cell in cells] == [bool(cell["outputs"]) for cell in _code(path)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_as_they_ran(path):
    assert path.stat().st_size < 300_000
    text, cells = path.read_text(encoding="utf-8"), _code(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert PRINTED[path.stem] in "".join(_texts(cell["outputs"]) for cell in cells)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or _is_told(output)]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    # Nothing of the machine that it ran on.
    assert not re.search(r"/(?:home|tmp|root|work|Users)/", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_import_what_rooms_offer_and_say_what_follows(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in _code(path)).replace("%matplotlib", "# matplotlib")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lmc_curvature"):
            offered = public if node.module == "lmc_curvature" else __import__(node.module, fromlist=["x"]).__all__
            rooms = {room.parent.name for room in (ROOT / "lmc_curvature").glob("*/__init__.py")}
            assert {alias.name for alias in node.names} <= {*offered, *rooms}
            assert str(node.module).count(".") <= 1
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds[0] == kinds[-1] == "markdown"
    assert "## What to conclude" in "".join(cells[-1]["source"])
