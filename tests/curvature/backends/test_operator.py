"""Claim: every backend computes the curvature of the same function, or says what it cannot do."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import HessianOperator, Objective
from lmc_curvature.curvature.backends import backends
from lmc_curvature.curvature.backends.backends import (
    BACKENDS,
    PeerHessian,
    hessian_diagonal,
    hessian_eigenvalues,
    hessian_operator,
    hessian_trace,
    hessian_vector_product,
)
from lmc_curvature.errors import BackendError, DirectionError, NonFiniteError, OptionError, UnsupportedModelError
from tests.support.cases import CASES
from tests.support.networks import augmenting_loader, rng_states, untouched

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


def _sequential(*, convolutional=False, loss="classes"):
    """A network that BackPACK knows whole, with data in uneven batches."""
    torch.manual_seed(0)
    layers = (
        [nn.Conv2d(2, 3, 3), nn.Sigmoid(), nn.Sequential(nn.Conv2d(3, 2, 2), nn.Tanh()), nn.Flatten(), nn.Linear(8, 3)]
        if convolutional
        else [nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)]
    )
    shape = (2, 5, 5) if convolutional else (5,)
    sizes = (6, 3)
    batches = [
        (
            torch.randn(n, *shape, dtype=torch.float64),
            torch.randint(3, (n,)) if loss == "classes" else torch.randn(n, 3, dtype=torch.float64),
        )
        for n in sizes
    ]
    return nn.Sequential(*layers).double(), batches


# torch's forward mode is wrong, or has a gap, in these: see `test_wrong_products_are_refused`.
_WITHOUT_FORWARD_MODE = {"conv, batch", "conv, recalibrate", "LayerNorm and GELU", "attention"}


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


def test_operands_of_every_kind(backend):
    objective = _objective()
    there = CASES["tied weights"].model(5).state_dict()
    H = HessianOperator(objective, there)
    v = torch.randn(H.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    product = hessian_vector_product(objective, there, v, backend=backend)
    torch.testing.assert_close(product, H @ v, rtol=1e-9, atol=1e-12)
    as_state = hessian_vector_product(objective, there, H.unflatten(v), backend=backend)
    torch.testing.assert_close(H.flatten(as_state), H @ v, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(product, HessianOperator(objective) @ v, rtol=1e-3)


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


def test_a_backend_that_computes_something_else_is_refused(monkeypatch, peer):
    def wrong(self, vectors):
        return [2.0 * vector for vector in vectors]

    monkeypatch.setattr(backends._BATCHES[peer], "_multiply", wrong)
    H = hessian_operator(_objective(), backend=peer)
    with pytest.raises(BackendError, match=f"backend='{peer}'.*off by.*on the first batch.*another backend"):
        H @ torch.ones(H.shape[1], dtype=torch.float64)


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


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("layers", [None, "middle"])
def test_eigenvalues_are_those_of_the_dense_matrix(backend, k, layers):
    objective = _objective()
    dense = HessianOperator(objective, layers=layers).to_dense()
    expected = torch.linalg.eigvalsh(dense)
    expected = expected[expected.abs().argsort(descending=True)][:k]
    if backend == "backpack":
        with pytest.raises(BackendError, match=r"'backpack' does not compute eigenvalues; these do: 'native', 'curvl"):
            hessian_eigenvalues(objective, k=k, backend=backend)
        return
    found = hessian_eigenvalues(objective, k=k, backend=backend, layers=layers, tolerance=1e-7)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_all_eigenvalues_may_be_asked_for():
    pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    objective = Objective(
        nn.Linear(2, 1).double(), [(torch.eye(2).double(), torch.ones(2, 1).double())], loss_fn=F.mse_loss
    )
    expected = torch.linalg.eigvalsh(HessianOperator(objective).to_dense()).flip(0)
    for backend in ("native", "curvlinops"):
        torch.testing.assert_close(
            hessian_eigenvalues(objective, k=3, backend=backend), expected, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("k", [0, 91])
def test_a_bad_number_of_eigenvalues_is_named(k, backend):
    if backend != "backpack":
        with pytest.raises(OptionError, match=f"k={k}: expected .* from 1 to 90"):
            hessian_eigenvalues(_objective(), k=k, backend=backend)


def test_traces_are_those_of_the_dense_matrix(backend):
    model, batches = _sequential()
    objective = Objective(model, batches)
    exact = HessianOperator(objective).to_dense().trace().item()
    estimate = hessian_trace(objective, backend=backend, probes=40)
    if backend == "backpack":
        assert estimate.standard_error == 0
        assert estimate.value == pytest.approx(exact, rel=1e-9)
    else:
        assert 0 < estimate.standard_error < 0.5 * abs(exact)
        assert abs(estimate.value - exact) < 4 * estimate.standard_error
    assert hessian_trace(objective, backend=backend, probes=40) == estimate


@pytest.mark.parametrize("backend", ["curvlinops", "pyhessian"])
def test_traces_of_diagonal_hessians_need_no_averaging(backend):
    # ⟨v, D v⟩ is the trace for every vector of signs.
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    x = torch.eye(6, dtype=torch.float64) * torch.arange(1.0, 7.0, dtype=torch.float64)
    batches = [(x[:4], torch.zeros(4, 1).double()), (x[4:], torch.zeros(2, 1).double())]
    objective = Objective(nn.Linear(6, 1, bias=False).double(), batches, loss_fn=F.mse_loss)
    estimate = hessian_trace(objective, backend=backend, probes=3)
    assert estimate.value == pytest.approx(2 * 91 / 6, rel=1e-12)
    assert estimate.standard_error == pytest.approx(0, abs=1e-12)


def test_a_bad_number_of_probes_is_named():
    pytest.importorskip("pyhessian", reason="pyhessian is not installed")
    for probes in (1, 90):
        with pytest.raises(OptionError, match=f"probes={probes}: with backend='pyhessian' .*fewer than .*90"):
            hessian_trace(_objective(), backend="pyhessian", probes=probes)


@pytest.mark.parametrize("convolutional", [False, True], ids=["mlp", "conv"])
@pytest.mark.parametrize("loss", ["classes", "values"])
@pytest.mark.parametrize("backend", ["native", "backpack"])
def test_diagonals_are_those_of_the_dense_matrix(backend, loss, convolutional):
    if backend != "native":
        pytest.importorskip(backend, reason=f"{backend} is not installed")
    model, batches = _sequential(convolutional=convolutional, loss=loss)
    objective = Objective(model, batches, loss_fn=F.cross_entropy if loss == "classes" else nn.MSELoss())
    H = HessianOperator(objective)
    expected = H.unflatten(H.to_dense().diagonal())
    with untouched(model):
        found = hessian_diagonal(objective, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    some = hessian_diagonal(objective, backend=backend, layers=["0"])
    torch.testing.assert_close(some, {name: expected[name] for name in ("0.weight", "0.bias")}, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("backend", ["curvlinops", "pyhessian"])
def test_backends_without_diagonals_say_who_has_them(backend):
    with pytest.raises(
        BackendError, match=f"'{backend}' does not compute exact diagonals; these do: 'native', 'backpack'"
    ):
        hessian_diagonal(_objective(), backend=backend)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 5)

    def forward(self, x):
        return x + self.fc(x)


def _shared():
    module = nn.Linear(5, 5)
    return [nn.Linear(5, 5), module, nn.Tanh(), module, nn.Linear(5, 3)]


def _tied():
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    return [first, nn.Tanh(), second, nn.Linear(5, 3)]


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (lambda: [Residual(), nn.Linear(5, 3)], {}, r"module '0' \(Residual\) computes something that it cannot see"),
        (lambda: [nn.LayerNorm(5), nn.Linear(5, 3)], {}, "cannot compute this diagonal.*LayerNorm"),
        (lambda: [nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)], {}, "cannot compute this.*BatchNorm1d"),
        (_shared, {}, "'backpack'.*more than once|tied parameters"),
        (_tied, {}, "tied parameters"),
        (lambda: [nn.Linear(5, 3)], {"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1)}, "not for loss_fn=CrossEntr"),
        (lambda: [nn.Linear(5, 3)], {"loss_fn": F.l1_loss}, "not for loss_fn=l1_loss"),
    ],
    ids=["residual", "LayerNorm", "BatchNorm", "shared", "tied", "smoothed", "another loss"],
)
def test_what_backpack_cannot_do_is_named(layers, options, message):
    pytest.importorskip("backpack", reason="backpack is not installed")
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    objective = Objective(nn.Sequential(*layers()).double(), [(x, y)], **options)
    with pytest.raises(BackendError, match=message):
        hessian_diagonal(objective, backend="backpack")


def test_an_unknown_backend_is_named():
    objective = _objective()
    for ask in (hessian_operator, hessian_eigenvalues, hessian_trace, hessian_diagonal):
        with pytest.raises(OptionError, match="backend='pyhesian'.*did you mean 'pyhessian'"):
            ask(objective, backend="pyhesian")
    with pytest.raises(OptionError, match="backend='native' is not a choice"):
        PeerHessian(objective, backend="native")


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_package_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=rf"backend='{name}' needs .*pip install lmc-curvature\[backends\]"):
        hessian_operator(_objective(), backend=name)


def test_the_network_and_the_generators_are_left_alone(peer):
    case = CASES["conv, interpolate"]
    model = case.model()
    objective = Objective(model, case.batches())
    with untouched(model):
        hessian_vector_product(objective, None, torch.ones(263, dtype=torch.float64), backend=peer)
        if peer != "backpack":
            hessian_eigenvalues(objective, backend=peer, layers="fc")
            hessian_trace(objective, backend=peer, layers="fc", probes=4)
    assert torch.get_default_dtype() == torch.float32


def test_loaders_that_draw_random_numbers_are_restored(untyped):
    pytest.importorskip("pyhessian", reason="pyhessian is not installed")
    model, _ = _sequential()
    x = torch.randn(9, 5, dtype=torch.float64)
    objective = Objective(model, augmenting_loader(x, torch.arange(9) % 3))
    before = rng_states()
    hessian_eigenvalues(objective, backend="pyhessian", tolerance=0.1)
    assert rng_states() == before


def test_what_has_no_hessian_is_refused_as_by_ourselves(peer):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient

    objective = _objective(loss_fn=lambda out, _: Once.apply(out).pow(2).mean())
    with pytest.raises(UnsupportedModelError, match="marked once_differentiable"):
        hessian_vector_product(objective, None, torch.ones(90), backend=peer)


def test_bad_input_is_refused_as_by_ourselves(peer):
    with pytest.raises(DirectionError, match=r"shape \(7,\); expected \(90,\)"):
        hessian_vector_product(_objective(), None, torch.ones(7), backend=peer)
    case = CASES["tied weights"]
    batches = case.batches()
    batches[1][0][0, 0] = torch.nan
    objective = Objective(case.model(), batches, **case.options)
    with pytest.raises(NonFiniteError, match="loss is nan at batch 1"):
        hessian_vector_product(objective, None, torch.ones(90), backend=peer)
    if peer == "pyhessian":
        with pytest.raises(NonFiniteError, match="PyHessian's samples of the trace are not finite"):
            hessian_trace(objective, backend=peer, probes=3)
