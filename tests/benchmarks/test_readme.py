import json
import re

import pytest

from benchmarks import readme

PROSE = sorted((readme.FOLDER / "prose").glob("*.md"))


def test_the_page_is_what_the_results_and_the_prose_say():
    assert (readme.FOLDER / "README.md").read_text() == readme.readme(), "run: python -m benchmarks.readme"


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.stem)
def test_prose_has_no_numbers_of_its_own(path):
    words = re.sub(r"\{%.*?%\}|\{\{.*?\}\}|`[^`]*`|^    .*$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"\d", re.sub(r"float32|float64|TF32", "", words))


def test_every_script_has_a_section():
    scripts = {path.stem for path in readme.FOLDER.glob("*.py")} - {"__init__", "readme"}
    assert scripts == set(readme.SCRIPTS)
    assert {path.stem for path in PROSE} <= {"README", *scripts}


@pytest.mark.parametrize("path", sorted((readme.FOLDER / "results").glob("*/*.json")), ids=lambda path: path.stem)
def test_results_name_their_commit(path):
    record = json.loads(path.read_text())
    assert record["benchmark"] == path.stem
    assert re.fullmatch("[0-9a-f]{7,}", record["environment"]["commit"])
    assert record["setting"]["size"] == "full"
