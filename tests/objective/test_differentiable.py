"""Claim: what torch differentiates wrongly is written out: the same values, with the derivatives of the function."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lmc_curvature import HessianOperator, Objective, measure_barrier, predict_barrier
from lmc_curvature.objective.differentiable import one_function, plain_calls

A = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
B = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CALLS = {
    "method": lambda: A.norm(),
    "method, axis": lambda: A.norm(dim=1),
    "method, named": lambda: A.norm(p=2, dim=-1, keepdim=True),
    "method, axes": lambda: A.norm(2, (1, 2), True),
    "norm, axes": lambda: torch.norm(A, dim=(0, 1)),
    "norm, 1": lambda: torch.norm(A, p=1),
    "norm, 3": lambda: torch.norm(A, p=3, dim=1),
    "norm, Frobenius": lambda: torch.norm(A, p="fro", dim=(1, 2)),
    "norm, nuclear": lambda: torch.norm(A[0], p="nuc"),
    "linalg": lambda: torch.linalg.norm(A),
    "linalg, Frobenius": lambda: torch.linalg.norm(A, dim=(1, 2)),
    "linalg, spectral": lambda: torch.linalg.norm(A, ord=2, dim=(1, 2)),
    "linalg, matrix of two axes": lambda: torch.linalg.norm(A[0], 2),
    "linalg, vector": lambda: torch.linalg.norm(A[0, 0], 2),
    "linalg, axis": lambda: torch.linalg.norm(A, 2, -1, True),
    "linalg, as in NumPy": lambda: torch.linalg.norm(a=A, axis=1, keepdims=True),
    "linalg, by name": lambda: torch.linalg.norm(input=A, ord=1, dim=(0, 1)),
    "vector, as in NumPy": lambda: torch.linalg.vector_norm(x=A, axis=(0, 2), keepdims=True),
    "vector, by name": lambda: torch.linalg.vector_norm(input=A, dim=-1, out=torch.empty(4, 5).double()),
    "matrix, by name": lambda: torch.linalg.matrix_norm(input=A),
    "squares, by name": lambda: torch.square(input=A) + torch.square(x=A.norm(dim=-1, keepdim=True)),
    "squares, elsewhere": lambda: torch.square(A.abs(), out=torch.empty_like(A)),
    "powers, by name": lambda: torch.pow(input=A, exponent=2) + A.abs().pow(exponent=3),
    "products, by name": lambda: torch.mul(input=A, other=A) + A.abs().mul(x2=B) + torch.multiply(x1=A, other=2),
    "weight norm, by name": lambda: torch._weight_norm(v=A, g=B[:1, :1, :], dim=2),
    "vector": lambda: torch.linalg.vector_norm(A, dim=-1),
    "vector, wider": lambda: torch.linalg.vector_norm(A.float(), dim=(-1, 0), dtype=torch.float64),
    "vector, largest": lambda: torch.linalg.vector_norm(A, float("inf")),
    "normalize": lambda: F.normalize(A),
    "normalize, axes": lambda: F.normalize(A, dim=(0, 2)),
    "normalize, 1": lambda: F.normalize(A, p=1),
    "normalize, eps": lambda: F.normalize(A, dim=-1, eps=3.0),
    "similarity": lambda: F.cosine_similarity(A, B),
    "similarity, broadcast": lambda: F.cosine_similarity(A, B[0], dim=-1, eps=2.0),
    "hard sigmoid": lambda: F.hardsigmoid(4 * A),
    "hard sigmoid, in place": lambda: (lambda x: (F.hardsigmoid(x, inplace=True), x))(4 * A),
    "embedding": lambda: F.embedding(torch.tensor([[0, 3], [1, 0]]), A[0], padding_idx=0, scale_grad_by_freq=True),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_values_are_those_of_torch(call):
    expected = call()
    with plain_calls():
        found = call()
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def _hessian(function, at):
    with plain_calls():
        return torch.autograd.functional.hessian(function, at)


def test_second_derivatives_at_zero_are_those_of_the_function():
    # Below eps both are linear: x / eps, and x·y / (eps ‖y‖).
    zero, y = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    square = lambda z: (z * y).sum() ** 2  # noqa: E731
    expected = 2 * torch.outer(y, y)
    torch.testing.assert_close(_hessian(lambda x: square(F.normalize(x, dim=0, eps=0.5)), zero), expected * 4)
    similar = lambda x: F.cosine_similarity(x, y, dim=0, eps=0.5) ** 2  # noqa: E731
    torch.testing.assert_close(_hessian(similar, zero), expected * 4 / 9)
    # Elsewhere nothing changes: ‖x‖ has I/‖x‖ − xxᵀ/‖x‖³.
    expected = torch.eye(3).double() / 3 - torch.outer(y, y) / 27
    for norm in (torch.norm, torch.linalg.norm, torch.linalg.vector_norm, lambda x: x.norm(dim=0)):
        torch.testing.assert_close(_hessian(norm, y), expected)
        assert _hessian(lambda x, norm=norm: norm(x * 0) + x.pow(2).sum(), y).equal(2 * torch.eye(3).double())


def test_gradient_options_of_an_embedding_do_not_matter():
    tokens = torch.tensor([0, 0, 1, 2])
    weight = torch.randn(4, 2, dtype=torch.float64)
    expected = 2 * torch.bincount(tokens, minlength=4)[:, None] * weight
    for options in ({"padding_idx": 0}, {"padding_idx": -3}, {"scale_grad_by_freq": True}, {"sparse": True}):
        leaf = weight.clone().requires_grad_()
        with plain_calls():
            (F.embedding(tokens, leaf, **options) ** 2).sum().backward()
        assert not leaf.grad.is_sparse
        torch.testing.assert_close(leaf.grad, expected)


class Blocks(nn.Module):
    """Two blocks that read buffers, called plainly or in each of the ways in which people checkpoint."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("gain", torch.tensor(1.5))

    def forward(self, x):
        blocks = [lambda h: torch.tanh(self.gain * self.first(h)), lambda h: self.second(h) ** 2]
        if self.way == "sequential":
            return checkpoint_sequential(blocks, 2, x, use_reentrant=False)
        for block in blocks:
            x = block(x) if self.way is None else checkpoint(block, x, use_reentrant=self.way == "reentrant")
        return x


