import argparse
import json

import pytest
import torch

from benchmarks.support import report
from benchmarks.support.timing import Spread


@pytest.mark.parametrize(
    ("kind", "measured", "verdict"),
    [
        ("at most", (0.9, 0.8, 1.2), "yes"),
        ("at most", (1.1, 0.9, 1.2), "within the spread"),
        ("at most", (1.3, 1.1, 1.5), "no"),
        ("at least", (1.1, 0.9, 1.2), "yes"),
        ("at least", (0.9, 0.8, 1.2), "within the spread"),
        ("at least", (0.9, 0.8, 0.95), "no"),
    ],
)
def test_bars(kind, measured, verdict):
    assert report.Bar("ratio", Spread(*measured), kind, 1.0).verdict == verdict


def test_a_bar_on_a_number():
    assert report.Bar("error", 2.0, "at most", 1.0).row() == {
        "what": "error",
        "measured": Spread(2.0, 2.0, 2.0),
        "bar": "≤ 1",
        "bound": 1.0,
        "kind": "at most",
        "met": "no",
    }


def test_report_is_written_as_json_and_markdown(tmp_path):
    options = argparse.Namespace(
        out=tmp_path, script="name", network=None, size="quick", command="python -m x", device=torch.device("cpu")
    )
    found = report.new_report(options, "why?", ["a note"], batch=3)
    rows = [{"road": "a | b", "ms": Spread(1234.5, 1200.0, float("nan")), "hidden": 1, "note": ""}]
    found.add("roads", "Roads", rows)
    report.publish(found, options)
    record = json.loads((tmp_path / "name.json").read_text())
    row = {"road": "a | b", "ms": 1234.5, "ms_quartiles": [1200.0, None], "hidden": 1, "note": ""}
    assert record["tables"] == {"roads": {"title": "Roads", "rows": [row]}}
    lines = (tmp_path / "name.md").read_text().splitlines()
    assert lines[0].startswith("`python -m x` at ")
    assert "batch 3" in lines[0]
    # The column of notes is empty, so it is left out.
    assert "| road | ms |" in lines
    assert "| a \\| b | 1234 [1200, ] |" in lines
    assert lines[-1] == "- a note"


def test_a_network_by_name_is_in_the_name():
    options = argparse.Namespace(
        script="hvp", network="resnet56", size="full", command="python -m x", device=torch.device("cpu")
    )
    assert report.new_report(options, "why?").name == "hvp-resnet56"
