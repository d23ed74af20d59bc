"""Claim: functions of each element are swept exactly, at their kinks as torch differentiates them."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.support.rules import RuleTests, at_zero

VECTOR, SEQUENCE, LINE, IMAGE, VOLUME = (6,), (4, 6), (2, 9), (2, 5, 6), (2, 3, 4, 4)


class TestActivations(RuleTests):
    operations: ClassVar = {
        str(module): (module, VECTOR)
        for module in (
            nn.ReLU(),
            nn.ReLU(inplace=True),
            nn.LeakyReLU(0.1),
            nn.RReLU(),
            nn.ReLU6(),
            nn.ELU(),
            nn.ELU(0.7, inplace=True),
            nn.SELU(),
            nn.CELU(0.7),
            nn.Hardswish(),
            nn.Hardsigmoid(),
            nn.Hardtanh(),
            nn.Softplus(),
            nn.Softplus(3.0, threshold=0.5),
            nn.Mish(),
            nn.Threshold(0.1, 0.2),
            nn.GELU(),
            nn.GELU("tanh"),
            nn.SiLU(),
            nn.SiLU(inplace=True),
            nn.Tanh(),
            nn.Sigmoid(),
            nn.Softsign(),
            nn.Softshrink(0.2),
            nn.Hardshrink(0.2),
            nn.Tanhshrink(),
        )
    }


def _positive(function):
    return lambda x: function(F.softplus(x) + 0.1)


def _inside(function):
    return lambda x: function(0.9 * torch.tanh(x))


class TestFunctions(RuleTests):
    operations: ClassVar = {
        **{
            function.__name__: (function, VECTOR)
            for function in (
                *(torch.exp, torch.exp2, torch.expm1, torch.sin, torch.cos, torch.tan, torch.atan, torch.sinh),
                *(torch.cosh, torch.asinh, torch.erf, torch.erfc, torch.tanh, torch.sigmoid, torch.square, torch.sinc),
                *(torch.reciprocal, torch.abs, torch.frac),
            )
        },
        **{
            function.__name__: (_positive(function), VECTOR)
            for function in (
                *(torch.log, torch.log1p, torch.log2, torch.sqrt, torch.rsqrt, torch.lgamma, torch.digamma),
            )
        },
        **{
            function.__name__: (_inside(function), VECTOR)
            for function in (torch.asin, torch.acos, torch.atanh, torch.erfinv)
        },
        "acosh": (lambda x: torch.acosh(x * x + 1.2), VECTOR),
        "logit": (lambda x: torch.logit(torch.sigmoid(x), eps=1e-3), VECTOR),
        "power": (lambda x: x**3, VECTOR),
        "fractional power": (_positive(lambda x: x**1.7), VECTOR),
        "remainder": (lambda x: torch.remainder(x, 0.7), VECTOR),
        "clamped": (lambda x: x.clamp(-0.3, 0.4), VECTOR),
        "clamped below": (lambda x: x.clamp_min(0.1), VECTOR),
        "checkpointed": (lambda x: checkpoint(torch.sin, x, use_reentrant=False), VECTOR),
        "changed in place": (lambda x: (2 * x).add_(1).relu_() * x, VECTOR),
        **{
            f"LPPool {axes}d": (getattr(nn, f"LPPool{axes}d")(2, 2), shape)
            for axes, shape in ((1, LINE), (2, IMAGE), (3, VOLUME))
        },
        "cubic pool of positive numbers": (lambda x: F.lp_pool2d(x.exp(), 3.0, 2), IMAGE),
    }


class TestKinks(RuleTests):
    """Functions at places where they have no derivative."""

    operations: ClassVar = {
        name: (at_zero(function), VECTOR)
        for name, function in {
            "relu": F.relu,
            "relu6": F.relu6,
            "leaky relu": F.leaky_relu,
            "elu": F.elu,
            "hard tanh": lambda x: F.hardtanh(x, 0.0, 1.0),
            "hard swish": lambda x: F.hardswish(x - 3),
            "hard sigmoid": lambda x: F.hardsigmoid(x + 3),
            "soft shrink": lambda x: F.softshrink(x + 0.5),
            "abs": torch.abs,
            "clamp": lambda x: x.clamp(0, 1),
        }.items()
    }
