"""Claim: `report` writes a page of what other commands left, and refuses what does not fit before reading it."""

import json
import re

import pytest

from tests.support.predictions import random_prediction


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "predicted.safetensors"
    random_prediction(4).save(path)
    return path


def _data(path):
    found = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(found[1])["pairs"][0]["picker"]


@pytest.mark.check
def test_a_prediction_and_its_record_make_a_page(run, saved, tmp_path):
    provenance = {
        "networks": {"a": {"path": "my a.pt"}, "b": {"path": "b.pt"}},
        "model": {
            "name": "resnet20",
            "options": {"width": 4, "shortcut": "identity"},
            "key": "ema",
            "strip_prefix": None,
        },
        "data": {"name": "digits"},
        "options": {"layers": "module"},
    }
    (tmp_path / "p.json").write_text(json.dumps({"provenance": provenance}))
    out = tmp_path / "report.html"
    status, said, _ = run("report", saved, tmp_path / "p.json", "--out", out, "--budget", "0.5", "--raw")
    assert (status, "".join(said.split())) == (0, f"written:{out}")
    picker = _data(out)
    words = ["lmc-curvature", "merge", "my a.pt", "b.pt", "--model", "resnet20", "--model-option", "width=4"]
    words += ["--model-option", "shortcut=identity", "--key", "ema", "--partition", "module"]
    assert picker["words"] == words
    # What is frozen the command merge cannot be told.
    provenance["options"]["frozen"] = ["norm"]
    (tmp_path / "p.json").write_text(json.dumps({"provenance": provenance}))
    run("report", saved, tmp_path / "p.json", "--out", tmp_path / "frozen.html")
    assert _data(tmp_path / "frozen.html")["words"] is None
    assert picker["cube"]["batches"] is not None
    assert "ema" in out.read_text(encoding="utf-8").split('id="provenance"')[1]


def test_without_a_record_the_files_are_not_known(run, saved, tmp_path):
    assert run("report", saved, "--out", tmp_path / "report.html")[0] == 0
    picker = _data(tmp_path / "report.html")
    assert (picker["words"], picker["cube"]["batches"]) == (None, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "report.pdf"], "expected a name in .html"),
        (["--out", "r.html", "--budget", "1", "--relative-budget", "1"], "Give one of --budget"),
        (["--out", "r.html", "--budget", "-1"], "--budget=-1.0: expected a number that is not negative"),
    ],
)
def test_options_that_do_not_fit(run, saved, options, said):
    status, _, errors = run("report", saved, *options)
    assert status == 2
    assert said in errors


def test_several_predictions_are_named_with_what_to_do(run, saved, tmp_path):
    others = [tmp_path / name for name in ("selected.safetensors", "third.st")]
    for seed, path in enumerate(others):
        random_prediction(4, seed=seed + 1).save(path)
    for given in ([saved, others[0]], [saved, *others]):
        status, _, errors = run("report", *given, "--out", tmp_path / "r.html")
        assert (status, (tmp_path / "r.html").exists()) == (2, False)
        assert f"{' and '.join(map(str, given))} are predictions, and a page shows one: leave out all but one" in errors
        assert "What select saves is the prediction that it chose by" in errors
        assert "mapping" not in errors


def test_what_is_no_result(run, saved, tmp_path):
    page = tmp_path / "r.html"
    for name, contents, said in (
        ("no.json", "{", "is not JSON"),
        ("no.json", "[]", "has no provenance"),
        ("no.safetensors", "text", "is damaged or is not a safetensors file"),
    ):
        (tmp_path / name).write_text(contents)
        status, _, errors = run("report", saved, tmp_path / name, "--out", page)
        assert (status, said in errors) == (2, True)
    status, _, errors = run("report", tmp_path / "missing", "--out", page)
    assert (status, "does not exist; expected a directory" in errors) == (2, True)
    page.write_text("before")
    status, _, errors = run("report", page, "--out", page)
    assert (status, "would replace what the report is made of" in errors) == (2, True)
    assert page.read_text() == "before"
