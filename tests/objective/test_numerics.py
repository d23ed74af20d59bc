"""Claim: a batch's layout changes how fast derivatives are computed, never what they are, and is decided once."""

import math

import pytest
import torch
from torch import nn

from lmc_curvature import (
    GGNOperator,
    HessianOperator,
    Objective,
    Segment,
    layer_hessian,
    project_hessian,
    spectral_density,
    top_eigenpairs,
)
from lmc_curvature.errors import NonFiniteError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.numerics import (
    channels_last,
    ignores_layout,
    largest_values,
    outside_inference,
    wide_dtype,
)


class Watching(nn.Module):
    """Passes its input on and counts in which layouts it came."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append("last" if x.is_contiguous(memory_format=torch.channels_last) else "first")
        return x


class Viewing(nn.Module):
    def forward(self, x):
        return x.view(x.shape[0], -1)


class ReadingMemory(nn.Module):
    """Reads its input as it lies in memory, which is another function of images in another layout."""

    def forward(self, x):
        return torch.as_strided(x, (x.shape[0], 3 * 16), (3 * 16, 1))


def _network(end):
    torch.manual_seed(0)
    return nn.Sequential(Watching(), nn.Conv2d(2, 3, 3), nn.Tanh(), end, nn.Linear(3 * 16, 3))


def _batches(sizes=(4, 3)):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 2, 6, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def _layouts(objective):
    """The layouts of the images the network saw since it was asked last."""
    seen = objective.network[0].seen
    layouts = set(seen)
    seen.clear()
    return layouts


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.mark.check(after=1)
@needs_onednn
@pytest.mark.parametrize("end", [nn.Flatten, Viewing, ReadingMemory])
def test_derivatives_are_those_in_double_precision_whatever_the_network_bears(end):
    network = _network(end())
    objective, exact = Objective(network, _batches()), Objective(network, _batches(), dtype=torch.float64)
    for kind in (HessianOperator, GGNOperator):
        V = torch.randn(kind(objective).shape[1], 2, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(kind(objective).matmat(V), kind(exact).matmat(V), rtol=1e-4, atol=1e-5)
    blocks = [layer_hessian(either, None, "4") for either in (objective, exact)]
    torch.testing.assert_close(*blocks, rtol=1e-4, atol=1e-5)


@needs_onednn
def test_images_are_channels_last_where_a_network_bears_it():
    # The witness lays out nothing.
    objective = Objective(_network(nn.Flatten()), _batches(), witness=False)
    H = HessianOperator(objective)
    H @ torch.ones(H.shape[1])
    _layouts(objective)
    H @ torch.ones(H.shape[1])
    GGNOperator(objective).block("4").diagonal()
    layer_hessian(objective, None, "4")
    assert _layouts(objective) == {"last"}


@needs_onednn
@pytest.mark.parametrize("end", [Viewing, ReadingMemory])
def test_a_network_that_does_not_bear_it_is_asked_once(end):
    objective = Objective(_network(end()), _batches())
    H = HessianOperator(objective)
    H @ torch.ones(H.shape[1])
    assert "last" in _layouts(objective)
    H @ torch.ones(H.shape[1])
    assert _layouts(objective) == {"first"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_single_precision_is_laid_out(dtype):
    objective = Objective(_network(nn.Flatten()), _batches(), dtype=dtype)
    H = HessianOperator(objective)
    H @ torch.ones(H.shape[1])
    assert _layouts(objective) == {"first"}


def test_an_error_of_the_batch_is_not_taken_for_one_of_the_layout():
    batches = _batches()
    batches[0][0][0, 0, 0, 0] = torch.nan
    H = HessianOperator(Objective(_network(nn.Flatten()), batches))
    with pytest.raises(NonFiniteError, match="loss is nan at batch 0"):
        H @ torch.ones(H.shape[1])

    def fail(batch):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        ignores_layout(fail, Batch(0, 4, batches[0]))


def test_only_images_change_their_layout():
    x, ids = torch.randn(2, 3, 4, 4), torch.ones(2, 3, 4, 4, dtype=torch.int64)
    data = channels_last(Batch(0, 2, {"x": x, "more": (ids, torch.randn(2, 3))})).data
    assert data["x"].is_contiguous(memory_format=torch.channels_last) and torch.equal(data["x"], x)
    assert data["more"][0] is ids


def test_half_precision_is_summed_in_single_precision():
    dtypes = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    assert {dtype: wide_dtype(dtype) for dtype in dtypes} == dtypes


# --- Under torch.inference_mode()


def _pair():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 3)).double() for _ in range(2)]


def _computed(objective, segment):
    """Numbers of every kind, each a tensor."""
    H, G = HessianOperator(objective), GGNOperator(objective)
    vector = {name: tensor + 1 for name, tensor in objective.state().items()}
    flat = torch.ones(H.shape[1], dtype=torch.float64)
    middle = segment.point(0.5)
    with objective.one_pass(progress=False) as batches:
        batch = next(batches)
    loss, *_ = objective.batch_evaluation(objective.state(), batch)
    return {
        "loss": torch.tensor(objective.loss(middle)),
        "batch loss": loss.detach(),
        "gradient": torch.cat([t.flatten() for t in objective.gradient(middle).values()]),
        "product with a state": torch.cat([t.flatten() for t in (H @ vector).values()]),
        "product": H @ flat,
        "products": H.matmat(torch.eye(H.shape[1], 2, dtype=torch.float64) * flat[:, None]),
        "GGN": G.to_dense(),
        "diagonal": H.diagonal(),
        "Hessian elsewhere": HessianOperator(objective, middle).to_dense(),
        "block": layer_hessian(objective, middle, "3"),
        "projection": torch.tensor(project_hessian(objective, middle, segment.directions()).curvature),
        "eigenvalues": top_eigenpairs(H, 2).values,
        "density": torch.tensor(spectral_density(H, probes=2, steps=4).nodes),
    }


@pytest.mark.check
def test_inference_mode_around_changes_nothing():
    models, batches = _pair(), [(torch.randn(9, 4).double(), torch.arange(9) % 3)]
    expected = _computed(Objective(models[0], batches), Segment(*models))
    outside, segment = Objective(models[0], batches), Segment(*models)
    with torch.inference_mode():
        made = _pair(), [tuple(tensor.clone() for tensor in batches[0])]
        inside = Objective(made[0][0], made[1]), Segment(*made[0])
        found = {"all": _computed(*inside), "computed": _computed(outside, segment)}
    found["made"] = _computed(*inside)
    for way, values in found.items():
        for name, value in values.items():
            torch.testing.assert_close(value, expected[name], msg=lambda text, at=(way, name): f"{at}: {text}")


def _first_batch(objective):
    with objective.one_pass(progress=False) as batches:
        return next(batches)


# What an objective is asked for first, from itself and a state.
FIRST_QUESTIONS = {
    "loss": lambda objective, state: objective.loss(),
    "loss at a state": lambda objective, state: objective.loss(state),
    "gradient": lambda objective, state: objective.gradient(state)["0.weight"],
    "batch loss": lambda objective, state: objective.batch_loss(objective.place(state), _first_batch(objective)),
    "complete state": lambda objective, state: objective.batch_loss(objective.complete(state), _first_batch(objective)),
    "output": lambda objective, state: objective.output_loss(
        objective.output(objective.place(state), _first_batch(objective)), _first_batch(objective)
    ),
    "statistics": lambda objective, state: objective.recalibrated([objective.place(state)])[0]["2.running_mean"],
}


@pytest.mark.check(after=9)
@pytest.mark.parametrize("ask", FIRST_QUESTIONS.values(), ids=FIRST_QUESTIONS)
@pytest.mark.parametrize("policy", ["interpolate", "batch", "recalibrate"])
def test_what_an_objective_is_asked_first_in_inference_mode_is_answered(ask, policy):
    models, batches = _pair(), [(torch.randn(9, 4).double(), torch.arange(9) % 3)]
    state = Segment(*models).point(0.5)
    expected = ask(Objective(models[0], batches, batch_norm=policy), state)
    outside = Objective(models[0], batches, batch_norm=policy)
    with torch.inference_mode():
        inside = Objective(models[0], batches, batch_norm=policy)
        found = [ask(objective, {n: t.clone() for n, t in state.items()}) for objective in (inside, outside)]
    for value in found:
        torch.testing.assert_close(value, expected)


def test_leaving_inference_mode_switches_no_gradients_on():
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad(), outside_inference():
        assert not (2 * x).requires_grad
    with outside_inference():
        assert (2 * x).requires_grad
    with torch.inference_mode(), outside_inference():
        assert not (2 * x).requires_grad
        assert not torch.ones(2).is_inference()


def test_the_largest_values_of_tensors_tell_what_is_not_finite():
    inf, nan = math.inf, math.nan
    tensors = [torch.tensor(values) for values in ([1.0, -3.0], [nan, 1.0], [1.0, -inf], [[0.0], [0.0]], [])]
    found = largest_values([*tensors, torch.tensor(-2.0)])
    torch.testing.assert_close(found, torch.tensor([3.0, nan, inf, 0.0, 0.0, 2.0]), equal_nan=True)
    assert largest_values([]).isfinite().all()
    # A number that rounds to zero when it is squared is none.
    assert largest_values([torch.tensor([1e-30])]).item() == pytest.approx(1e-30)
