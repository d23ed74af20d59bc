"""Claim: operations that are linear, or constant, pass tangents on exactly and contribute no curvature."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.rules import RuleTests
from tests.support.sweeping import around, assert_sweep_agrees

VECTOR, SEQUENCE, LINE, IMAGE, VOLUME = (6,), (4, 6), (2, 9), (2, 5, 6), (2, 3, 4, 4)
SQUARE = (3, 3)


class TestShapes(RuleTests):
    """Views, selections by place, and what is put together from parts."""

    operations: ClassVar = {
        "sliced": (lambda x: x[:, 1:, ::2], SEQUENCE),
        "selected": (lambda x: x[:, -1], SEQUENCE),
        "indexed by a list": (lambda x: x[:, [0, 2, 2]], SEQUENCE),
        "indexed by places": (lambda x: x[:, torch.tensor([0, 1]), torch.tensor([3, 4])], SEQUENCE),
        "indexed by a mask": (lambda x: x[:, torch.tensor([True, False, True, True])], SEQUENCE),
        "index_select": (lambda x: x.index_select(1, torch.tensor([0, 0, 3])), SEQUENCE),
        "gather": (lambda x: x.gather(1, torch.tensor([[0, 1, 1], [5, 5, 2], [3, 0, 4]])), VECTOR),
        "take": (lambda x: torch.take(x, torch.arange(9).view(3, 3)), VECTOR),
        "permuted": (lambda x: x.permute(0, 2, 1).reshape(x.shape[0], -1), SEQUENCE),
        "transposed": (lambda x: x.mT.contiguous().view(x.shape[0], -1), SEQUENCE),
        "flipped and rolled": (lambda x: x.flip(1).roll(1, 2), SEQUENCE),
        "repeated": (lambda x: x.repeat(1, 2, 1), SEQUENCE),
        "repeated one by one": (lambda x: x.repeat_interleave(2, 1), SEQUENCE),
        "expanded": (lambda x: x.unsqueeze(1).expand(-1, 3, -1), VECTOR),
        "diagonal": (lambda x: x.diagonal(dim1=1, dim2=2), SQUARE),
        "diagonal matrix": (torch.diag_embed, VECTOR),
        "triangles": (lambda x: x.tril() + x.triu(1) ** 2, SQUARE),
        "trace": (lambda x: torch.stack([matrix.trace() for matrix in x]).unsqueeze(1), SQUARE),
        "windows": (lambda x: x.unfold(1, 3, 2), VECTOR),
        "unfold": (nn.Unfold(2), IMAGE),
        "fold": (nn.Fold((3, 3), 2), (8, 4)),
        "pixel shuffle": (nn.PixelShuffle(2), (4, 2, 3)),
        "pixel unshuffle": (nn.PixelUnshuffle(2), (1, 4, 6)),
        "channel shuffle": (nn.ChannelShuffle(2), (4, 2, 3)),
        **{
            f"{mode} padding": (lambda x, mode=mode: F.pad(x, (1, 1, 2, 0), mode=mode), IMAGE)
            for mode in ("constant", "reflect", "replicate", "circular")
        },
        "constant padding of lines, cropping": (lambda x: F.pad(x, (-1, 1), value=0.3), LINE),
        "reflection padding of volumes": (lambda x: F.pad(x, (1, 1, 1, 1, 1, 1), mode="reflect"), VOLUME),
        "replication padding of lines": (lambda x: F.pad(x, (1, 1), mode="replicate"), LINE),
        "with what is new": (lambda x: torch.cat([x.new_zeros(3, 1), torch.ones_like(x), x], 1), VECTOR),
        "concatenation": (lambda a, b: torch.cat([a, b * a, torch.ones_like(a)], 1), VECTOR, VECTOR),
        "stack": (lambda a, b: torch.stack([a, b, a * b], 1), VECTOR, VECTOR),
    }


class TestSums(RuleTests):
    """Sums, means, and multiples of numbers."""

    operations: ClassVar = {
        "neg": (torch.neg, VECTOR),
        "quotient by a number": (lambda x: x / 3, VECTOR),
        "quotient by whole numbers": (lambda x: x / torch.arange(1, 7), VECTOR),
        "mean": (lambda x: x.mean(1), SEQUENCE),
        "cumulative sum": (lambda x: x.cumsum(-1), SEQUENCE),
        "differences": (lambda x: x.diff(), SEQUENCE),
        "residual": (lambda a, b: a + torch.tanh(b), VECTOR, VECTOR),
        "weighted sum": (lambda a, b: 2 - a + 3 * b.sub(a, alpha=2).add(a * b, alpha=3), VECTOR, VECTOR),
        "reversed difference": (lambda a, b: torch.rsub(a, b, alpha=2) * b, VECTOR, VECTOR),
        "lerp": (lambda a, b: torch.lerp(a, b, 0.3) * b, VECTOR, VECTOR),
        "dropout": (nn.Dropout(0.5), VECTOR),
    }


def _assigned(a, b):
    result = a.clone()
    result[:, 1] = b[:, 0] * a[:, 2]
    result[:, 2:4] *= b[:, :2]
    result += 1
    result[:, 5] = 0.3
    return result


_PLACES = torch.tensor([0, 1, 1, 3, 5, 0])


class TestAssignments(RuleTests):
    """Elements of one tensor among those of another."""

    operations: ClassVar = {
        "where": (lambda a, b: torch.where(a > b, a, b * b), VECTOR, VECTOR),
        "where, a number elsewhere": (lambda a, b: torch.where(a > 0, a, 0.5) * b, VECTOR, VECTOR),
        "masked_fill": (lambda a, b: a.masked_fill(b > 0, 0.3) * b, VECTOR, VECTOR),
        "masked_fill by a tensor": (lambda a, b: a.masked_fill(b > 0, b.mean()) * b, VECTOR, VECTOR),
        "masked_scatter": (lambda a, b: a.masked_scatter(torch.arange(6) % 2 == 0, b * b), VECTOR, VECTOR),
        "assignment": (_assigned, VECTOR, VECTOR),
        "scatter": (lambda a, b: (a * a).scatter(1, torch.tensor([[0, 1, 2]] * 3), b[:, :3]), VECTOR, VECTOR),
        "scatter_add": (lambda a, b: (a * a).scatter_add(1, _PLACES.expand(3, -1), b), VECTOR, VECTOR),
        "index_add": (lambda a, b: (a * a).index_add(1, _PLACES, b, alpha=0.5), VECTOR, VECTOR),
        "index_copy": (lambda a, b: (a * a).index_copy(1, torch.tensor([0, 4]), b[:, :2]), VECTOR, VECTOR),
        "index_put": (
            lambda a, b: torch.index_put(
                a * a, (torch.tensor([0, 0]), torch.tensor([1, 1])), b[0, :2], accumulate=True
            ),
            VECTOR,
            VECTOR,
        ),
        "select_scatter": (lambda a, b: torch.select_scatter(a * b, b[:, 0], 1, 2), VECTOR, VECTOR),
        "slice_scatter": (lambda a, b: torch.slice_scatter(a * b, b[:, :2], 1, 1, 3), VECTOR, VECTOR),
        "diagonal_scatter": (lambda a, b: torch.diagonal_scatter(a * b, b.sum(2), dim1=1, dim2=2), SQUARE, SQUARE),
    }


class TestConstants(RuleTests):
    """Operations that have no derivative but zero, beside others that have one."""

    operations: ClassVar = {
        "rounded quotient": (lambda x: x * x + torch.div(x, 0.3, rounding_mode="floor"), VECTOR),
        "rounded": (lambda x: x * torch.round(3 * x), VECTOR),
        "sign": (lambda x: x * x * torch.sign(x), VECTOR),
    }


class TestPoolings(RuleTests):
    operations: ClassVar = {
        **{
            f"{name} {axes}d": (getattr(nn, f"{name}{axes}d")(2), shape)
            for axes, shape in ((1, LINE), (2, IMAGE), (3, VOLUME))
            for name in ("AvgPool", "AdaptiveAvgPool")
        },
        "average pool, overlapping": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGE),
        "average pool of lines, overlapping": (nn.AvgPool1d(3, 2, 1), LINE),
        "adaptive average pool to one": (nn.AdaptiveAvgPool2d(1), IMAGE),
        "adaptive average pool, channels last": (
            lambda x: F.adaptive_avg_pool2d(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 1),
            IMAGE,
        ),
    }


class TestInterpolation(RuleTests):
    operations: ClassVar = {
        **{
            f"{mode} {len(shape) - 1}d": (lambda x, mode=mode: F.interpolate(x, scale_factor=1.6, mode=mode), shape)
            for shape, modes in {
                LINE: ("nearest", "nearest-exact", "linear", "area"),
                IMAGE: ("nearest", "nearest-exact", "bilinear", "bicubic", "area"),
                VOLUME: ("nearest", "nearest-exact", "trilinear", "area"),
            }.items()
            for mode in modes
        },
        "bilinear, corners aligned": (
            lambda x: F.interpolate(x, size=(7, 4), mode="bilinear", align_corners=True),
            IMAGE,
        ),
        "bilinear, antialiased": (lambda x: F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True), IMAGE),
        "bicubic, antialiased": (lambda x: F.interpolate(x, size=(3, 4), mode="bicubic", antialias=True), IMAGE),
    }


@pytest.mark.parametrize("padding", [None, 2])
def test_embedding(padding):
    def lookup(table):
        # Row 2 is looked up, and moves: torch takes it for a constant where it pads.
        return F.embedding(torch.tensor([[0, 2], [2, 5], [1, 1]]), table[0], padding_idx=padding)

    assert_sweep_agrees(around(lookup, (6, 4)))
