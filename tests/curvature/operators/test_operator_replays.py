"""Claim: products that are replayed as CUDA graphs are those that are computed."""

import warnings

import pytest
import torch

from lmc_curvature import BatchLoss, GGNOperator, HessianOperator, Objective
from lmc_curvature.errors import FallbackWarning
from tests.support.cases import CASES
from tests.support.devices import gpu
from tests.support.networks import randomized
from tests.support.replaying import let_replay
from tests.support.sweeping import TwoLayers, vectors

_NAMES = ["conv, interpolate", "conv, batch", "attention", "LSTM", "tied weights", "LayerNorm and GELU"]


def _objective(name, sizes=(4, 3, 4), **options):
    case = CASES[name]
    return Objective(case.model(), case.batches(sizes), **{**case.options, **options})


def _vectors(operator, count, seed=0, dtype=torch.float64):
    return torch.randn(operator.shape[1], count, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _nearby(objective):
    generator = torch.Generator().manual_seed(5)
    return {
        name: tensor * (1 + 0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
        for name, tensor in objective.state().items()
    }


def _assert_same(found, expected, relative=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * expected.abs().max().item())


# --- On a CPU, by a stand-in that repeats the call on its own copies


@pytest.mark.check
@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_replayed_products_are_those_of_other_batches_states_and_vectors(name, kind):
    plain, replaying = _objective(name), _objective(name)
    repeater = let_replay(replaying)
    for state in (None, _nearby(plain)):
        expected, found = (kind(objective, state) for objective in (plain, replaying))
        for seed in range(3):
            vector, matrix = _vectors(expected, 1, seed)[:, 0], _vectors(expected, 5, seed)
            _assert_same(found @ vector, expected @ vector)
            _assert_same(found @ matrix, expected @ matrix)
    # A matrix and two products for each size of batch; fewer where products are not made at once.
    assert 4 <= repeater.recorded <= 8
    assert repeater.replayed > 20


@pytest.mark.check
def test_directions_and_blocks_have_products_of_their_own():
    plain, replaying = _objective("conv, interpolate"), _objective("conv, interpolate")
    let_replay(replaying)
    first, *_, last = HessianOperator(plain).partition.names
    for _ in range(3):
        products = []
        for objective in (plain, replaying):
            H = HessianOperator(objective)
            products.append(
                [
                    H.flatten(H @ {name: torch.ones_like(plain.state()[name]) for name in H.partition.entries(first)}),
                    H.block(first, last) @ _vectors(H.block(first, last), 2),
                    H.block_diagonal() @ _vectors(H, 2),
                ]
            )
        for found, expected in zip(*reversed(products), strict=True):
            _assert_same(found, expected)


def test_many_products_are_measured_by_their_operations_and_then_replayed_at_once():
    plain, replaying = (Objective(randomized(TwoLayers().double()), vectors(6)) for _ in range(2))
    repeater = let_replay(replaying)
    expected, found = HessianOperator(plain), HessianOperator(replaying)
    for _ in range(3):
        _assert_same(found @ _vectors(found, 1), expected @ _vectors(expected, 1))
    # The matrix and one product.
    assert repeater.recorded == 2
    for seed in range(3):
        before = repeater.replayed
        _assert_same(found @ _vectors(found, 20, seed), expected @ _vectors(expected, 20, seed))
    # The matrix, the first vector alone where its operations are counted, and the others at once.
    assert repeater.replayed - before == 2
    assert found._vectorizer._at_once == expected._vectorizer._at_once


@pytest.mark.check
def test_dense_matrices_are_computed_as_before():
    objective = _objective("conv, interpolate")
    repeater = let_replay(objective)
    H, plain = HessianOperator(objective), HessianOperator(_objective("conv, interpolate"))
    layer = H.partition.names[0]
    for _ in range(2):
        _assert_same(H.block(layer).to_dense(), plain.block(layer).to_dense())
    assert repeater.recorded == 0


def test_a_network_that_has_changed_is_computed_anew():
    scale = [1.0]
    objective = Objective(
        randomized(TwoLayers().double()),
        vectors(4, 4),
        loss_fn=lambda output, target: scale[0] * output.square().mean(),
        witness=False,
    )
    let_replay(objective)
    H = HessianOperator(objective)
    vector = _vectors(H, 1)[:, 0]
    first = H @ vector
    for scale[0] in (1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 0.5):
        _assert_same(H @ vector, scale[0] * first)


def test_batches_that_values_tell_apart_are_computed():
    loss = BatchLoss(lambda model, batch: batch["times"] * model(batch["x"]).square().mean(), size=lambda batch: 4)
    batches = [{"x": x, "times": times} for (x, _), times in zip(vectors(4, 4), (1, 2), strict=True)]
    objective = Objective(randomized(TwoLayers().double()), batches, loss_fn=loss, witness=False)
    repeater = let_replay(objective)
    H = HessianOperator(objective)
    for _ in range(3):
        H @ _vectors(H, 1)
    assert repeater.recorded == 0


class _Waits(TwoLayers):
    def forward(self, x):
        return super().forward(x) * (1.0 if x.sum().item() > -1e9 else 2.0)


def test_what_cannot_be_recorded_is_computed_with_one_warning():
    model = randomized(_Waits().double())
    plain, objective = (Objective(model, vectors(4, 3, 4)) for _ in range(2))
    let_replay(objective)
    expected = HessianOperator(plain)
    H = HessianOperator(objective)
    vector = _vectors(H, 1)[:, 0]
    # The third batch is of the shape of the first.
    with pytest.warns(FallbackWarning, match="CUDA graph: The network failed .* called a synchronizing"):
        _assert_same(H @ vector, expected @ vector)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            _assert_same(H @ vector, expected @ vector)


# --- On a device


@gpu
@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_products_on_a_device_are_those_of_a_cpu(name, kind, dtype, relative):
    here, there = _objective(name), _objective(name, device="cuda", dtype=dtype)
    for state in (None, _nearby(here)):
        expected, found = kind(here, state), kind(there, state)
        for seed in range(3):
            for count in (1, 5):
                given = _vectors(expected, count, seed)
                _assert_same((found @ given.cuda()).cpu(), expected @ given, relative)
    assert there.replays._replays
    assert not there.replays._failures


@gpu
def test_a_network_that_waits_is_computed_on_a_device_with_a_warning_that_names_the_line():
    model = randomized(_Waits().double())
    expected = HessianOperator(Objective(model, vectors(4)))
    H = HessianOperator(Objective(model, vectors(4), device="cuda"))
    given = _vectors(H, 1)
    first = H @ given.cuda()
    with pytest.warns(FallbackWarning, match=r"x\.sum\(\)\.item\(\)"):
        second = H @ given.cuda()
    for found in (first, second, H @ given.cuda()):
        _assert_same(found.cpu(), expected @ given, 1e-9)