@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "sequential"])
def test_a_checkpointed_network_is_that_network(way):
    torch.manual_seed(0)
    plain, network = Blocks(None).double(), Blocks(way).double()
    network.load_state_dict(plain.state_dict())
    batch = (torch.randn(9, 4).double().requires_grad_(), torch.arange(9) % 3)
    expected = HessianOperator(Objective(plain, [batch])).to_dense()
    with warnings.catch_warnings():
        # torch warns of reentrant checkpoints of what requires no gradient, as in every evaluation without.
        warnings.simplefilter("error")
        objective = Objective(network, [batch])
        torch.testing.assert_close(HessianOperator(objective).to_dense(), expected)
        assert objective.loss() == pytest.approx(Objective(plain, [batch]).loss())
        measured = measure_barrier(network, Blocks(way).double(), [batch], alphas=3, progress=False)
        assert measured.ends()[0] == pytest.approx(objective.loss())
    # torch's own are in place again.
    loss = F.cross_entropy(network(batch[0]), batch[1])
    names, pending = set(), [loss.grad_fn]
    while pending:
        node = pending.pop()
        names.add(type(node).__name__)
        pending += [following for following, _ in node.next_functions if following is not None]
    assert ("CheckpointFunctionBackward" in names) == (way == "reentrant")


def test_compiled_functions_are_called_as_they_were():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = copy.deepcopy(plain[0]), copy.deepcopy(plain[2])
            self.function = torch.compile(torch.tanh, backend="eager")

        def forward(self, x):
            return self.last(self.function(self.first(x)))

    batch = (torch.randn(9, 4).double(), torch.arange(9) % 3)
    expected = HessianOperator(Objective(plain, [batch])).to_dense()
    torch.testing.assert_close(HessianOperator(Objective(Compiled(), [batch])).to_dense(), expected)


