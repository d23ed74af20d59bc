import math

import pytest

from tests.support.benchmarking import check_roads, rows, run


@pytest.mark.check
def test_products_and_dense_matrices(tmp_path):
    record = run("hvp_vs_exact", tmp_path)
    product, whole, layers = (rows(record, table) for table in ("product", "whole", "layers"))
    check_roads(product, ["HessianOperator @ v", "HessianOperator.block_diagonal() @ v"])
    check_roads(whole, ["HessianOperator.to_dense()", "torch.func.hessian"])
    check_roads(layers, ["layer_hessian", "torch.func.hessian"])
    assert {row["parameters"] for row in whole} == {58, 114}
    assert all(row["error"] < 1e-4 for row in (*whole, *layers))
    assert {row["in_products"] for row in product if row["road"] == "HessianOperator @ v"} == {1.0}
    assert all(math.isfinite(row["exponent"]) for row in rows(record, "exponents"))
