"""Claim: torch and the library make of every row what docs/torch.md says; a row that a later torch mends is noticed."""

import math
import re

import pytest
import torch
from torch import nn

from lmc_curvature import HessianOperator, Objective
from tests.docs.second_derivatives import PAGE, TABLES, by_differences, by_library, by_torch, page_tables, table

TEXT = PAGE.read_text(encoding="utf-8")
ROWS = [(name, row) for name, rows in TABLES.items() for row in rows]
IDS = [f"{name}: {row.loss} by {row.by}" for name, row in ROWS]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def _version(text):
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


(OF_PAGE,) = set(re.findall(r"torch (\d+\.\d+\.\d+)", TEXT))


@pytest.mark.check(after=4)
@pytest.mark.parametrize(
    ("name", "row"), [pair for pair in ROWS if pair[0] != "third"], ids=[i for i in IDS if "third:" not in i]
)
def test_the_library_is_right_or_refuses(name, row):
    outcomes = {"wrong": {"right"}, "refused": {"refused"}, "missing": {"right", "refused"}}[name]
    if _version(torch.__version__) < _version(OF_PAGE):
        # What an earlier torch cannot differentiate twice at all is refused.
        outcomes = outcomes | {"refused"}
    assert by_library(row) in outcomes


@pytest.mark.parametrize(("name", "row"), ROWS, ids=IDS)
def test_torch_is_wrong_or_refuses(name, row):
    if _version(torch.__version__) < _version(OF_PAGE):
        pytest.skip(f"the page is of torch {OF_PAGE}")
    found, right = by_torch(row), by_differences(row)
    if name == "missing":
        assert found == "an error"
    elif found != "an error":
        assert math.isnan(float(found)) or abs(float(found) - right) > 0.01 * abs(right), "mended: take the row away"


@pytest.mark.check
def test_the_page_shows_the_tables_as_they_are_computed():
    assert set(page_tables(TEXT)) == set(TABLES)
    if _version(torch.__version__) != _version(OF_PAGE):
        pytest.skip(f"the page is of torch {OF_PAGE}")
    for name, shown in page_tables(TEXT).items():
        assert shown == table(name)


@pytest.mark.check
def test_a_compiled_network_is_refused_by_torch_and_not_here():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = (torch.randn(6, 3).double(), torch.arange(6) % 2)
    compiled = torch.compile(network, backend="aot_eager")
    slopes = torch.autograd.grad(
        nn.functional.cross_entropy(compiled(batch[0]), batch[1]), [*network.parameters()], create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(sum(slope.sum() for slope in slopes), [*network.parameters()])
    found, plain = (HessianOperator(Objective(each, [batch])).to_dense() for each in (compiled, network))
    torch.testing.assert_close(found, plain)
