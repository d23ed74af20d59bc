"""Losses with known minima and Hessians, as networks: for trust, and for intuition.

A landscape is a module whose parameters are the coordinates, cut into named layers. It is called like a network, on a
batch of shifts (n, d), and returns the loss of each, f(θ − shift); so an example is a landscape moved a little, and
`landscape_loss` is the mean over them. `origin()` is the loader for the landscape itself.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmc_curvature.errors import DataError


def landscape_loss(output: Float[Tensor, " n"], target: object) -> Float[Tensor, ""]:
    """The mean of a landscape's outputs; the target is not used."""
    return output.mean()


def origin(dimension: int) -> list[tuple[Tensor, Tensor]]:
    """A loader of one batch with one example, the landscape as it stands."""
    return [(torch.zeros(1, dimension, dtype=torch.float64), torch.zeros(1))]


class QuadraticProduct(nn.Module):
    """f(θ) = Π_m q_m(θ) with q_m(θ) = ½ (θ − m)ᵀ A_m (θ − m): zero exactly at the minima m, with ridges between.

    The paper's toy (Singh et al. 2024, §5): in one dimension with minima at ±1, or at ±1 and ±1.5. At a minimum m_k the
    Hessian is A_k Π_{j≠k} q_j(m_k). Coordinates are cut into layers, float64: the parameter of a layer's name holds
    those of that layer.

    Args:
        minima: (minima, d).
        hessians: The A_m, (minima, d, d); the identity by default.
        position: Position of θ, (d,); the first minimum by default.
        layers: Layer name to number of coordinates; one layer by default.
    """

    def __init__(
        self,
        minima: Float[Tensor, "minima d"],
        *,
        hessians: Float[Tensor, "minima d d"] | None = None,
        position: Float[Tensor, " d"] | None = None,
        layers: Mapping[str, int] | None = None,
    ):
        super().__init__()
        count, dimension = minima.shape
        self.sizes = {"theta": dimension} if layers is None else dict(layers)
        total = sum(self.sizes.values())
        if total != dimension:
            raise DataError(f"The layers {self.sizes} hold {total} coordinates; expected {dimension}.")
        parts = (minima[0] if position is None else position).double().split(list(self.sizes.values()))
        for name, part in zip(self.sizes, parts, strict=True):
            self.register_parameter(name, nn.Parameter(part.clone()))
        identity = torch.eye(dimension).expand(count, -1, -1)
        self.minima = nn.Buffer(minima.double())
        self.hessians = nn.Buffer((identity if hessians is None else hessians).double().contiguous())

    def position(self) -> Float[Tensor, " d"]:
        """All coordinates as one vector."""
        return torch.cat([getattr(self, name) for name in self.sizes])

    def forward(self, shift: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Loss of each example, (n,)."""
        away = (self.position() - shift).unsqueeze(1) - self.minima
        return (0.5 * torch.einsum("nmi,mij,nmj->nm", away, self.hessians, away)).prod(dim=1)

    def hessian_at(self, position: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
        """The Hessian at any position, in closed form, by the product rule; (d, d), float64."""
        away = position.double() - self.minima
        slopes = torch.einsum("mij,mj->mi", self.hessians, away)
        values = 0.5 * torch.einsum("mi,mi->m", away, slopes)
        one = torch.eye(len(values), dtype=torch.bool, device=values.device)
        two = one.unsqueeze(0) | one.unsqueeze(1)
        # Products of the values but one, and but two.
        without_one, without_two = (torch.where(some, 1.0, values).prod(dim=-1) for some in (one, two))
        pairs = torch.einsum("mk,mi,kj->ij", without_two.fill_diagonal_(0.0), slopes, slopes)
        return pairs + torch.einsum("m,mij->ij", without_one, self.hessians)


class Quadratic(QuadraticProduct):
    """f(θ) = c + ½ (θ − m)ᵀ A (θ − m), whose Hessian is A everywhere.

    Args:
        hessian: A, symmetric, (d, d).
        minimum: m, (d,); zero by default.
        position: Position of θ, (d,); the minimum by default.
        layers: Layer name to number of coordinates; one layer by default.
        offset: c.
    """

    def __init__(
        self,
        hessian: Float[Tensor, "d d"],
        *,
        minimum: Float[Tensor, " d"] | None = None,
        position: Float[Tensor, " d"] | None = None,
        layers: Mapping[str, int] | None = None,
        offset: float = 0.0,
    ):
        minimum = torch.zeros(len(hessian)) if minimum is None else minimum
        super().__init__(minimum.unsqueeze(0), hessians=hessian.unsqueeze(0), position=position, layers=layers)
        self.offset = offset

    def forward(self, shift: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Loss of each example, (n,)."""
        return self.offset + super().forward(shift)
