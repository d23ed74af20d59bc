"""Claim: what torch differentiates wrongly is written out: the same values, with the derivatives of the function."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lmc_curvature import HessianOperator, Objective, measure_barrier
from lmc_curvature.objective.differentiable import plain_calls

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
