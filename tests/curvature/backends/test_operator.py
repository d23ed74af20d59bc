"""Claim: every backend computes the curvature of the same function, or says what it cannot do."""

import importlib
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lmc_curvature import HessianOperator, Objective, hessian_operator, spectral_density, top_eigenpairs, trace
from lmc_curvature.curvature.backends import BACKENDS
from lmc_curvature.errors import BackendError, DirectionError, NonFiniteError, OptionError, UnsupportedModelError
from tests.support.cases import CASES
from tests.support.networks import OnceDifferentiable, augmenting_loader, rng_states, untouched

# All of them together take seconds.
PEERS = [backend for backend in BACKENDS if backend != "native"]


@pytest.fixture(params=PEERS)
def peer(request):
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param != "native":
        pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return request.param


def _objective(name="tied weights", **options):
    case = CASES[name]
    return Objective(case.model(), case.batches(), **{**case.options, **options})


# torch's forward mode is wrong, or has a gap, in these: see `test_wrong_products_are_refused`.
_WITHOUT_FORWARD_MODE = {"conv, batch", "conv, recalibrate", "LayerNorm and GELU", "attention"}


@pytest.mark.check(after=3)
@pytest.mark.parametrize("name", CASES)
def test_products_agree(name, peer):
    if peer == "curvlinops" and name in _WITHOUT_FORWARD_MODE:
        pytest.skip("torch's forward mode, which curvlinops is built on, does not compute this loss's derivatives")
    objective = _objective(name)
    H = HessianOperator(objective)
    V = torch.randn(H.shape[1], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = H @ V
    found = hessian_operator(objective, backend=peer) @ V
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11 * expected.abs().max().item())


