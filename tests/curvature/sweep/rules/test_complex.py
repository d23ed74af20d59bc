"""Claim: complex numbers on the way from real ones to real ones are swept exactly."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from lmc_curvature import Objective
from tests.support.networks import randomized
from tests.support.rules import RuleTests
from tests.support.sweeping import TwoLayers, around, assert_sweep_agrees, vectors

VECTOR, SEQUENCE, IMAGE, SQUARE = (6,), (4, 6), (2, 5, 6), (3, 3)


def _parts(z):
    return torch.cat([z.real, z.imag], -1)


def _assigned(z):
    result = torch.zeros_like(z)
    result[:, 1:3] = z[:, 2:4]
    result[:, -1] = z[:, 0].conj()
    return result


class TestLinear(RuleTests):
    """Transforms, and parts of complex numbers."""

    operations: ClassVar = {
        "transform and back": (lambda x: torch.fft.irfft(torch.fft.rfft(x), n=6) * x, VECTOR),
        "squared modulus": (lambda x: torch.fft.rfft(x).abs() ** 2, VECTOR),
        "real and imaginary parts": (lambda x: _parts(torch.fft.fft(x)), VECTOR),
        "of images": (lambda x: _parts(torch.fft.rfft2(x, norm="ortho")), IMAGE),
        "as real numbers": (lambda x: torch.view_as_real(torch.fft.fft2(x)), SEQUENCE),
        "conjugate": (lambda x: _parts(torch.fft.fft(x).conj().resolve_conj()), VECTOR),
        "real part of what is turned": (lambda x: torch.fft.fft2(x).mT.flip(1).real, SEQUENCE),
        "some of them": (lambda x: _parts(torch.fft.fft(x)[:, [0, 2, 2]].roll(1, 1)), VECTOR),
        "Hermitian": (lambda x: torch.fft.hfft(torch.fft.ihfft(x), n=6) + x, VECTOR),
        "of two": (lambda a, b: _parts(torch.fft.fft(torch.complex(a, b))), VECTOR, VECTOR),
    }


def _weighed(x, w):
    frequencies, weights = torch.fft.rfft(x), torch.view_as_complex(w.unflatten(1, (4, 2)))
    return torch.fft.irfft(frequencies * weights, n=6)


def _mixed(x, w):
    weights = torch.view_as_complex(w[0].view(2, 2, 2))
    mixed = torch.zeros(3, 2, 4, dtype=torch.complex128)
    mixed[..., :3] = torch.einsum("bik,io->bok", torch.fft.rfft(x)[..., :3], weights)
    return torch.fft.irfft(mixed, n=6)


class TestByAutodiff(RuleTests):
    """Products and functions of complex numbers, and sums of them."""

    operations: ClassVar = {
        "frequencies, weighed": (_weighed, VECTOR, (8,)),
        "frequencies, mixed": (_mixed, (2, 6), (8,)),
        "real times complex": (lambda a, b: _parts(a * torch.fft.fft(b)), VECTOR, VECTOR),
        "correlation": (
            lambda a, b: torch.fft.irfft(torch.fft.rfft(a) * torch.fft.rfft(b).conj(), n=6),
            VECTOR,
            VECTOR,
        ),
        "modulus": (lambda x: torch.fft.rfft(x).abs(), VECTOR),
        "assigned": (lambda x: _parts(_assigned(torch.fft.fft(x))), VECTOR),
        "cut and back": (lambda x: torch.fft.irfft(torch.fft.rfft(x)[:, :3], n=6), VECTOR),
        "angle": (lambda x: torch.fft.fft(x)[:, 1:3].angle(), VECTOR),
        "sign": (lambda x: _parts(torch.fft.fft(x).sgn()), VECTOR),
        "sum": (lambda a, b: _parts(torch.fft.fft(a) + 2j * torch.fft.fft(b) - a), VECTOR, VECTOR),
        "quotient": (lambda a, b: _parts(torch.fft.fft(a) / (torch.fft.fft(b) + 3j)), VECTOR, VECTOR),
        "quotient of numbers": (lambda a, b: _parts(torch.complex(a, b) / (1 + b * b)), VECTOR, VECTOR),
        "exponential": (lambda a, b: _parts(torch.exp(torch.complex(-a * a, b))), VECTOR, VECTOR),
        "polar": (lambda a, b: _parts(torch.polar(F.softplus(a), b)), VECTOR, VECTOR),
        "hyperbolic tangent": (lambda a, b: _parts(torch.tanh(torch.complex(a, 0.3 * b))), VECTOR, VECTOR),
        "matrix product": (lambda a, b: _parts(torch.complex(a, b) @ torch.complex(b, a)), SQUARE, SQUARE),
        "product with a matrix": (lambda a, b: _parts(torch.complex(a, b) @ torch.eye(6).cdouble()), VECTOR, VECTOR),
        "concatenation": (lambda a, b: _parts(torch.cat([torch.fft.fft(a), torch.fft.ifft(b)], 1)), VECTOR, VECTOR),
        "where": (lambda a, b: _parts(torch.where(a > 0, torch.fft.fft(a), b.cdouble())), VECTOR, VECTOR),
        "variance": (lambda x: torch.fft.fft(x).var(1, keepdim=True), VECTOR),
    }
    by_autodiff = True


def test_a_complex_output():
    class Complex(TwoLayers):
        def forward(self, x):
            return torch.fft.rfft(super().forward(x))

    def loss(output, target):
        return (output - target[:, None]).abs().square().mean()

    assert_sweep_agrees(Objective(randomized(Complex().double()), vectors(4, 4, 3), loss_fn=loss))


@pytest.mark.parametrize("function", [lambda x: x, torch.tanh])
def test_tiles_of_a_network_with_complex_numbers(function):
    assert_sweep_agrees(around(lambda x: torch.fft.rfft(function(x)).abs(), VECTOR, sizes=(20, 20)))
