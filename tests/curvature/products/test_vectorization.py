"""Claim: products made at once are those made one by one, and are made at once where that is meant to pay."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, HessianOperator, Objective
from lmc_curvature.curvature.blocks.blocks import layer_hessian
from lmc_curvature.curvature.operators.ggn import GGNOperator
from lmc_curvature.curvature.products import vectorization
from lmc_curvature.curvature.products.gradient import BatchGradient
from lmc_curvature.curvature.products.vectorization import (
    UnitVectors,
    Vectorizer,
    stacked_units,
    unit_passes,
    units_within,
)
from tests.support.cases import CASES
from tests.support.networks import randomized


def _objective(name):
    case = CASES[name]
    return Objective(case.model(), case.batches(), **case.options)


def _vectors(operator, count=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(operator.shape[1], count, generator=generator, dtype=torch.float64)


@pytest.fixture
def mapped(monkeypatch):
    """How many products each successful call of `torch.func.vmap` made."""
    sizes, original = [], vectorization._mapped

    def watched(compute, directions):
        found = original(compute, directions)
        if found is not None:
            sizes.append(len(next(iter(directions.values()))))
        return found

    monkeypatch.setattr(vectorization, "_mapped", watched)
    return sizes


@pytest.fixture
def one_by_one(monkeypatch):
    """Switches to products one by one."""
    return lambda: monkeypatch.setattr(vectorization, "_ELEMENTS", {})


@pytest.mark.parametrize("name", CASES)
def test_matrices_are_multiplied_as_one_by_one(name, mapped, one_by_one):
    objective = _objective(name)
    operators = [HessianOperator(objective), HessianOperator(objective).block_diagonal()]
    if objective.has_output:
        operators.append(GGNOperator(objective))
    found = [operator @ _vectors(operator) for operator in operators]
    columns = [torch.stack([operator @ vector for vector in _vectors(operator).T], dim=1) for operator in operators]
    for one, other in zip(found, columns, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    at_once = bool(mapped)
    convolves = any(isinstance(module, nn.Conv2d) for module in objective.network.modules())
    assert at_once != convolves
    one_by_one()
    mapped.clear()
    for operator, one in zip(operators, found, strict=True):
        again = operator.block(operator.partition.names)
        torch.testing.assert_close(again @ _vectors(again), one, rtol=1e-10, atol=1e-13)
    assert not mapped


@pytest.mark.parametrize("name", ["LayerNorm and GELU", "attention", "tied weights"])
def test_dense_matrices_are_those_made_one_by_one(name, mapped, one_by_one):
    objective = _objective(name)
    layers = HessianOperator(objective).partition.names

    def compute():
        H = HessianOperator(objective)
        return [
            H.to_dense(),
            H.block_diagonal().to_dense(),
            H.block(layers[0], layers[-1]).to_dense(),
            H.diagonal(),
            GGNOperator(objective).to_dense(),
            *(layer_hessian(objective, None, layer, method="products") for layer in layers),
            *(layer_hessian(objective, None, layer) for layer in layers),
        ]

    found = compute()
    assert mapped
    one_by_one()
    mapped.clear()
    for one, other in zip(found, compute(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    assert not mapped


def test_the_dense_matrix_is_that_of_products():
    H = HessianOperator(_objective("conv, interpolate"))
    products = H @ torch.eye(H.shape[1], dtype=torch.float64)
    torch.testing.assert_close(H.to_dense(), products, rtol=1e-9, atol=1e-12)


def test_as_many_are_made_at_once_as_fit(mapped, monkeypatch):
    H = HessianOperator(_objective("LayerNorm and GELU"))
    H @ _vectors(H, 20)
    assert max(mapped) >= 19
    for elements, largest in ((2**13, 19), (2**11, 4), (2**9, 0)):
        mapped.clear()
        monkeypatch.setattr(vectorization, "_ELEMENTS", {"cpu": elements})
        fresh = HessianOperator(_objective("LayerNorm and GELU"))
        fresh @ _vectors(fresh, 20)
        assert max(mapped, default=0) <= largest
        made = len(mapped)
        # What was found out holds for the batches and products to come, a last single one included.
        fresh @ _vectors(fresh, 20)
        assert len(mapped) >= 2 * made


class _ByNumpy(torch.autograd.Function):
    """Sine, with a backward pass that leaves torch where nothing is differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return slope * x.cos()
        return torch.from_numpy(slope.numpy() * np.cos(x.detach().numpy()))


class _Sine(nn.Module):
    def forward(self, x):
        return _ByNumpy.apply(x)


def test_what_cannot_be_mapped_is_made_one_by_one(mapped):
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    networks = [
        randomized(nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3)).double()) for layer in (_Sine(), _Plain())
    ]
    own, plain = (HessianOperator(Objective(network, [(x, y)])) for network in networks)
    found = own @ _vectors(own)
    assert not mapped
    torch.testing.assert_close(found, plain @ _vectors(plain), rtol=1e-12, atol=1e-14)
    assert mapped


