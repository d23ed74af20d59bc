"""Claim: one command goes from configurations to figures."""

import importlib.util
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lmc_curvature.errors import OptionError
from tests.support.configurations import SECONDS

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce.py"
DIVERGES = SECONDS.replace("learning_rate: 0.1", "learning_rate: 1.0e+30")


@pytest.fixture
def reproduce(tmp_path):
    """Run the script on configurations, by name; returns what it printed."""
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(**configs):
        for name, text in configs.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        app = typer.Typer()
        app.command()(module.main)
        arguments = [*(str(tmp_path / f"{name}.yaml") for name in configs), "--out", str(tmp_path), "--no-progress"]
        return CliRunner().invoke(app, arguments, catch_exceptions=False)

    run.module = module
    return run


def test_the_configurations_of_the_paper_are_the_default(reproduce):
    names = {path.stem.removeprefix("cifar10-") for path in reproduce.module.PAPER}
    assert names == {"resnet18", "resnet18-no-norm", "resnet20", "resnet20-low-rate", "resnet20-no-decay"}


@pytest.mark.check
def test_a_configuration_becomes_figures(reproduce, tmp_path):
    result = reproduce(small=SECONDS)
    assert result.exit_code == 0
    assert "Barrier between the siblings of each fork at the end" in result.output
    drawn = {path.stem for path in (tmp_path / "small" / "figures").glob("*.pdf")}
    assert {"ridges-error-train", "sibling-angles", "layers-fork-0000", "cumulative-barriers"} <= drawn


def test_two_configurations_of_one_name_are_refused(reproduce, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "small.yaml").write_text(SECONDS)
    with pytest.raises(OptionError, match="Two configurations are called 'small'.*rename one"):
        reproduce.module.main([tmp_path / "small.yaml", tmp_path / "other" / "small.yaml"], tmp_path)


@pytest.mark.check
def test_a_configuration_that_diverges_does_not_stop_the_others(reproduce, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(reproduce.module, "draw_all", lambda *paths, **options: drawn.append(paths) or ())
    result = reproduce(bad=DIVERGES, good=SECONDS)
    assert result.exit_code == 2
    assert "parent: Training diverged" in result.output
    assert "fork 0, child 1: Training diverged" in result.output
    assert drawn == [(tmp_path / "good", tmp_path / "good" / "figures")]