_WEIGHTS = torch.tensor([[1.0, 2.0, 0.5], [3.0, 1.0, 2.0]], dtype=torch.float64)
_POINTS = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]], dtype=torch.float64)
# A square of lengths, and the same without them.
SQUARES = {
    "power of a norm": (lambda x: x.norm() ** 2, lambda x: (x * x).sum()),
    "pow of a norm, axis": (lambda x: torch.norm(x, dim=1).pow(2).sum(), lambda x: (x * x).sum()),
    "square, axes kept": (
        lambda x: (torch.linalg.vector_norm(x, dim=1, keepdim=True).square() * _WEIGHTS).sum(),
        lambda x: ((x * x).sum(1, keepdim=True) * _WEIGHTS).sum(),
    ),
    "by name": (
        lambda x: torch.pow(input=torch.linalg.norm(x=x, axis=1, keepdims=True), exponent=2).sum(),
        lambda x: (x * x).sum(),
    ),
    "square by name": (lambda x: torch.square(input=torch.linalg.vector_norm(input=x)), lambda x: (x * x).sum()),
    "product by name": (
        lambda x: (lambda n: torch.multiply(input=n, other=n))(torch.abs(input=x)).sum(),
        lambda x: (x * x).sum(),
    ),
    "product with itself": (lambda x: (lambda n: n * n)(torch.linalg.norm(x)), lambda x: (x * x).sum()),
    "square of a function": (
        lambda x: (x @ _WEIGHTS.T).norm(dim=-1).pow(2.0).sum(),
        lambda x: ((x @ _WEIGHTS.T) ** 2).sum(),
    ),
    "matrix": (lambda x: torch.linalg.matrix_norm(x.T) ** 2, lambda x: (x * x).sum()),
    "absolute value": (lambda x: (x.abs() ** 2 * _WEIGHTS).sum(), lambda x: (x * x * _WEIGHTS).sum()),
    "complex": (
        lambda x: torch.complex(x, x @ torch.eye(3).double().roll(1, 0)).abs().square().sum(),
        lambda x: 2 * (x * x).sum(),
    ),
    "spectral power": (
        lambda x: (torch.fft.rfft(x).abs() ** 2).sum(),
        lambda x: torch.view_as_real(torch.fft.rfft(x)).square().sum(),
    ),
    "distances": (
        lambda x: torch.cdist(x, _POINTS).pow(2).exp().neg().exp().sum(),
        lambda x: (x[:, None] - _POINTS).square().sum(-1).exp().neg().exp().sum(),
    ),
    "many distances": (
        lambda x: torch.cdist(x.repeat(13, 1), _POINTS).pow(2).neg().exp().sum(),
        lambda x: 13 * (x[:, None] - _POINTS).square().sum(-1).neg().exp().sum(),
    ),
    "pairs": (
        lambda x: torch.pdist(torch.cat([x, _POINTS])).square().cos().sum(),
        lambda x: torch.stack(
            [(p - q).square().sum().cos() for i, p in enumerate([*x, *_POINTS]) for q in [*x, *_POINTS][i + 1 :]]
        ).sum(),
    ),
    "a distance": (lambda x: torch.dist(x, _POINTS) ** 2, lambda x: (x - _POINTS).square().sum()),
}


@pytest.mark.parametrize(("call", "written_out"), SQUARES.values(), ids=SQUARES)
def test_squares_of_lengths_have_their_curvature_at_zero(call, written_out):
    torch.testing.assert_close(_hessian(call, _POINTS), _hessian(written_out, _POINTS))
    with plain_calls():
        torch.testing.assert_close(call(_WEIGHTS), call(_WEIGHTS.clone()))
    torch.testing.assert_close(call(_WEIGHTS), written_out(_WEIGHTS))


def test_powers_of_what_is_no_length_any_more_stay():
    x = torch.tensor([3.0, -4.0], dtype=torch.float64)
    with plain_calls():
        for change in (lambda x, n: x.zero_(), lambda x, n: n.add_(1.0)):
            for length_of in (torch.linalg.norm, lambda other: torch.linalg.vector_norm(x=other)):
                other = x.clone()
                length = length_of(other)
                change(other, length)
                assert length**2 == length.item() ** 2
        assert x.norm() ** 3 == 125
        assert x.norm(1) ** 2 == 49
        assert torch.pow(2.0, x.abs()).tolist() == [8, 16]
        assert (x.abs() * x).tolist() == [9, -16]


