"""Claim: the package offers what it says, imports no more than it needs, and works from its wheel alone."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

import lmc_curvature
from lmc_curvature.sources import digits_resnet

ROOT = Path(__file__).parents[1]


def _modules_after(program):
    """Names of the modules that a program has imported when it ends."""
    program += "; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_every_public_name_is_found_and_listed():
    assert set(lmc_curvature.__all__) <= set(dir(lmc_curvature))
    for name in lmc_curvature.__all__:
        assert getattr(lmc_curvature, name).__name__ == name
    with pytest.raises(AttributeError):
        lmc_curvature.no_such_name  # noqa: B018


def test_names_are_imported_when_they_are_used():
    assert "torch" not in _modules_after("import lmc_curvature, lmc_curvature.errors")


@pytest.mark.check
def test_a_prediction_imports_neither_figures_nor_tables_nor_data_sets():
    found = _modules_after("import lmc_curvature; lmc_curvature.predict_barrier, lmc_curvature.HessianOperator")
    assert "lmc_curvature.barrier.prediction" in found
    heavy = {"matplotlib", "pandas", "sklearn", "torchvision", "scipy.stats", "sympy", "typer", "lmc_curvature.figures"}
    assert not heavy & found


_THREADS = """
import threading, lmc_curvature
start = threading.Barrier(len(lmc_curvature.__all__))
def use(name): start.wait(); getattr(lmc_curvature, name); print(name + "\\n", end="")
threads = [threading.Thread(target=use, args=(name,)) for name in lmc_curvature.__all__]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.mark.check
def test_threads_may_use_names_at_once():
    done = subprocess.run([sys.executable, "-c", _THREADS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == sorted(lmc_curvature.__all__), done.stderr


def test_the_citation_is_of_this_version():
    assert f"version: {lmc_curvature.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_every_requirement_has_a_lowest_version():
    script = ROOT / "scripts" / "oldest_versions.py"
    lines = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "torch==2.11" in lines
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)


@pytest.mark.check
def test_the_wheel_predicts_where_nothing_else_of_the_project_is(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = tmp_path.glob("lmc_curvature-*.whl")
    venv.create(tmp_path / "empty")
    folder = tmp_path / "empty" / "bin"
    subprocess.run(
        [*pip, "--python", str(folder / "python"), "install", "--quiet", "--no-deps", str(wheel)], check=True
    )
    # The dependencies are those of this environment. Paths that a .pth file names have no .pth files of their own, so
    # an editable installation of the project is not seen.
    (site,) = (tmp_path / "empty").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    assert (site / "lmc_curvature" / "py.typed").exists()
    assert (site / "lmc_curvature" / "__init__.pyi").exists()
    assert (site / "lmc_curvature" / "report" / "template" / "page.html").exists()

    def run(*command):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name in ("a.pt", "b.pt"):
        torch.save(digits_resnet(width=2).state_dict(), tmp_path / name)
    assert str(site) in run(folder / "python", "-c", "import lmc_curvature; print(lmc_curvature.__file__)")
    assert run(folder / "lmc-curvature", "--version") == f"lmc-curvature {lmc_curvature.__version__}\n"
    network = ["--model", "digits-resnet", "--model-option", "width=2", "--data", "digits", "--limit", "60"]
    predict = [folder / "lmc-curvature", "predict", "a.pt", "b.pt", *network, "--json"]
    record = json.loads(run(*predict, "--save", "predicted.safetensors"))
    assert (record["examples"], len(record["layers"])) == (60, 10)
    run(folder / "lmc-curvature", "report", "predicted.safetensors", "--out", "report.html")
    assert "const formula" in (tmp_path / "report.html").read_text(encoding="utf-8")