def _differentiates_distances_twice():
    x = torch.randn(2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.cdist(x, x.detach()).sum(), x, create_graph=True)
    try:
        torch.autograd.grad(slope.sum(), x)
    except NotImplementedError:
        return False
    return True


# torch 2.11 refuses it; later versions have a derivative that is wrong where it is mapped.
needs_distances = pytest.mark.skipif(
    not _differentiates_distances_twice(), reason="this torch has no second derivative of cdist"
)


class _Radial(nn.Module):
    """Radial basis functions around centres that are parameters."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 3)
        self.centres = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return self.outer(torch.exp(-torch.cdist(self.inner(x), self.centres)))


@needs_distances
@pytest.mark.parametrize("by_name", [True, False])
def test_an_operation_that_torch_maps_wrongly(by_name, mapped, monkeypatch):
    if not by_name:
        monkeypatch.setattr(vectorization, "_ALONE", ())
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    H = HessianOperator(Objective(_Radial().double(), [(x, y)]))
    vectors = _vectors(H)
    expected = torch.stack([H @ vector for vector in vectors.T], dim=1)
    torch.testing.assert_close(H @ vectors, expected, rtol=1e-10, atol=1e-13)
    # It is mapped once, and found out.
    assert len(mapped) == (0 if by_name else 1)
    torch.testing.assert_close(H @ vectors, expected, rtol=1e-10, atol=1e-13)
    assert len(mapped) == (0 if by_name else 1)


class _Switching(_Radial):
    """Measures distances in some batches only."""

    def forward(self, x):
        return super().forward(x) if x[0, 0] > 0 else self.outer(torch.tanh(self.inner(x)))


@needs_distances
@pytest.mark.parametrize("by_name", [True, False])
def test_an_operation_that_a_later_batch_brings(by_name, mapped, monkeypatch):
    if not by_name:
        monkeypatch.setattr(vectorization, "_ALONE", ())
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    x[:, 0, 0] = torch.tensor([-1.0, 1.0])
    H = HessianOperator(Objective(_Switching().double(), list(zip(x, [y, y], strict=True))))
    vectors = torch.eye(H.shape[1], dtype=torch.float64)
    expected = torch.stack([H @ vector for vector in vectors.T], dim=1)
    for found in (H @ vectors, H.to_dense()):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(H.diagonal(), expected.diagonal(), rtol=1e-10, atol=1e-13)
    assert mapped


@needs_distances
@pytest.mark.parametrize("scale", [1, 1e-2, 1e-4])
def test_what_is_mapped_wrongly_and_small_beside_the_rest(scale, mapped, monkeypatch):
    monkeypatch.setattr(vectorization, "_ALONE", ())

    class Beside(_Radial):
        def forward(self, x):
            return self.outer(torch.tanh(self.inner(x))) + scale * super().forward(x)

    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    H = HessianOperator(Objective(Beside(), [(x, y)]))
    vectors = _vectors(H).float()
    expected = torch.stack([H @ vector for vector in vectors.T], dim=1)
    torch.testing.assert_close(H @ vectors, expected, rtol=1e-4, atol=1e-8)
    assert len(mapped) == 1


class _Sequence:
    """A batch whose tensors are not seen from outside."""

    def __init__(self, x, y):
        self.x, self.y = x, y


@pytest.mark.parametrize("make", [lambda x, y: (x, y), _Sequence])
def test_batches_of_other_shapes_are_measured_anew(make, mapped):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 3)

        def forward(self, x):
            return torch.tanh(self.fc(x)).mean(1)

    y = torch.tensor([0, 1, 2, 0])
    batches = [make(torch.randn(4, length, 2, dtype=torch.float64), y) for length in (2, 50_000)]

    def loss(model, batch):
        x, y = batch if isinstance(batch, tuple) else (batch.x, batch.y)
        return F.cross_entropy(model(x), y)

    H = HessianOperator(Objective(Mean().double(), batches, loss_fn=BatchLoss(loss, size=lambda batch: 4)))
    H @ _vectors(H, 20)
    assert max(mapped) == 19
    assert min(mapped) < 10


def test_no_columns():
    H = HessianOperator(_objective("LayerNorm and GELU"))
    layer = H.partition.names[0]
    for count in (0, 1, 3):
        found = H.block(layer, []) @ torch.zeros(0, count, dtype=torch.float64)
        assert found.shape == (H.block(layer).shape[0], count)
        assert not found.any()
    assert not any(product.any() for product in (H @ {}).values())


class _Plain(nn.Module):
    def forward(self, x):
        return x.sin()


def test_errors_of_a_product_are_those_of_one():
    vectorizer = Vectorizer(2.0**-52)

    def fail(direction):
        raise ValueError("no such product")

    with pytest.raises(ValueError, match="no such product"):
        list(vectorizer.map(fail, lambda start, stop: {"x": torch.ones(stop - start, 2)}, 3, "key"))


def test_what_fails_many_at_once_only_is_made_alone():
    made = []

    def double(direction):
        if torch._C._functorch.is_batchedtensor(direction["x"]):
            made.append(None)
            raise (torch.OutOfMemoryError if len(made) < 3 else ValueError)("too many")
        made.append(1)
        return {"y": 2 * direction["x"]}

    vectorizer, x = Vectorizer(2.0**-52), torch.arange(40.0).view(20, 2)
    parts = list(vectorizer.map(double, lambda start, stop: {"x": x[start:stop]}, 20, "key"))
    torch.testing.assert_close(torch.cat([part["y"] for part in parts]), 2 * x)
    # The first, all others, one, half of as many, and one by one.
    assert made == [1, None, 1, None, *[1] * 18]


def test_a_remainder_of_one_does_not_end_it():
    calls = []

    def double(direction):
        calls.append(1)
        return {"y": 2 * direction["x"]}

    vectorizer, x = Vectorizer(2.0**-52), torch.arange(12.0).view(6, 2)
    for _ in range(3):
        parts = list(vectorizer.map(double, lambda start, stop: {"x": x[start:stop]}, 2, "key"))
        torch.testing.assert_close(torch.cat([part["y"] for part in parts]), 2 * x[:2])
    calls.clear()
    parts = list(vectorizer.map(double, lambda start, stop: {"x": x[start:stop]}, 6, "key"))
    assert len(calls) == len(parts) == 1
    torch.testing.assert_close(parts[0]["y"], 2 * x)
    list(vectorizer.map(double, lambda start, stop: {"x": x[start:stop]}, 1, "key"))
    assert len(list(vectorizer.map(double, lambda start, stop: {"x": x[start:stop]}, 6, "key"))) == 1


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_unit_passes_hold_every_coordinate_once(size):
    tensors = {"a": torch.zeros(2, 3), "none": torch.zeros(0), "b": torch.zeros(()), "c": torch.zeros(5).double()}
    rows = []
    for passed in unit_passes(tensors, size):
        assert 0 < sum(map(len, passed)) <= size
        for units in passed:
            for number in range(len(units)):
                (entry, stacked), *_ = units.stacked(number, number + 1).items()
                assert stacked.shape == (1, *tensors[entry].shape)
                assert stacked.dtype == tensors[entry].dtype
                rows.append(torch.cat([stacked.flatten() if n == entry else t.flatten() for n, t in tensors.items()]))
    torch.testing.assert_close(torch.stack(rows), torch.eye(12), check_dtype=False)


def test_a_range_of_unit_vectors():
    units = UnitVectors("w", torch.zeros(2, 3), 2, 6)
    expected = torch.eye(6)[3:5].view(2, 2, 3)
    torch.testing.assert_close(units.stacked(1, 3), {"w": expected})


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (0, 3), (2, 5), (4, 5), (4, 8), (6, 7)])
def test_a_range_of_unit_vectors_of_several_entries(start, stop):
    group = [
        UnitVectors("w", torch.zeros(2, 3), 2, 6),
        UnitVectors("s", torch.zeros(()), 0, 1),
        UnitVectors("b", torch.zeros(4), 0, 3),
    ]
    chosen = torch.tensor([2, 3, 4, 5, 6, 7, 8, 9])[start:stop]
    w, s, b = torch.eye(11)[chosen].split([6, 1, 4], dim=1)
    expected = {"w": w.reshape(-1, 2, 3), "s": s.reshape(-1), "b": b}
    torch.testing.assert_close(stacked_units(group, start, stop), expected)
    for units, vectors, coordinates in units_within(group, start, stop):
        first = {"w": 0, "s": 6, "b": 7}[units.entry]
        assert chosen[vectors].tolist() == list(range(first + coordinates.start, first + coordinates.stop))


@pytest.mark.parametrize("batch_norm", ["interpolate", "batch"])
def test_one_product_makes_what_many_share_a_call_of(batch_norm, monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 3
    H = HessianOperator(Objective(network, [(x, y)], batch_norm=batch_norm, loss_fn=F.cross_entropy))
    H.to_dense()
    made, product = [], BatchGradient.product
    monkeypatch.setattr(
        BatchGradient, "product", lambda self, *args, **options: made.append(1) or product(self, *args, **options)
    )
    H.to_dense()
    assert len(made) == 1
    # Where they do not fit together, a call for each entry.
    monkeypatch.setattr(vectorization, "_ELEMENTS", {"cpu": 25_000})
    fresh = HessianOperator(H.objective)
    fresh.to_dense()
    made.clear()
    fresh.to_dense()
    assert len(made) == len(H.rows) < H.shape[0]