@pytest.mark.check(after=1)
def test_operands_of_every_kind(backend):
    objective = _objective()
    there = CASES["tied weights"].model(5).state_dict()
    H = HessianOperator(objective, there)
    v = torch.randn(H.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    P = hessian_operator(objective, there, backend=backend)
    product = P @ v
    torch.testing.assert_close(product, H @ v, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(H.flatten(P @ P.unflatten(v)), H @ v, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(product, HessianOperator(objective) @ v, rtol=1e-3)


@pytest.mark.check
def test_operators_restrict_to_layers(peer):
    objective = _objective("conv, interpolate")
    H, P = HessianOperator(objective), hessian_operator(objective, backend=peer)
    for rows, columns in (("fc", "fc"), ("fc", "conv2"), (["conv1", "fc"], "conv2")):
        block = H.block(rows, columns)
        V = torch.randn(block.shape[1], 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(P.block(rows, columns) @ V, block @ V, rtol=1e-9, atol=1e-12)
    v = torch.linspace(-1, 1, H.shape[1], dtype=torch.float64)
    torch.testing.assert_close(P.block_diagonal() @ v, H.block_diagonal() @ v, rtol=1e-9, atol=1e-12)
    layer = hessian_operator(objective, backend=peer, layers="fc")
    np.testing.assert_allclose(layer.to_scipy() @ v[:15].numpy(), H.block("fc") @ v[:15], rtol=1e-9)


@pytest.mark.parametrize("name", sorted(_WITHOUT_FORWARD_MODE))
def test_wrong_products_are_refused(name):
    pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    H = hessian_operator(_objective(name), backend="curvlinops")
    try:
        product = H @ torch.ones(H.shape[1], dtype=torch.float64)
    except BackendError as error:
        assert "'curvlinops'" in str(error)
    else:  # a torch in which forward mode is right
        torch.testing.assert_close(product, HessianOperator(_objective(name)) @ torch.ones(H.shape[1]).double())


# The function or method of each library that makes its products.
PRODUCTS = {
    "curvlinops": ("curvlinops", "HessianLinearOperator", "__matmul__"),
    "pyhessian": ("pyhessian.utils", "hessian_vector_product"),
    "backpack": ("backpack.hessianfree.hvp", "hessian_vector_product"),
}


def test_a_backend_that_computes_something_else_is_refused(monkeypatch, peer):
    module, *path, name = PRODUCTS[peer]
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    vectors = {"curvlinops": 1, "pyhessian": 2, "backpack": 2}[peer]
    monkeypatch.setattr(owner, name, lambda *args, **options: [2.0 * vector for vector in args[vectors]])
    H = hessian_operator(_objective(), backend=peer)
    with pytest.raises(BackendError, match=f"backend='{peer}'.*off by.*on the first batch.*another backend"):
        H @ torch.ones(H.shape[1], dtype=torch.float64)


@pytest.mark.check
def test_spectra_and_diagonals_are_those_of_our_own_products(peer):
    objective = _objective()
    H, P = (hessian_operator(objective, backend=name, layers="middle") for name in ("native", peer))
    found, expected = (top_eigenpairs(operator, 2).values for operator in (P, H))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    found, expected = (trace(operator, probes=12) for operator in (P, H))
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-6)
    found, expected = (spectral_density(operator, probes=2, steps=6) for operator in (P, H))
    assert not found.exact
    np.testing.assert_allclose(found.nodes, expected.nodes, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(P.diagonal(), H.diagonal(), rtol=1e-9, atol=1e-12)


class Partly(nn.Module):
    """One entry the loss is linear in, one it does not use."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.head = nn.Linear(3, 2), nn.Linear(3, 1), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.used(x)))


def test_entries_without_curvature_are_zero(backend):
    batches = [(torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))]
    H = hessian_operator(Objective(Partly().double(), batches), backend=backend)
    product = H @ {name: torch.ones_like(tensor) for name, tensor in H.state.items()}
    assert not product["unused.weight"].any() and product["used.weight"].any()
    objective = Objective(Partly().double(), batches, loss_fn=lambda out, _: out.mean())
    linear = hessian_operator(objective, backend=backend, layers="head")
    assert not (linear @ torch.ones(linear.shape[1], dtype=torch.float64)).any()


def test_single_precision_agrees(peer):
    case = CASES["tied weights"]
    objective = Objective(case.model(), case.batches(), dtype=torch.float32, **case.options)
    H = HessianOperator(objective)
    v = torch.randn(H.shape[1], generator=torch.Generator().manual_seed(0))
    product = hessian_operator(objective, backend=peer) @ v
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, H @ v, rtol=1e-4, atol=1e-5)


def test_an_unknown_backend_is_named(untyped):
    with pytest.raises(OptionError, match="backend='pyhesian'.*did you mean 'pyhessian'"):
        hessian_operator(_objective(), backend="pyhesian")


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_package_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=rf"backend='{name}' needs .*pip install lmc-curvature\[backends\]"):
        hessian_operator(_objective(), backend=name)


def test_the_network_and_the_generators_are_left_alone(peer):
    case = CASES["conv, interpolate"]
    model = case.model()
    with untouched(model):
        hessian_operator(Objective(model, case.batches()), backend=peer) @ torch.ones(263, dtype=torch.float64)


def test_loaders_that_draw_random_numbers_are_restored(peer, untyped):
    x = torch.randn(9, 6, dtype=torch.float64)
    objective = Objective(CASES["tied weights"].model(), augmenting_loader(x, x), loss_fn=nn.MSELoss())
    before = rng_states()
    hessian_operator(objective, backend=peer) @ torch.ones(90, dtype=torch.float64)
    assert rng_states() == before


def test_what_has_no_hessian_is_refused_as_by_ourselves(peer):
    objective = _objective(loss_fn=lambda out, _: OnceDifferentiable.apply(out).pow(2).mean(), witness=False)
    with pytest.raises(UnsupportedModelError, match="marked once_differentiable"):
        hessian_operator(objective, backend=peer) @ torch.ones(90)


def test_bad_input_is_refused_as_by_ourselves(peer):
    with pytest.raises(DirectionError, match=r"shape \(7,\); expected a tensor of shape \(90,\)"):
        hessian_operator(_objective(), backend=peer) @ torch.ones(7)
    case = CASES["tied weights"]
    batches = case.batches()
    batches[1][0][0, 0] = torch.nan
    for number in (1, 0):
        objective = Objective(case.model(), batches[1 - number :], **case.options)
        with pytest.raises(NonFiniteError, match=f"loss is nan at batch {number}"):
            hessian_operator(objective, backend=peer) @ torch.ones(90)
