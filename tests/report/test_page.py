"""Claim: a report is one file that loads nothing, runs its own scripts alone, and shows names as they are."""

import base64
import dataclasses
import hashlib
import json
import re

import numpy as np
import pytest

from lmc_curvature import write_report
from lmc_curvature.errors import OptionError
from lmc_curvature.report import Contents, Pair, write_page
from lmc_curvature.report.contents import gather
from lmc_curvature.report.page import page
from lmc_curvature.report.picking import cube_record
from tests.support.predictions import random_prediction

EVIL = ("</script><img src=x onerror=alert(1)>", "<b>bold</b>&amp;", "'; rm -rf $HOME `x` \u2028{{ 7 * 7 }}")


def _scripts(text):
    return re.findall(r"<script>(.*?)</script>", text, re.DOTALL)


def _data(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def text(pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(list(pair), path)
    assert path.stat().st_size < 7e6
    return path.read_text(encoding="utf-8")


def test_it_loads_nothing(text):
    without = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"https?://|@import|url\(|\bsrc=", without)
    assert "<link" not in without.replace('<link rel="icon" href="data:,">', "")


def test_plotly_is_in_it_once(text):
    assert text.count("plotly.js v") == 1
    assert len(_scripts(text)) == 5


def test_the_policy_allows_its_own_scripts_alone(text):
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)
    allowed = set(re.findall(r"'sha256-(.*?)'", policy))
    found = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in _scripts(text)}
    assert allowed == found
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.split("style-src")[0]


def test_the_anchors_arrays_keep_every_bit(text, pair):
    cube, prediction = _data(text)["pairs"][0]["picker"]["cube"], pair[0]
    for number, (alpha, projection) in enumerate(prediction.anchors):
        assert cube["positions"][number] == alpha
        assert cube["losses"][number] == projection.loss
        np.testing.assert_array_equal(cube["slopes"][number], projection.slopes)
        np.testing.assert_array_equal(cube["curvatures"][number], projection.curvature)


def test_values_of_batches_are_there_on_request(pair):
    prediction = pair[0]
    assert cube_record(prediction, raw=False)["batches"] is None
    batches = json.loads(json.dumps(cube_record(prediction, raw=True)))["batches"]
    for name in ("losses", "slopes", "curvatures"):
        field = {"losses": "batch_losses", "slopes": "batch_slopes", "curvatures": "batch_curvatures"}[name]
        for number, (_, projection) in enumerate(prediction.anchors):
            np.testing.assert_allclose(batches[name][number], getattr(projection, field), rtol=1e-6)


def test_names_end_no_script_and_make_no_element(pair, named):
    prediction, measurement = named(pair[0], EVIL), pair[1]
    sets = tuple((name,) for name in EVIL)
    measurement = dataclasses.replace(measurement, sets=sets, notes=(EVIL[0],))
    text = page(gather({EVIL[0]: [prediction, measurement]}, title=EVIL[0], provenance={EVIL[0]: [EVIL[1]]}))
    assert "<img" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert len(_scripts(text)) == 5
    assert _data(text)["pairs"][0]["picker"]["layers"] == list(EVIL)
    assert "&lt;b&gt;bold&lt;/b&gt;&amp;amp;" in text


def test_the_same_results_give_the_same_bytes(text, pair, tmp_path):
    write_report(list(pair), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


@pytest.mark.check
def test_a_network_of_many_layers_stays_small(tmp_path):
    # Without a selection, whose search takes long.
    write_page(Contents(title="Large", pairs=(Pair(prediction=random_prediction(150)),)), tmp_path / "large.html")
    assert (tmp_path / "large.html").stat().st_size < 7e6


def test_traces_alone_make_a_page(traces, tmp_path):
    write_report(traces, tmp_path / "traces.html")
    text = (tmp_path / "traces.html").read_text(encoding="utf-8")
    assert 'id="ridges"' in text
    assert 'id="picker"' not in text


def test_what_is_no_result_writes_no_file(tmp_path, untyped):
    with pytest.raises(OptionError, match="is no result"):
        write_report(3, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_nothing_to_show_is_still_a_page():
    assert "<h1>Empty</h1>" in page(Contents(title="Empty"))
