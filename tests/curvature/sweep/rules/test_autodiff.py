"""Claim: operations without a rule of their own are swept exactly by autodiff."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.rules import RuleTests, at_zero

VECTOR, SEQUENCE, SQUARE, IMAGE = (6,), (4, 6), (3, 3), (2, 5, 6)


class _Twice(nn.Module):
    """Calls a module of two arguments with two views of one."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x, x.flip(-1))


class TestByAutodiff(RuleTests):
    operations: ClassVar = {
        "power of a number": (lambda x: 1.7**x, VECTOR),
        "powers, broadcast": (lambda x: x.unsqueeze(-1) ** torch.arange(1, 4), VECTOR),
        "quotient by the sum": (lambda x: x / (x * x).sum(), VECTOR),
        "normalized": (lambda x: F.normalize(x, dim=-1), SEQUENCE),
        **{
            f"norm of order {order}": (lambda x, order=order: x.norm(order, dim=-1), SEQUENCE)
            for order in (1, 2, 3, torch.inf)
        },
        "matrix norm": (lambda x: torch.linalg.matrix_norm(x).unsqueeze(1), SEQUENCE),
        "standard deviation": (lambda x: x.std(-1), SEQUENCE),
        "standard deviation and mean": (lambda x: torch.cat(torch.std_mean(x, dim=1), -1), SEQUENCE),
        "product": (lambda x: x.prod(-1), SEQUENCE),
        "cumulative product": (lambda x: x.cumprod(-1), SEQUENCE),
        "logsumexp": (lambda x: x.logsumexp(-1), SEQUENCE),
        "logcumsumexp": (lambda x: x.logcumsumexp(-1), SEQUENCE),
        "filled": (lambda x: x.index_fill(1, torch.tensor([1]), 0.3), VECTOR),
        "matrix exponential": (torch.matrix_exp, SQUARE),
        "determinant": (lambda x: torch.linalg.det(x + 3 * torch.eye(3)).unsqueeze(1), SQUARE),
        "inverse": (lambda x: torch.linalg.inv(x + 3 * torch.eye(3)), SQUARE),
        "power": (lambda a, b: (F.softplus(a) + 0.2) ** b, VECTOR, VECTOR),
        "cross product": (lambda a, b: torch.linalg.cross(a, b), (2, 3), (2, 3)),
        "solution of equations": (lambda a, b: torch.linalg.solve(a + 3 * torch.eye(3), b), SQUARE, (3, 2)),
        "lerp by a tensor": (lambda a, b: torch.lerp(a, b, a * b), VECTOR, VECTOR),
        "arc tangent": (lambda a, b: torch.atan2(a, b * b + 1), VECTOR, VECTOR),
        "hypot": (torch.hypot, VECTOR, VECTOR),
        "logaddexp": (torch.logaddexp, VECTOR, VECTOR),
        "cosine similarity": (lambda a, b: F.cosine_similarity(a, b, dim=-1), SEQUENCE, SEQUENCE),
        "pairwise distance": (F.pairwise_distance, SEQUENCE, SEQUENCE),
        "distances": (torch.cdist, SEQUENCE, SEQUENCE),
        "sampled from a grid": (
            lambda x, g: F.grid_sample(x, 0.9 * torch.tanh(g).view(-1, 2, 3, 2), align_corners=False),
            IMAGE,
            (12,),
        ),
        "log sigmoid": (nn.LogSigmoid(), VECTOR),
        "bilinear": (_Twice(nn.Bilinear(6, 6, 3)), VECTOR),
    }
    by_autodiff = True


class TestOfFirstOrder(RuleTests):
    """Operations whose second derivative is zero wherever they have one."""

    operations: ClassVar = {
        "clamped, broadcast": (lambda x: x.unsqueeze(-1).clamp(torch.tensor([-0.3, 0.1]), torch.tensor(0.4)), VECTOR),
        "largest of several axes": (lambda x: x.amax((1, 2)).unsqueeze(1), SEQUENCE),
        "smallest and largest": (lambda x: torch.cat(x.aminmax(dim=-1), -1), SEQUENCE),
        "largest of all": (lambda x: x * x.max(), SEQUENCE),
        "maximum": (torch.maximum, VECTOR, VECTOR),
        "minimum": (torch.minimum, VECTOR, VECTOR),
        "clamped by tensors": (lambda a, b: torch.clamp(a, min=b, max=b + 0.3), VECTOR, VECTOR),
        "scatter_reduce": (
            lambda a, b: a.scatter_reduce(1, torch.tensor([0, 1, 1, 3, 5, 0]).expand(3, -1), b * b, "amax"),
            VECTOR,
            VECTOR,
        ),
        "maximum of equals": (at_zero(lambda x: torch.maximum(x, x.flip(-1))), VECTOR),
        "largest of equals": (at_zero(lambda x: x.amax(-1, keepdim=True)), VECTOR),
    }
    by_autodiff = True
