"""Losses whose second derivatives torch gets wrong or refuses, and what torch and the library make of each.

python -m tests.docs.second_derivatives    # writes the tables of docs/torch.md anew
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp
from torch.utils.checkpoint import checkpoint

from lmc_curvature import HessianOperator, Objective, project_hessian
from lmc_curvature.errors import LMCCurvatureError

PAGE = Path(__file__).parents[2] / "docs" / "torch.md"
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """A loss as Python, the x it is taken at, and the road to its derivative in torch."""

    loss: str
    x: str
    by: str

    def function(self) -> Loss:
        return eval(f"lambda x: {self.loss}", _NAMES)

    def point(self) -> Tensor:
        return eval(self.x, _NAMES).double()


# --- The roads of torch


def _hvp(f: Loss, x: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(x), x, create_graph=True)
    (product,) = torch.autograd.grad(slope, x, v, allow_unused=True)
    return torch.zeros(()) if product is None else (product * v).sum()


def _along(matrix: Callable[[Loss], Any]) -> Callable[[Loss, Tensor, Tensor], Tensor]:
    def second(f: Loss, x: Tensor, v: Tensor) -> Tensor:
        H = matrix(f)(x).reshape(x.numel(), x.numel())
        return v.flatten() @ H @ v.flatten()

    return second


def _third(f: Loss, x: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    value = f(x)
    for _ in range(3):
        value = (torch.autograd.grad(value, x, create_graph=True)[0] * v).sum()
    return value


ROADS: dict[str, Callable[[Loss, Tensor, Tensor], Tensor]] = {
    "backward twice": _hvp,
    "`hessian`": _along(hessian),
    "`jvp` of `grad`": lambda f, x, v: (jvp(grad(f), (x,), (v,))[1] * v).sum(),
    "`grad` of `jvp`": lambda f, x, v: (grad(lambda y: jvp(f, (y,), (v,))[1])(x) * v).sum(),
    "`jvp` of `jvp`": lambda f, x, v: jvp(lambda y: jvp(f, (y,), (v,))[1], (x,), (v,))[1],
    "`jacfwd` of `jacfwd`": _along(lambda f: jacfwd(jacfwd(f))),
    "`jacrev` of `jacrev`": _along(lambda f: jacrev(jacrev(f))),
    "backward three times": _third,
}


# --- What the losses are made of


class Exponential(torch.autograd.Function):
    """An exponential whose backward pass uses a tensor that its forward pass has kept."""

    @staticmethod
    def forward(ctx, x):
        ctx.value = x.exp()
        return ctx.value.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope * ctx.value


class Kernel(torch.autograd.Function):
    """An exponential whose backward pass is marked, as those of hand-written kernels are."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return slope * x.exp()


