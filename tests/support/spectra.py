"""Symmetric matrices of which the spectrum is known, and small real networks."""

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn

from lmc_curvature import HessianOperator, Objective


def symmetric(values, seed=0, dtype=torch.float64):
    """A dense matrix with the given eigenvalues, and random eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return ((vectors * values) @ vectors.T).to(dtype)


def spread(n, *outliers):
    """A bulk between -1 and 1, and some eigenvalues above it."""
    return torch.cat([torch.linspace(-1, 1, n - len(outliers)), torch.tensor(outliers)]).double()


def network_like(n):
    """Most eigenvalues near zero, on both sides, and a few far outside."""
    bulk = torch.linspace(-1, 1, n - 6, dtype=torch.float64) ** 5
    return torch.cat([bulk, torch.tensor([3.0, 3.5, 5.0, 8.0, 15.0, 30.0], dtype=torch.float64)])


class Counted:
    """A diagonal matrix that counts the calls and the products it is asked for."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, values):
        self.values = torch.as_tensor(values, dtype=torch.float64)
        self.shape, self.calls, self.products = (len(self.values),) * 2, 0, 0

    def matmat(self, matrix):
        self.calls, self.products = self.calls + 1, self.products + matrix.shape[1]
        return self.values[:, None] * matrix.double()


@functools.cache
def digits_objective(dtype=torch.float64):
    """A perceptron after some training on handwritten digits, with two uneven batches of them."""
    images, targets = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images[:96]).to(dtype) / 16, torch.from_numpy(targets[:96])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10)).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return Objective(model, [(x[:64], y[:64]), (x[64:], y[64:])])


def digits_hessian(dtype=torch.float64):
    """The Hessian of that network, 460 × 460."""
    return HessianOperator(digits_objective(dtype))


@functools.cache
def digits_dense():
    """The same as a dense matrix in float64."""
    return digits_hessian().to_dense()
