"""Claim: tangents of selected elements are those at the same places, also where two elements are equal."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.rules import RuleTests, at_zero

VECTOR, SEQUENCE, LINE, IMAGE, VOLUME = (6,), (4, 6), (2, 9), (2, 5, 6), (2, 3, 4, 4)


class TestSelections(RuleTests):
    operations: ClassVar = {
        "largest": (lambda x: x.max(-1)[0], SEQUENCE),
        "smallest, axis kept": (lambda x: x * x.min(1, keepdim=True)[0], SEQUENCE),
        "largest two": (lambda x: x.topk(2)[0], SEQUENCE),
        "sorted": (lambda x: x.sort(-1, descending=True)[0], SEQUENCE),
        "sorted by places": (lambda x: x.gather(-1, x.argsort(-1)), SEQUENCE),
        "median": (lambda x: x.median(-1)[0], SEQUENCE),
        "second smallest": (lambda x: x.kthvalue(2, 1)[0], SEQUENCE),
        "cumulative maximum": (lambda x: x.cummax(-1)[0], SEQUENCE),
        "chunks": (lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1], SEQUENCE),
        "split": (lambda x: x.split([1, 3], 1)[1], SEQUENCE),
        "unbound": (lambda x: x.unbind(1)[2] * x.unbind(1)[0], SEQUENCE),
    }


class TestMaxPoolings(RuleTests):
    operations: ClassVar = {
        **{
            f"{name} {axes}d": (getattr(nn, f"{name}{axes}d")(2), shape)
            for axes, shape in ((1, LINE), (2, IMAGE), (3, VOLUME))
            for name in ("MaxPool", "AdaptiveMaxPool")
        },
        "max pool, overlapping": (nn.MaxPool2d(3, stride=1, padding=1), IMAGE),
        "max pool, dilated": (nn.MaxPool2d(2, dilation=2, ceil_mode=True, padding=1), IMAGE),
        "adaptive max pool to one": (nn.AdaptiveMaxPool2d(1), IMAGE),
        "fractional max pool": (
            nn.FractionalMaxPool2d(2, output_size=3, _random_samples=torch.full((3, 2, 2), 0.4, dtype=torch.float64)),
            IMAGE,
        ),
        "fractional max pool of volumes": (
            nn.FractionalMaxPool3d(2, output_size=2, _random_samples=torch.full((3, 1, 3), 0.4, dtype=torch.float64)),
            (1, 4, 4, 4),
        ),
        "unpooled": (
            lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2, output_size=(5, 6)),
            IMAGE,
        ),
    }


class TestTies(RuleTests):
    """Selections among elements of which several are zero."""

    operations: ClassVar = {
        name: (at_zero(function), VECTOR)
        for name, function in {
            "max": lambda x: x.max(-1, keepdim=True)[0],
            "median": lambda x: x.median(-1, keepdim=True)[0],
            "sort": lambda x: x.sort(-1)[0],
            "max pool": lambda x: F.max_pool1d(x.unsqueeze(1), 2),
        }.items()
    }
