"""Claim: whatever is done to a file, reading it ends in a result or in an error that names it."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz.py"
SPEC = importlib.util.spec_from_file_location("fuzz", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
fuzz = importlib.util.module_from_spec(SPEC)
sys.modules["fuzz"] = fuzz
SPEC.loader.exec_module(fuzz)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder for whole files, each made when it is asked for."""
    root, made = tmp_path_factory.mktemp("fuzz"), set()

    def of(name):
        if name not in made:
            fuzz.make_all(root, [name])
        made.add(name)
        return root

    return of


@pytest.mark.check(after=11)
@pytest.mark.parametrize("name", sorted(fuzz.KINDS, key=lambda name: name in ("experiments", "reports", "images")))
def test_changed_files_are_read_or_named(whole, name):
    fuzz.fuzz(name, whole(name), examples=15, seed_value=1)


@pytest.mark.check
@pytest.mark.parametrize("name", fuzz.KINDS)
def test_many_changed_files_are_read_or_named(whole, name):
    fuzz.fuzz(name, whole(name), examples=100, seed_value=2)


def test_what_a_reader_must_not_do_is_found(whole, monkeypatch):
    import dataclasses

    def forgetful(path):
        return {}

    kind = dataclasses.replace(fuzz.KINDS["snapshots"], read=forgetful, ways={})
    monkeypatch.setitem(fuzz.KINDS, "snapshots", kind)
    fuzz.fuzz("snapshots", whole("snapshots"), examples=3, seed_value=0)
    calls = []

    def wrong(path):
        calls.append(path)
        return {"number of calls": len(calls)}

    monkeypatch.setitem(fuzz.KINDS, "snapshots", dataclasses.replace(kind, read=wrong))
    with pytest.raises(BaseException, match="other contents were read"):
        fuzz.fuzz("snapshots", whole("snapshots"), examples=30, seed_value=0)
