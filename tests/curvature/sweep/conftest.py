"""The fixtures of `RuleTests`: a network around an operation, and its projection by products."""

import copy

import jaxtyping
import pytest

from lmc_curvature import project_hessian
from tests.support.sweeping import around, layer_directions


@pytest.fixture(scope="class")
def objective(operation):
    """The objective of a network around an operation, with one batch of three examples."""
    function, *shapes = operation
    with pytest.MonkeyPatch.context() as patch:
        # Hundreds of captures would take twice as long; other tests have the annotations checked.
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        # Some are put at their kinks by what is detached.
        yield around(copy.deepcopy(function), *shapes, witness=False)


@pytest.fixture(scope="class")
def directions(objective):
    """A direction in every layer of the network, and one over all."""
    return layer_directions(objective)


@pytest.fixture(scope="class")
def expected(objective, directions):
    """The projection by Hessian-vector products."""
    return project_hessian(objective, {}, directions, method="hvp")
