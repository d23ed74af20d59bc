import pytest

from tests.support.benchmarking import INSTALLED, check_roads, rows, run

ROADS = ["top_eigenpairs", "SciPy's eigsh on HessianOperator.to_scipy()"]


@pytest.mark.check
def test_eigenvalues_and_densities(tmp_path):
    record = run("spectrum", tmp_path)
    eigenvalues, densities = rows(record, "eigenvalues"), rows(record, "densities")
    check_roads(eigenvalues, ROADS)
    exact = [row for row in eigenvalues if not row["road"].startswith("PyHessian")]
    assert all(row["residual"] < 1e-3 for row in exact)
    assert all(row["error"] < 1e-4 for row in exact)
    assert eigenvalues[0]["products"] > 0
    check_roads([row for row in densities if "ms" in row], ["spectral_density"])
    assert densities[0]["accuracy"] < 0.05
    if "PyHessian" in INSTALLED:
        assert densities[-1]["note"].startswith("fails: This function was deprecated")


@pytest.mark.check
def test_a_network_by_name(tmp_path):
    record = run("spectrum", tmp_path, "--network", "resnet8", "--batch", "2")
    assert list(record["tables"]) == ["eigenvalues"]
    found = rows(record, "eigenvalues")
    check_roads(found, ROADS)
    assert found[0]["residual"] < 1e-3
    assert (record["benchmark"], record["setting"]["network"]) == ("spectrum-resnet8", "resnet8")
