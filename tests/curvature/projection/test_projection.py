"""Claim: a projection is UᵀHU, checked against finite differences of the loss and closed forms."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import Objective, Projection, Segment, measure_barrier, predict_barrier, project_hessian
from lmc_curvature.averages import standard_error
from lmc_curvature.curvature.problem import Problem
from lmc_curvature.curvature.projection import project_hessian_at
from lmc_curvature.curvature.projection.project import project_problems
from lmc_curvature.errors import FallbackWarning, NonFiniteError, OptionError
from tests.support.cases import CASES


def _moved(state, *steps):
    """The state moved by each (step, direction)."""
    state = dict(state)
    for step, direction in steps:
        for name, tensor in direction.items():
            state[name] = state[name] + step * tensor
    return state


@pytest.mark.check
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_projection_equals_central_differences_of_the_loss(case):
    # Under "recalibrate" derivatives are, by definition, those of "batch".
    options = {**case.options}
    if options.get("batch_norm") == "recalibrate":
        measured = Objective(case.model(), case.batches(), **{**options, "batch_norm": "batch"})
    else:
        measured = Objective(case.model(), case.batches(), **options)
    objective = Objective(case.model(), case.batches(), **options)
    segment = Segment(case.model(0), case.model(5), layers="module", batch_norm=objective.batch_norm)
    directions = segment.directions()
    state = objective.state()
    projection = project_hessian(objective, state, directions)

    h = 1e-3
    units = list(directions.values())
    for i, u in enumerate(units):
        slope = (measured.loss(_moved(state, (h, u))) - measured.loss(_moved(state, (-h, u)))) / (2 * h)
        assert projection.slopes[i] == pytest.approx(slope, rel=1e-4, abs=1e-6)
        for j, v in enumerate(units[: i + 1]):
            corners = [
                sign * measured.loss(_moved(state, (a * h, u), (b * h, v)))
                for a, b, sign in ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))
            ]
            assert projection.curvature[i, j] == pytest.approx(sum(corners) / (4 * h * h), rel=2e-4, abs=2e-6)
    assert projection.loss == pytest.approx(measured.loss(state), rel=1e-12)
    assert np.abs(projection.curvature).max() > 1e-3, "the case has no curvature to check"


def test_running_statistics_have_curvature_of_their_own():
    case = CASES["conv, interpolate"]
    objective = Objective(case.model(), case.batches())
    only_statistics = {"bn1.running_mean": torch.ones(4), "bn1.running_var": torch.ones(4)}
    projection = project_hessian(objective, objective.state(), [only_statistics])
    assert abs(projection.slopes[0]) > 1e-4
    assert abs(projection.curvature[0, 0]) > 1e-4


def test_linear_regression_has_the_gram_matrix_as_hessian():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(20, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    objective = Objective(model, [(x[:12], y[:12]), (x[12:], y[12:])], loss_fn=F.mse_loss)
    directions = {str(i): {"weight": row.view(1, 4)} for i, row in enumerate(torch.eye(4))}
    projection = project_hessian(objective, objective.state(), directions)
    residual = x @ model.weight.detach().T - y
    np.testing.assert_allclose(projection.curvature, 2 * (x.T @ x).numpy() / 20, rtol=1e-12)
    np.testing.assert_allclose(projection.slopes, 2 * (x.T @ residual).squeeze().numpy() / 20, rtol=1e-11)


def test_softmax_regression_has_its_textbook_hessian():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(15, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (15,), generator=generator)
    model = nn.Linear(4, 3, bias=False).double()
    objective = Objective(model, [(x[:10], y[:10]), (x[10:], y[10:])])
    units = [{"weight": row.view(3, 4)} for row in torch.eye(12)]
    projection = project_hessian(objective, objective.state(), units)
    # Σ_i (diag p_i − p_i p_iᵀ) ⊗ x_i x_iᵀ / n (Böhning 1992)
    p = torch.softmax(model(x).detach(), 1)
    blocks = torch.diag_embed(p) - torch.einsum("na,nb->nab", p, p)
    expected = torch.einsum("nab,ni,nj->aibj", blocks, x, x).reshape(12, 12) / 15
    np.testing.assert_allclose(projection.curvature, expected.numpy(), rtol=1e-11, atol=1e-14)


@pytest.mark.check
def test_several_states_share_one_pass_over_the_loader():
    case = CASES["LayerNorm and GELU"]
    objective = Objective(case.model(), iter(case.batches()))
    states = [case.model(seed).state_dict() for seed in (0, 5)]
    directions = [{"0.weight": torch.ones(6, 5)}]
    together = project_hessian_at(objective, states, directions)
    for state, projection in zip(states, together, strict=True):
        alone = project_hessian(Objective(case.model(), case.batches()), state, directions)
        np.testing.assert_allclose(projection.batch_curvatures, alone.batch_curvatures, rtol=1e-9, atol=1e-12)


def test_standard_errors_are_those_of_the_batch_values():
    case = CASES["LayerNorm and GELU"]
    objective = Objective(case.model(), case.batches((4, 4, 4, 4)))
    projection = project_hessian(
        objective, objective.state(), [{"0.weight": torch.ones(6, 5)}, {"0.bias": torch.ones(6)}]
    )
    assert projection.examples == 16
    assert projection.loss_se == pytest.approx(projection.batch_losses.std(ddof=1) / 2)
    np.testing.assert_allclose(projection.slopes_se, projection.batch_slopes.std(axis=0, ddof=1) / 2)
    np.testing.assert_allclose(
        projection.curvature_se, standard_error(projection.batch_curvatures, projection.batch_sizes)
    )


@pytest.mark.check
def test_standard_error_covers_the_mean_of_all_data():
    # With 10 batches of one population, about 92 % of the intervals must hold the true value; ask for most.
    case = CASES["LayerNorm and GELU"]
    model, directions = case.model(), [{"0.bias": torch.ones(6, dtype=torch.float64)}]
    truth = project_hessian(Objective(model, case.batches((20000,), seed=99)), {}, directions)
    all_of_them = project_hessian(Objective(model, case.batches((8,) * 400)), {}, directions, method="hvp")
    values = all_of_them.batch_losses, all_of_them.batch_slopes, all_of_them.batch_curvatures
    samples = [
        Projection(np.full(10, 8), *(each[start : start + 10] for each in values)) for start in range(0, 400, 10)
    ]
    inside = sum(abs(sample.slopes[0] - truth.slopes[0]) < 2 * sample.slopes_se[0] for sample in samples)
    assert inside >= 33


def test_a_single_batch_has_no_standard_error():
    case = CASES["LayerNorm and GELU"]
    objective = Objective(case.model(), case.batches((5,)))
    assert np.isnan(project_hessian(objective, {}, [{"0.bias": torch.ones(6)}]).loss_se)


def test_unused_and_linear_entries_have_zero_curvature():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x):
            return self.used(x)

    objective = Objective(Partly().double(), [(torch.ones(2, 3), torch.ones(2))], loss_fn=lambda out, _: out.mean())
    directions = [{"used.weight": torch.ones(1, 3)}, {"unused.weight": torch.ones(1, 3)}]
    projection = project_hessian(objective, {}, directions)
    np.testing.assert_array_equal(projection.curvature, np.zeros((2, 2)))
    np.testing.assert_allclose(projection.slopes, [3.0, 0.0])


def test_an_unknown_method_is_named(untyped):
    case = CASES["LayerNorm and GELU"]
    with pytest.raises(OptionError, match="method='hpv'.*did you mean 'hvp'"):
        project_hessian(Objective(case.model(), case.batches()), {}, [{"0.bias": torch.ones(6)}], method="hpv")


def test_a_loss_that_is_not_finite_names_its_batch():
    case = CASES["LayerNorm and GELU"]
    batches = case.batches()
    batches[1][0][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"loss is nan at batch 1 \(6 examples\)"):
        project_hessian(Objective(case.model(), batches), {}, [{"0.bias": torch.ones(6)}])


def test_curvature_that_is_not_finite_names_its_batch():
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    objective = Objective(model, [(torch.ones(3, 2), torch.ones(3))], loss_fn=lambda out, _: out.abs().pow(1.5).mean())
    with pytest.raises(NonFiniteError, match="curvature are not finite at batch 0"):
        project_hessian(objective, {}, [{"weight": torch.ones(1, 2)}])


def test_where_the_sweep_is_not_finite_products_are_tried():
    def partial_likelihood(output, target):
        times, events = target
        order = times.argsort(descending=True)
        risk = output[order, 0]
        return -((risk - risk.logcumsumexp(0)) * events[order]).sum() / events.sum()

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    target = torch.rand(12), (torch.rand(12) < 0.6).float()
    objective = Objective(network, [(torch.randn(12, 4), target)], loss_fn=partial_likelihood)
    direction = [{name: torch.randn_like(tensor) for name, tensor in objective.state().items()}]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The loss of batch 0")
        expected = project_hessian(objective, {}, direction, method="hvp").curvature
        with pytest.warns(FallbackWarning, match="not finite.*Falling back"):
            found = project_hessian(objective, {}, direction)
    np.testing.assert_allclose(found.curvature, expected)


def test_what_moves_nowhere_need_not_be_differentiable():
    """A feature extractor under no_grad that both networks share."""

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            with torch.no_grad():
                h = self.features(x).tanh()
            return self.head(h)

    first, second = Probe().double(), Probe().double()
    second.features.load_state_dict(first.features.state_dict())
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 3
    found = predict_barrier(first, second, [(x, y)], progress=False)
    expected = measure_barrier(first, second, [(x, y)], alphas=[0.0, 0.5, 1.0], progress=False)
    assert found.curve([0.5])[0] == pytest.approx(expected.curve()[1], abs=1e-10)


@pytest.mark.check
def test_several_problems_share_one_pass_over_the_loader():
    case = CASES["LayerNorm and GELU"]
    objective = Objective(case.model(), iter(case.batches()))
    asked = [
        (case.model(0).state_dict(), [{"0.weight": torch.ones(6, 5)}]),
        (
            case.model(5).state_dict(),
            [{"0.weight": torch.ones(6, 5), "0.bias": torch.ones(6)}, {"3.bias": torch.ones(3)}],
        ),
    ]
    problems = [Problem.of(objective, [state], directions) for state, directions in asked]
    for (state, directions), projection in zip(asked, project_problems(problems), strict=True):
        alone = project_hessian(Objective(case.model(), case.batches()), state, directions)
        np.testing.assert_allclose(projection.batch_curvatures, alone.batch_curvatures, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(projection.batch_slopes, alone.batch_slopes, rtol=1e-9, atol=1e-12)


def test_combinations_of_directions_need_no_pass():
    case = CASES["LayerNorm and GELU"]
    objective = Objective(case.model(), case.batches())
    directions = [{"0.weight": torch.ones(6, 5)}, {"0.bias": torch.ones(6)}, {"3.bias": torch.ones(3)}]
    projection = project_hessian(objective, objective.state(), directions)
    both = {"0.weight": 0.5 * torch.ones(6, 5), "0.bias": -2 * torch.ones(6)}
    expected = project_hessian(objective, objective.state(), [both, directions[2]])
    found = projection.along(np.array([[0.5, 0.0], [-2.0, 0.0], [0.0, 1.0]]))
    for field in ("batch_losses", "batch_slopes", "batch_curvatures"):
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), rtol=1e-9, atol=1e-12)
    # Directions themselves come back as they were.
    same = projection.along(np.eye(3)[:, [1]])
    np.testing.assert_array_equal(same.batch_curvatures[:, 0, 0], projection.batch_curvatures[:, 1, 1])
