"""Claim: products made at once are those made one by one, and are made at once where that is meant to pay."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, GGNOperator, HessianOperator, Objective, layer_hessian
from lmc_curvature.curvature.operators import Curvature, CurvatureOperator
from lmc_curvature.curvature.products import BatchGradient, StackedDirections, Vectorizer
from lmc_curvature.objective.batches import Batch
from tests.support.cases import CASES
from tests.support.networks import randomized

# All of them together take seconds.


def _objective(name):
    case = CASES[name]
    return Objective(case.model(), case.batches((6, 3)), **case.options)


def _vectors(operator, count=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(operator.shape[1], count, generator=generator, dtype=torch.float64)


@pytest.fixture
def mapped(monkeypatch):
    """How many products each successful call of `torch.func.vmap` made."""
    sizes, original = [], torch.func.vmap

    def vmap(compute):
        def watched(directions):
            found = original(compute)(directions)
            sizes.append(len(next(iter(directions.values()))))
            return found

        return watched

    monkeypatch.setattr(torch.func, "vmap", vmap)
    return sizes


def _one_by_one(operator, vectors):
    curvature = dataclasses.replace(operator.curvature, native=False)
    return CurvatureOperator(curvature, operator.objective) @ vectors


@pytest.mark.check(after=1)
@pytest.mark.parametrize("name", CASES)
def test_matrices_are_multiplied_as_one_by_one(name, mapped):
    objective = _objective(name)
    operators = [HessianOperator(objective), HessianOperator(objective).block_diagonal()]
    if objective.has_output:
        operators.append(GGNOperator(objective))
    for operator in operators:
        vectors = _vectors(operator)
        torch.testing.assert_close(operator @ vectors, _one_by_one(operator, vectors), rtol=1e-10, atol=1e-13)
    convolves = any(isinstance(module, nn.Conv2d) for module in objective.network.modules())
    assert bool(mapped) != convolves


@pytest.mark.check
@pytest.mark.parametrize("name", ["LayerNorm and GELU", "attention", "tied weights"])
def test_dense_matrices_are_those_made_one_by_one(name, mapped):
    objective = _objective(name)
    H, G = HessianOperator(objective), GGNOperator(objective)
    units = torch.eye(H.shape[1], dtype=torch.float64)
    dense = _one_by_one(H, units)
    assert not mapped
    layers = [H.partition.layer_of(entry) for entry, tensor in H.state.items() for _ in range(tensor.numel())]
    places = {layer: torch.tensor([layer == other for other in layers]) for layer in H.partition.names}
    first, last = H.partition.names[0], H.partition.names[-1]
    pairs = [
        (H.to_dense(), dense),
        (H.block_diagonal().to_dense(), torch.block_diag(*(dense[place][:, place] for place in places.values()))),
        (H.block(first, last).to_dense(), dense[places[first]][:, places[last]]),
        (H.diagonal(), dense.diagonal()),
        (G.to_dense(), _one_by_one(G, units)),
        *((layer_hessian(objective, None, n, method="products"), dense[p][:, p]) for n, p in places.items()),
        *((layer_hessian(objective, None, n), dense[p][:, p]) for n, p in places.items()),
    ]
    assert mapped
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_as_many_are_made_at_once_as_fit(mapped):
    H = HessianOperator(_objective("LayerNorm and GELU"))
    H @ _vectors(H, 20)
    assert max(mapped) >= 19
    case = CASES["LayerNorm and GELU"]
    gradient = BatchGradient(H.objective, H.state, Batch(0, 6, case.batches()[0]))
    directions = StackedDirections(H.unflatten(_vectors(H, 20).T))
    for elements, largest in ((2**13, 19), (2**11, 4), (2**9, 0), (0, 0)):
        mapped.clear()
        vectorizer = Vectorizer(2.0**-52, elements=elements)
        list(vectorizer.map(gradient.product, directions, "key"))
        assert max(mapped, default=0) <= largest
        made = len(mapped)
        # What was found out holds for the batches and products to come, a last single one included.
        list(vectorizer.map(gradient.product, directions, "key"))
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


class _WronglyMapped(torch.autograd.Function):
    """Sine, with a slope that is off where several are computed at once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return slope * x.cos() * (1.5 if torch._C._functorch.is_batchedtensor(slope) else 1)


class _Misled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.outer(_WronglyMapped.apply(self.inner(x)))


