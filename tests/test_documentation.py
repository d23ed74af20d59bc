"""Claim: the Python of the README and of every docstring's example runs as it stands; of the site: `tests/docs`."""

import doctest
import importlib

import pytest
import scipy.sparse.linalg
import torch

import lmc_curvature
from lmc_curvature import Objective, Segment
from tests.docs.pages import README, ROOT, blocks
from tests.support.cases import CASES


@pytest.mark.check
def test_readme_runs_when_pasted_block_by_block(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks(README):
        if block.language == "python":
            block.run(namespace)
    out = capsys.readouterr().out
    # Numbers of trained networks are the machine's own; what stands around them is not.
    (shown,) = (block.text for block in blocks(README) if block.language == "text")
    for line in ("Barrier predicted from 1437 examples, 10 layers", "anchored ", "Verdict: No: ", "measured rise "):
        assert line in out
        assert line in shown
    assert (tmp_path / "report.html").stat().st_size < 7e6


def _docstring_examples():
    """Every docstring of the package that has an example."""
    found = []
    for path in sorted(ROOT.glob("lmc_curvature/**/*.py")):
        if ">>>" in path.read_text():
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            found += [test for test in doctest.DocTestFinder().find(module) if test.examples]
    return found


class Checker(doctest.OutputChecker):
    """Output is compared where the docstring shows it."""

    def check_output(self, want, got, optionflags):
        return want == "" or super().check_output(want, got, optionflags)


@pytest.mark.check
@pytest.mark.parametrize("example", _docstring_examples(), ids=lambda example: example.name)
def test_docstring_examples_run(example):
    case = CASES["conv, interpolate"]
    model = case.model()
    example.globs |= {
        "torch": torch,
        "scipy": scipy,
        "objective": (objective := Objective(model, case.batches(), **case.options)),
        "segment": Segment(model, case.model(seed=1)),
        "H": lmc_curvature.HessianOperator(objective),
        "HessianOperator": lmc_curvature.HessianOperator,
    }
    assert not any(each.options.get(doctest.SKIP) for each in example.examples), "an example is skipped"
    report = []
    doctest.DocTestRunner(checker=Checker()).run(example, out=report.append)
    assert not report, "".join(report)
