"""Claim: products of two arguments are swept exactly, whichever of them the directions have reached."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.rules import RuleTests

VECTOR, SEQUENCE, SQUARE = (6,), (4, 6), (3, 3)


class TestBilinear(RuleTests):
    operations: ClassVar = {
        "square of itself": (lambda x: x * x, VECTOR),
        "half plane": (lambda x: x * (x > 0), VECTOR),
        "detached factor": (lambda x: x * x.detach(), VECTOR),
        "cast and back": (lambda x: x.to(torch.float64) * torch.ones(6), VECTOR),
        "product with a sum": (lambda x: x * x.sum((1, 2), keepdim=True), SEQUENCE),
        "quotient of a number": (lambda x: 2 / (x * x + 1), VECTOR),
        "product": (lambda a, b: a * b, VECTOR, VECTOR),
        "product, broadcast": (lambda a, b: a * b, (3, 4), (1, 4)),
        "product with the mean": (lambda a, b: a * b.mean(), VECTOR, VECTOR),
        "quotient": (lambda a, b: a / (b * b + 1), VECTOR, VECTOR),
        "matmul": (lambda a, b: a @ b, (3, 4), (4, 2)),
        "bmm": (torch.bmm, (3, 4), (4, 2)),
        "bmm, the left one large": (torch.bmm, (9, 8), (8, 2)),
        "bmm, the right one large": (torch.bmm, (2, 8), (8, 9)),
        "bmm of four axes, the left one large": (lambda a, b: a.unsqueeze(1) @ b.unsqueeze(1), (9, 8), (8, 2)),
        "matrix times vector": (lambda x: (x @ x[0]).unsqueeze(1) + torch.dot(x[0], x[1]), VECTOR),
        "outer product": (lambda a, b: a.unsqueeze(2) * b.unsqueeze(1), VECTOR, VECTOR),
        "einsum": (lambda a, b: torch.einsum("bik,bjk->bij", a, b), (3, 4), (2, 4)),
        "einsum of three": (lambda a, b, c: torch.einsum("bi,bj,bk->bijk", a, b, c), (2,), (3,), (2,)),
        "trace of a square": (lambda x: torch.einsum("bij,bji->b", x, x).unsqueeze(1), SQUARE),
        "tensordot": (lambda a, b: torch.tensordot(a, b[0], dims=([2], [1])), SEQUENCE, SEQUENCE),
        "baddbmm": (lambda a, b: torch.baddbmm(a[:, :, :2], a, b, beta=0.5, alpha=2.0), (3, 4), (4, 2)),
        "addmm": (lambda a, b: torch.addmm(a[0, :2], a, b.T @ b[:, :2], beta=0.3, alpha=1.5), VECTOR, VECTOR),
        "addcmul": (lambda a, b: torch.addcmul(a, b, a + b, value=0.7), VECTOR, VECTOR),
        "addcdiv": (lambda a, b: torch.addcdiv(a, b, F.softplus(a + b) + 0.3, value=0.7), VECTOR, VECTOR),
        "linear": (nn.Linear(6, 4), SEQUENCE),
        "GLU": (nn.GLU(), VECTOR),
    }
