"""Claim: normalisation and other composite operations come apart into some that the rules know."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tests.support.rules import RuleTests

# All of them together take seconds.
VECTOR, SEQUENCE, LINE, IMAGE, VOLUME = (6,), (4, 6), (2, 9), (2, 5, 6), (2, 3, 4, 4)


class _FixedNorm(nn.Module):
    """Normalises by statistics that no module tracks."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("variance", torch.ones(2))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.variance.abs() + 0.5, self.weight, None, training=False)


class TestNormalization(RuleTests):
    operations: ClassVar = {
        "batch norm of vectors": (nn.BatchNorm1d(6), VECTOR),
        "batch norm of images": (nn.BatchNorm2d(2), IMAGE),
        "batch norm of volumes": (nn.BatchNorm3d(2), VOLUME),
        "batch norm without affine map": (nn.BatchNorm2d(2, affine=False), IMAGE),
        "batch norm without statistics": (nn.BatchNorm2d(2, track_running_stats=False), IMAGE),
        "batch norm with fixed statistics": (_FixedNorm(), IMAGE),
        "conv, batch norm, relu": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(True)), IMAGE),
        "transposed conv, batch norm": (nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.BatchNorm2d(3)), IMAGE),
        "layer norm": (nn.LayerNorm(6), SEQUENCE),
        "layer norm without affine map": (nn.LayerNorm(6, elementwise_affine=False), SEQUENCE),
        "layer norm of two axes": (nn.LayerNorm((5, 6), bias=False), IMAGE),
        "RMS norm": (nn.RMSNorm(6), SEQUENCE),
        "group norm": (nn.GroupNorm(2, 4), (4, 3, 3)),
        "group norm of one group": (nn.GroupNorm(1, 2, affine=False), IMAGE),
        "instance norm": (nn.InstanceNorm2d(2, affine=True), IMAGE),
        "instance norm of lines": (nn.InstanceNorm1d(2), LINE),
        "instance norm of volumes": (nn.InstanceNorm3d(2, affine=True), VOLUME),
        "instance norm with statistics": (nn.InstanceNorm2d(2, affine=True, track_running_stats=True), IMAGE),
        "local response norm": (nn.LocalResponseNorm(2), IMAGE),
    }


class TestWeightNormalization(RuleTests):
    operations: ClassVar = {
        "weight norm": (weight_norm(nn.Linear(6, 4)), SEQUENCE),
    }
    by_autodiff = True


class TestStatistics(RuleTests):
    operations: ClassVar = {
        "variance": (lambda x: x.var(-1), SEQUENCE),
        "variance without correction": (lambda x: x.var((1, 2), correction=0, keepdim=True), SEQUENCE),
        "variance of everything": (lambda x: x * x.var(), SEQUENCE),
        "variance and mean": (lambda x: torch.cat(torch.var_mean(x, dim=1), -1), SEQUENCE),
    }


class TestActivations(RuleTests):
    operations: ClassVar = {
        "PReLU": (nn.PReLU(), VECTOR),
        "PReLU for each channel": (nn.PReLU(2), IMAGE),
    }


class _SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.options = options

    def forward(self, x):
        return self.attention(x, x, x, **self.options)[0]


class _Reversed(nn.Module):
    """Calls a module of two arguments with a sequence and the same, reversed."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x, x.flip(-1))


class TestTransformers(RuleTests):
    operations: ClassVar = {
        "attention": (_SelfAttention(need_weights=True), SEQUENCE),
        "attention without weights": (_SelfAttention(need_weights=False), SEQUENCE),
        "attention to the past": (_SelfAttention(attn_mask=torch.ones(4, 4).triu(1).bool()), SEQUENCE),
        "encoder layer": (nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), SEQUENCE),
        "encoder layer, norm first": (
            nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True, activation="gelu"),
            SEQUENCE,
        ),
        "decoder layer": (_Reversed(nn.TransformerDecoderLayer(6, 2, 8, batch_first=True)), SEQUENCE),
    }
