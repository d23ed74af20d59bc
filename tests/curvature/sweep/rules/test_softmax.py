"""Claim: softmax and its logarithm are swept exactly along any axis, and the attention that is made of it."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.rules import RuleTests

VECTOR, SEQUENCE, HEADS = (6,), (4, 6), (2, 4, 3)


class TestSoftmax(RuleTests):
    operations: ClassVar = {
        "softmax": (nn.Softmax(-1), VECTOR),
        "softmin": (nn.Softmin(-1), VECTOR),
        "log softmax": (nn.LogSoftmax(-1), VECTOR),
        "softmax along the middle": (lambda x: torch.softmax(x, 1), SEQUENCE),
        "softmax in part": (lambda x: torch.softmax(x.masked_fill(torch.arange(6) % 3 == 0, -torch.inf), -1), VECTOR),
        "log softmax along the batch": (lambda x: F.log_softmax(x, 0), VECTOR),
    }


def _attention(**options):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


class TestAttention(RuleTests):
    operations: ClassVar = {
        "plain": (_attention(), HEADS, HEADS, HEADS),
        "causal": (_attention(is_causal=True), HEADS, HEADS, HEADS),
        "masked": (_attention(attn_mask=torch.ones(4, 4).tril(1).bool()), HEADS, HEADS, HEADS),
        "biased and scaled": (
            _attention(attn_mask=torch.arange(16.0).view(4, 4).double() / 16, scale=0.3),
            HEADS,
            HEADS,
            HEADS,
        ),
        "fewer keys": (_attention(enable_gqa=True), (4, 4, 3), HEADS, HEADS),
    }