def test_squared_distances_of_many_points_are_never_negative():
    generator = torch.Generator().manual_seed(0)
    points = 4 * torch.randn(3, 40, 8, generator=generator)
    with plain_calls():
        squares = torch.cdist(points, points).pow(2)
        assert torch.equal(squares, squares.clamp_min(0))
    # Rounding has a part in it: without the clamp some would be.
    assert ((points.square().sum(-1)[..., None] + points.square().sum(-1)[:, None]) - 2 * points @ points.mT).min() < 0
    exact = (points[:, :, None] - points[:, None]).square().sum(-1)
    torch.testing.assert_close(squares, exact, rtol=1e-5, atol=1e-3)


def test_squared_distances_that_are_zero_by_rounding_have_their_derivatives():
    generator = torch.Generator().manual_seed(0)
    points = 4 * torch.randn(40, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(40, 40, generator=generator, dtype=torch.float64)

    def distances(shift):
        return (weights * (torch.cdist(points + shift, points).pow(2) + 0.5).sqrt()).sum()

    def written_out(shift):
        squares = (points[:, None] + shift - points).square().sum(-1)
        return (weights * (squares + 0.5).sqrt()).sum()

    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(_hessian(distances, zero), _hessian(written_out, zero), rtol=1e-9, atol=1e-9)


class _InPlace(nn.Module):
    """Uses a hard sigmoid for what it does to its argument."""

    def __init__(self, inplace):
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(4, 6), nn.Linear(6, 3), nn.Hardsigmoid(inplace=inplace)

    def forward(self, x):
        hidden = self.a(x)
        gated = self.gate(hidden)
        return self.b(hidden if self.gate.inplace else gated)


def test_a_hard_sigmoid_in_place_is_the_same_network():
    torch.manual_seed(0)
    plain, network = _InPlace(False).double(), _InPlace(True).double()
    network.load_state_dict(plain.state_dict())
    batches = [(torch.randn(9, 4).double(), torch.arange(9) % 3)]
    found, expected = (HessianOperator(Objective(each, batches)).to_dense() for each in (network, plain))
    torch.testing.assert_close(found, expected)
    assert Objective(network, batches).loss() == pytest.approx(
        F.cross_entropy(network(batches[0][0]), batches[0][1]).item(), rel=1e-12
    )
    other = _InPlace(True).double()
    found, expected = (predict_barrier(each, other, batches).curve([0.0, 0.3, 1.0]) for each in (network, plain))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


class _Encoder(nn.Module):
    """Transformer layers of torch over sequences of which a part is padding, and a mean over all positions."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, activation="gelu")
        self.layers, self.last = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.layers(x, src_key_padding_mask=(x == 0).all(-1)).mean(1))


def test_transformers_are_one_function_with_gradients_and_without():
    torch.manual_seed(0)
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    padded = x.clone()
    padded[:, 3:] = 0
    y = torch.arange(6) % 3
    # The first batch has no padding, so that it tells nothing.
    for batches in ([(x, y), (padded, y)], [(padded, y)]):
        network = _Encoder().double().eval()
        own = [F.cross_entropy(network(inputs), y).item() for inputs, _ in batches]
        assert torch.backends.mha.get_fastpath_enabled()
        assert Objective(network, batches).loss() == pytest.approx(sum(own) / len(own), rel=1e-12)
        assert torch.backends.mha.get_fastpath_enabled()


def test_weights_that_parametrizations_keep_are_not_used_at_other_states():
    torch.manual_seed(0)
    network = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)).double()
    objective = Objective(network, [(torch.randn(9, 4).double(), torch.arange(9) % 3)])
    other = {name: tensor + 0.3 for name, tensor in objective.state().items()}
    expected = objective.loss(), objective.loss(other), HessianOperator(objective).to_dense()
    with parametrize.cached():
        network(torch.randn(2, 4).double())
        objective = Objective(network, objective.loader)
        found = objective.loss(), objective.loss(other), HessianOperator(objective).to_dense()
        assert parametrize._cache_enabled == 1
    torch.testing.assert_close(found, expected)


def test_blocks_that_overlap_between_threads_leave_torch_as_it_was():
    before = torch.utils.checkpoint.CheckpointFunction, torch.backends.mha.get_fastpath_enabled()
    first, second = one_function(), one_function()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.utils.checkpoint.CheckpointFunction is not before[0]
    second.__exit__(None, None, None)
    assert (torch.utils.checkpoint.CheckpointFunction, torch.backends.mha.get_fastpath_enabled()) == before
