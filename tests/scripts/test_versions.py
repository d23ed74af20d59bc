"""Claim: every row of versions is made and tested once, and the table says what came of it."""

import json
import sys
from pathlib import Path

import pytest
import typer

from scripts import versions

RESULT = {
    "python": "3.12.1",
    "packages": {"torch": "2.11.0", "numpy": "2.0.0"},
    "passed": 7,
    "failed": 0,
    "skipped": 2,
    "seconds": 60,
}


def test_rows_differ_in_python_and_constraints():
    rows = versions.all_rows([Path(sys.executable)])
    assert list(rows)[:3] == ["newest", "torch-2.11", "lowest"]
    this = Path(sys.executable)
    assert rows["newest"] == (this, [])
    _, torch = rows["torch-2.11"]
    assert [line.partition("==")[0] for line in torch] == ["torch", "torchvision"]
    assert set(torch) < set(rows["lowest"][1])
    # This Python is no other one.
    assert "python-{}.{}".format(*sys.version_info) not in rows


@pytest.mark.check
def test_what_came_of_a_row_is_not_done_again(tmp_path, monkeypatch, capsys):
    done = []

    def run_tests(environment, result, processes):
        done.append(environment.name)
        failed = int(environment.name == "lowest")
        result.write_text(json.dumps(RESULT | {"failed": failed}))

    def make(environment, python, constraints):
        environment.mkdir()
        return environment.name != "newest"

    monkeypatch.setattr(versions, "run_tests", run_tests)
    monkeypatch.setattr(versions, "make", make)
    options = {"python": None, "processes": "1", "install": False, "keep": False}
    for names, status in ((["torch-2.11"], 0), (["torch-2.11", "lowest"], 1), (["newest"], 1)):
        with pytest.raises(typer.Exit) as end:
            versions.main(names, folder=tmp_path, **options)
        assert end.value.exit_code == status
    assert done == ["torch-2.11", "lowest"]
    assert not (tmp_path / "lowest").exists()
    table = capsys.readouterr().out.splitlines()
    assert "| lowest | 3.12.1 | 2.11.0 | – | 2.0.0 | – | – | – | – | 7 | 1 | 2 | 60 |" in table
    with pytest.raises(typer.BadParameter, match="oldest: expected rows of newest"):
        versions.main(["oldest"], folder=tmp_path, **options)
