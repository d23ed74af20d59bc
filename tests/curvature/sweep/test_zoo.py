"""Claim: every network of the zoo takes the road that docs/zoo.md says, and agrees with products and with its loss."""

import pytest

from tests.support.zoo import ZOO
from tests.support.zoo.rows import PAGE, read_rows, shown, table, trial_of, versions

ROWS = read_rows()

# All of them together take minutes.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(versions() not in PAGE.read_text(encoding="utf-8"), reason="the page is of other versions"),
]


def test_the_page_shows_all_rows():
    assert list(ROWS) == list(ZOO)
    assert shown() == table(ROWS.values()).strip("\n")
    assert len(ROWS) >= 60
    # A network that takes several roads would be in no table.
    assert {row.road for row in ROWS.values()} == {"sweep", "products", "refused"}


# Annotations are checked by the tests of smaller parts; here that would take as long as the computation.
@pytest.mark.usefixtures("untyped")
@pytest.mark.check(after=4)
@pytest.mark.parametrize("name", list(ZOO))
def test_a_network_takes_the_road_of_its_row(name):
    specimen, row = ZOO[name], ROWS[name]
    found = trial_of(specimen, *specimen.trials[0])
    assert found.road == row.road
    assert found.reason in row.reason
    assert bool(found.reason) == bool(row.reason)
    assert found.operations == row.operations
    assert not found.products > 1e-9
    assert not found.differences > 1e-4
