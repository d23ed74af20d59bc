from pathlib import Path

import pytest
import torch

import lmc_curvature
from benchmarks import against
from tests.support.benchmarking import rows, run

CHECKOUT = Path(lmc_curvature.__file__).parents[1]


@pytest.mark.check
def test_a_checkout_beside_itself(tmp_path):
    record = run("against", tmp_path, "--other", str(CHECKOUT))
    assert [row["road"] for row in rows(record, "sweep")] == ["this checkout", "the other checkout"]
    assert record["bars"][1]["measured"] == 0


@pytest.mark.slow
def test_another_library_is_refused(tmp_path):
    (tmp_path / "lmc_curvature.py").write_text("raise ImportError('another library')")
    with pytest.raises(RuntimeError, match="another library"):
        against.sweep_in(tmp_path, against.SIZES["smoke"], torch.device("cpu"))