class Checkpoints(nn.Module):
    """A linear layer and a hyperbolic tangent that are computed again for the backward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False).double()
        nn.init.constant_(self.layer.weight, 0.1)

    def forward(self, x):
        return checkpoint(lambda y: torch.tanh(self.layer(y)), x, use_reentrant=False)


class _Parameter(nn.Module):
    """A network whose only parameter is x, and whose output for every example is a loss of it."""

    def __init__(self, loss: Loss, x: Tensor):
        super().__init__()
        self.loss, self.x = loss, nn.Parameter(x)

    def forward(self, inputs):
        return self.loss(self.x).expand(len(inputs))


def _numbers(*shape: int) -> Tensor:
    """Numbers of both signs without a pattern."""
    count = torch.Size(shape).numel()
    return torch.sin(3 * torch.arange(1, count + 1, dtype=torch.float64) + 0.5).reshape(shape)


_ROW = torch.tensor([0.5, -1.0, 2.0, 1.5], dtype=torch.float64)
_NAMES: dict[str, Any] = {
    "torch": torch,
    "nn": nn,
    "F": F,
    "Exponential": Exponential,
    "Kernel": Kernel,
    "functional_call": functional_call,
    "zeros": torch.zeros,
    "ones": torch.ones,
    "eye": torch.eye,
    "tensor": torch.tensor,
    "numbers": _numbers,
    # Constants of the losses.
    "A": _numbers(3, 4),
    "B": _numbers(3, 4).flip(1),
    "S": torch.eye(3, dtype=torch.float64) + 0.2 * _numbers(3, 3),
    "w": _ROW,
    "ids": torch.tensor([0, 1, 1]),
    "net": Checkpoints(),
}

TABLES: dict[str, tuple[Row, ...]] = {
    "wrong": (
        Row("(A * torch._weight_norm(x, w[:3, None], 0)).sum()", "B", "backward twice"),
        Row("F.embedding(ids, x, padding_idx=1).pow(3).sum()", "A", "backward twice"),
        Row("F.embedding(ids, x, scale_grad_by_freq=True).pow(3).sum()", "A", "backward twice"),
        Row("functional_call(net, {'layer.weight': x}, A).pow(2).sum()", "B", "backward twice"),
        Row("F.gaussian_nll_loss(A, B, x.square(), eps=0.5)", "A", "backward twice"),
        Row("x.norm() ** 2", "zeros(3)", "backward twice"),
        Row("x.norm() ** 2", "zeros(3)", "`hessian`"),
        Row("(x.abs() ** 2).sum()", "zeros(3)", "backward twice"),
        Row("(torch.cdist(x, A) ** 2).sum()", "A", "backward twice"),
        Row("torch.cdist(x, A[:2]).sum()", "B", "`jacrev` of `jacrev`"),
        Row("(B * F.layer_norm(x, (4,))).sum()", "A", "`grad` of `jvp`"),
        Row("(B * F.instance_norm(x[None])).sum()", "A", "`grad` of `jvp`"),
        Row("(B * F.batch_norm(x, None, None, training=True)).sum()", "A", "`grad` of `jvp`"),
        Row("torch.linalg.det(x)", "S", "`grad` of `jvp`"),
        Row("torch.linalg.det(x)", "eye(3)", "`hessian`"),
        Row("torch.linalg.slogdet(x)[1]", "S", "`grad` of `jvp`"),
        Row("torch.linalg.solve(x, A).sum()", "S", "`grad` of `jvp`"),
        Row("torch.cholesky_inverse(x.tril() + 2 * eye(3)).sum()", "A[:, :3]", "`hessian`"),
        Row("torch.linalg.householder_product(x, w[:2]).sum()", "A.T[:, :2]", "`grad` of `jvp`"),
        Row("(w * x.cumprod(0)).sum()", "tensor([2.0, 0.0, 3.0, 1.0])", "`jvp` of `jvp`"),
        Row("zeros(3).double().scatter_reduce(0, ids, x, 'prod', include_self=False).sum()", "S[0]", "`jvp` of `grad`"),
    ),
    "refused": (
        Row("Exponential.apply(x).pow(2).sum()", "A[0]", "backward twice"),
        Row("Kernel.apply(x).pow(2).sum()", "A[0]", "backward twice"),
        Row("F.embedding(ids, x.clone(), max_norm=0.5).pow(3).sum()", "A", "backward twice"),
        Row("torch.sinc(x).sum()", "zeros(3)", "backward twice"),
        Row("x.pow(2).sum().sqrt() ** 2", "zeros(3)", "backward twice"),
    ),
    "missing": (
        Row("(B * F.hardsigmoid(x).pow(2)).sum()", "A", "backward twice"),
        Row("F.scaled_dot_product_attention(x[None], x[None], x[None]).pow(2).sum()", "A", "backward twice"),
        Row("(A * torch._weight_norm(x, w[:3, None], 0)).sum()", "B", "`jvp` of `grad`"),
        Row("F.huber_loss(x, B)", "A", "`jvp` of `grad`"),
        Row("torch.cdist(x, A[:2]).sum()", "B", "`jvp` of `grad`"),
        Row("F.grid_sample(A[None, None], x[:2, :2].tanh()[None, None]).pow(2).sum()", "B", "`jvp` of `grad`"),
        Row("F.batch_norm(A, x, w.exp()).pow(3).sum()", "w", "backward twice"),
        Row("F.embedding_bag(ids[None], x).pow(2).sum()", "A", "backward twice"),
        Row("F.multi_margin_loss(x, ids, p=2)", "A", "backward twice"),
    ),
    "third": (
        Row("(B * F.layer_norm(x, (4,))).sum()", "A", "backward three times"),
        Row("(B * F.batch_norm(x, None, None, training=True)).sum()", "A", "backward three times"),
        Row("(A * torch._weight_norm(x, w[:3, None], 0)).sum()", "B", "backward three times"),
    ),
}


# --- What comes of a row


def direction(x: Tensor) -> Tensor:
    """The direction along which the derivatives of all rows are taken."""
    return torch.cos(torch.arange(x.numel(), dtype=torch.float64)).reshape(x.shape)


@functools.cache
def by_torch(row: Row) -> str:
    """The derivative by torch, or the word that it refuses by."""
    x = row.point()
    try:
        return number(ROADS[row.by](row.function(), x, direction(x)))
    except (RuntimeError, NotImplementedError):
        return "an error"


@functools.cache
def by_differences(row: Row) -> float:
    """The same derivative from values of the loss alone: two central differences, extrapolated."""
    f, x = row.function(), row.point()
    v = direction(x)

    def difference(h: float) -> Tensor:
        far, near, middle, back, farther = (f(x + k * h * v) for k in (2, 1, 0, -1, -2))
        if row.by == "backward three times":
            return (far - 2 * near + 2 * back - farther) / (2 * h**3)
        return (-far + 16 * near - 30 * middle + 16 * back - farther) / (12 * h**2)

    with torch.no_grad():
        steps = (0.02, 0.01) if row.by == "backward three times" else (0.004, 0.002)
        wide, narrow = (difference(h) for h in steps)
    return float((4 * narrow - wide) / 3) if row.by == "backward three times" else float(narrow)


@functools.cache
def by_library(row: Row) -> str:
    """`right` or `refused`, by a product of the operator and by the sweep, which must both say so."""
    x = row.point()
    v, right, found = direction(x), by_differences(row), set()
    for road in (
        lambda objective: (HessianOperator(objective) @ v.flatten()) @ v.flatten(),
        lambda objective: project_hessian(objective, objective.state(), {"v": {"x": v}}).curvature[0, 0],
    ):
        objective = Objective(_Parameter(row.function(), x), [(torch.ones(6, 1), torch.zeros(6))], loss_fn=_mean)
        try:
            value = float(road(objective))
        except LMCCurvatureError:
            found.add("refused")
        else:
            found.add("right" if abs(value - right) <= 1e-5 * max(abs(right), 0.01) else f"wrong: {value}")
    return " and ".join(sorted(found))


def _mean(output: Tensor, _target: Tensor) -> Tensor:
    return output.mean()


def number(value: Any) -> str:
    """Four digits, and zero as zero."""
    value = float(value.detach()) if isinstance(value, Tensor) else float(value)
    return "0" if abs(value) < 1e-12 else f"{value:.4g}"


def table(name: str) -> str:
    """The rows of a table as Markdown, with what torch and the library make of them now."""
    rows = TABLES[name]
    head = ["loss", "at x =", "by", "torch", "right"] + (["here"] if name != "third" else [])
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [f"`{row.loss}`", f"`{row.x}`", row.by, by_torch(row), number(by_differences(row))]
        lines.append(cells + ([by_library(row)] if name != "third" else []))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page_tables(text: str) -> dict[str, str]:
    """The tables of the page, by name; each stands after a comment that names it."""
    return dict(re.findall(r"<!-- table: (\w+) -->\n\n(.*?)\n\n", text, re.DOTALL))


def main() -> None:
    """Write the tables, and the version of torch they hold for."""
    text = PAGE.read_text()
    for name, old in page_tables(text).items():
        text = text.replace(f"<!-- table: {name} -->\n\n{old}\n\n", f"<!-- table: {name} -->\n\n{table(name)}\n\n")
    PAGE.write_text(re.sub(r"torch \d+\.\d+\.\d+", f"torch {torch.__version__.partition('+')[0]}", text))


if __name__ == "__main__":
    main()
