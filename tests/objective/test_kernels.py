"""Convolutions that oneDNN gets wrong; with the fault a process may end, so one of theirs is not asked for here."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import GGNOperator, HessianOperator, Objective, project_hessian
from lmc_curvature.forking.numerics import fastest_layout
from lmc_curvature.forking.sharing import cpu_threads
from lmc_curvature.objective.differentiable import plain_calls
from lmc_curvature.objective.kernels import has_wrong_kernel


def _network(channels, kernel=1, stride=2, groups=1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(channels, 2 * channels, kernel, stride=stride, groups=groups),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 5),
    ).to(memory_format=torch.channels_last)


def _loader(dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 8, 8, generator=generator).to(dtype, memory_format=torch.channels_last)
    return [(images, torch.randint(5, (12,), generator=generator))]


@pytest.mark.parametrize(
    ("network", "is_wrong"),
    [
        (_network(4), True),
        (_network(8, stride=(1, 3)), True),
        (_network(32, groups=4), True),
        (_network(16), False),
        (_network(4, stride=1), False),
        (_network(4, kernel=3), False),
        (nn.Linear(3, 3), False),
    ],
)
def test_convolutions_that_are_wrong_are_known(network, is_wrong):
    assert any(map(has_wrong_kernel, network.modules())) == is_wrong
    with cpu_threads(1):
        assert fastest_layout(network, "float32") == (torch.contiguous_format if is_wrong else torch.channels_last)


@pytest.mark.check
@pytest.mark.parametrize("threads", [1, 2])
def test_their_curvature_is_right(threads):
    found = {}
    with cpu_threads(threads):
        for dtype in (torch.float32, torch.float64):
            objective = Objective(_network(4).to(dtype), _loader(dtype))
            vector = torch.randn(HessianOperator(objective).shape[1], generator=torch.Generator().manual_seed(1))
            direction = objective.place(HessianOperator(objective).unflatten(vector.to(dtype)))
            found[dtype] = (
                *(operator(objective) @ vector.to(dtype) for operator in (HessianOperator, GGNOperator)),
                *objective.gradient().values(),
                torch.as_tensor(project_hessian(objective, {}, [direction]).curvature),
            )
    for single, double in zip(*found.values(), strict=True):
        torch.testing.assert_close(single.double(), double.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("stride", "padding", "groups", "by_name"),
    [*itertools.product([2, (2, 3), [3]], [0, "valid", (0, 0)], [1, 2], [False, True])],
)
def test_they_are_the_same_convolutions(stride, padding, groups, by_name):
    generator = torch.Generator().manual_seed(0)
    images, weight = (
        torch.randn(2, 4, 7, 9, generator=generator),
        torch.randn(6, 4 // groups, 1, 1, generator=generator),
    )
    bias = torch.randn(6, generator=generator)
    expected = F.conv2d(images, weight, bias, stride, padding, 1, groups)
    with plain_calls():
        found = (
            F.conv2d(input=images, weight=weight, bias=bias, stride=stride, padding=padding, groups=groups)
            if by_name
            else F.conv2d(images, weight, bias, stride, padding, 1, groups)
        )
    torch.testing.assert_close(found, expected)