WRONGLY_MAPPED = pytest.mark.parametrize(
    ("make", "found_out"),
    [pytest.param(_Radial, 0, marks=needs_distances), (_Misled, 1)],
    ids=["known by name", "found out"],
)


@WRONGLY_MAPPED
def test_an_operation_that_is_mapped_wrongly(make, found_out, mapped):
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    H = HessianOperator(Objective(make().double(), [(x, y)]))
    vectors = _vectors(H)
    expected = _one_by_one(H, vectors)
    for _ in range(2):
        torch.testing.assert_close(H @ vectors, expected, rtol=1e-10, atol=1e-13)
        # It is mapped once at most.
        assert len(mapped) == found_out


@pytest.mark.check
@WRONGLY_MAPPED
def test_an_operation_that_a_later_batch_brings(make, found_out, mapped):
    class Switching(make):
        def forward(self, x):
            return super().forward(x) if x[0, 0] > 0 else self.outer(torch.tanh(self.inner(x)))

    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    x[:, 0, 0] = torch.tensor([-1.0, 1.0])
    H = HessianOperator(Objective(Switching().double(), list(zip(x, [y, y], strict=True))))
    vectors = torch.eye(H.shape[1], dtype=torch.float64)
    expected = _one_by_one(H, vectors)
    for found in (H @ vectors, H.to_dense()):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(H.diagonal(), expected.diagonal(), rtol=1e-10, atol=1e-13)
    assert mapped


@pytest.mark.parametrize("scale", [1, 1e-2, 1e-4])
def test_what_is_mapped_wrongly_and_small_beside_the_rest(scale, mapped):
    class Beside(_Misled):
        def __init__(self):
            super().__init__()
            self.beside = nn.Linear(4, 6)

        def forward(self, x):
            return self.outer(torch.tanh(self.beside(x))) + scale * super().forward(x)

    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    H = HessianOperator(Objective(Beside(), [(x, y)]))
    vectors = _vectors(H).float()
    torch.testing.assert_close(H @ vectors, _one_by_one(H, vectors), rtol=1e-4, atol=1e-8)
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


def _map(vectorizer, compute, x):
    return [found for _, found in vectorizer.map(compute, StackedDirections({"x": x}), "key")]


def test_errors_of_a_product_are_those_of_one():
    def fail(direction):
        raise ValueError("no such product")

    with pytest.raises(ValueError, match="no such product"):
        _map(Vectorizer(2.0**-52), fail, torch.ones(3, 2))


def test_what_fails_many_at_once_only_is_made_alone():
    made = []

    def double(direction):
        if torch._C._functorch.is_batchedtensor(direction["x"]):
            made.append(None)
            raise (torch.OutOfMemoryError if len(made) < 3 else ValueError)("too many")
        made.append(1)
        return {"y": 2 * direction["x"]}

    x = torch.arange(40.0).view(20, 2)
    parts = _map(Vectorizer(2.0**-52), double, x)
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
        parts = _map(vectorizer, double, x[:2])
        torch.testing.assert_close(torch.cat([part["y"] for part in parts]), 2 * x[:2])
    calls.clear()
    parts = _map(vectorizer, double, x)
    assert len(calls) == len(parts) == 1
    torch.testing.assert_close(parts[0]["y"], 2 * x)
    _map(vectorizer, double, x[:1])
    assert len(_map(vectorizer, double, x)) == 1


@pytest.mark.parametrize("batch_norm", ["interpolate", "batch"])
def test_one_product_makes_what_many_share_a_call_of(batch_norm):
    made = []

    class Counted(BatchGradient):
        def product(self, direction, rows=None):
            made.append(1)
            return super().product(direction, rows)

    def calls(examples):
        """How many calls a dense matrix takes, once the first of it has been timed."""
        x, y = torch.randn(examples, 3, dtype=torch.float64), torch.arange(examples) % 3
        objective = Objective(network, [(x, y)], batch_norm=batch_norm, loss_fn=F.cross_entropy)
        H = CurvatureOperator(Curvature("Hessian", Counted), objective)
        H.to_dense()
        made.clear()
        H.to_dense()
        return len(made), len(H.rows), H.shape[0]

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    assert calls(8)[0] == 1
    # Where they do not fit together, a call for each entry.
    together, entries, size = calls(3500)
    assert together == entries < size
