from pathlib import Path

import pytest
import torch

import lmc_curvature
from benchmarks import against
from benchmarks.support import sweep_once
from tests.support.benchmarking import rows, run

CHECKOUT = Path(lmc_curvature.__file__).parents[1]


@pytest.mark.check
def test_a_checkout_beside_itself(tmp_path):
    record = run("against", tmp_path, "--other", str(CHECKOUT))
    found = rows(record, "sweep")
    assert [row["road"] for row in found] == ["this checkout", "the other checkout"] * 2
    assert [row["network"] for row in found] == ["resnet8", "resnet8", "gpt2", "gpt2"]
    ours = found[::2]
    assert all(row["error"] == 0 for row in ours)
    # Operators are counted, not timed.
    assert all(row["calls_over_other"] == 1 for row in ours)
    assert all(row["calls"] > 100 for row in found)


@pytest.mark.check
def test_another_library_is_refused(tmp_path):
    (tmp_path / "lmc_curvature.py").write_text("raise ImportError('another library')")
    sweeps = against.sweeps_of(tmp_path, "resnet8", against.SIZES["smoke"]["resnet8"], torch.device("cpu"))
    with pytest.raises(RuntimeError, match="another library"), sweeps:
        pass


def test_ratios_are_of_pairs_and_their_mean_is_geometric():
    seconds = {"fast": ([1.0, 4.0], [4.0, 16.0]), "slow": ([9.0, 3.0], [1.0, 3.0])}
    found = {
        name: against.Comparison(
            {against.OURS: ours, against.OTHER: others}, {against.OURS: 30, against.OTHER: 120}, error=2e-6
        )
        for name, (ours, others) in seconds.items()
    }
    bars = {bar.what: bar for bar in against.bars(found)}
    # √(¼ · 9) and √(¼ · 1), 1.5 and 0.5.
    together = bars["geometric mean of all networks' ratios of seconds"].spread
    assert (together.low, together.high) == pytest.approx((0.75, 1.25))
    assert bars["fast: ours / the other's, seconds"].spread.median == pytest.approx(0.25)
    calls = bars["slow: ours / the other's, operator calls of a tile"]
    assert (calls.measured, calls.verdict) == (0.25, "no")


def test_operators_within_operators_are_counted():
    x = torch.ones(3, 3)
    assert sweep_once.operator_calls(lambda: x + x) == 1
    assert sweep_once.operator_calls(lambda: (x + x) + x) == 2
    # A linear map calls the product, and what turns the matrix.
    assert sweep_once.operator_calls(lambda: torch.nn.functional.linear(x, x)) > 2
