"""The mean of every subset of several networks, from the barriers of their pairs and of the mean of all.

The mean of a subset T has the weights y_k = w_k / Σ_{j∈T} w_j. The mean of a pair of networks divides their segment as
w_j : w_i whatever the subset, and its barrier b_ij above the mean of the two losses is known. So is B(w), that of all.
With P the barrier that pairs make,

    P(y) = Σ_{i<j∈T} (y_i + y_j)² b_ij,    e₃(y) = Σ_{i<j<k} y_i y_j y_k
    B(y) = P(y) + e₃(y) / e₃(w) · [B(w) − P(w)]

which is right for single networks, for pairs and for all of them, and of losses of second order for every subset.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float

from lmc_curvature.averages import with_error

# Up to so many networks, all subsets are looked at.
EXHAUSTIVE = 10

Members = Bool[np.ndarray, "subsets N"]


@dataclass(frozen=True)
class Subset:
    """The mean of some of several networks, as it is predicted.

    Attributes:
        networks: Names of the networks.
        weights: What each counts for in the mean; they sum to one.
        loss: The loss of the mean.
        rise: That loss above the mean of theirs: their barrier, with its sign.
        standard_error: Sampling error of the rise; NaN for a single batch.
        expansion_error: How far rise and loss may be off for being predicted; zero where they were evaluated.
        is_evaluated: Whether the loss of this mean was evaluated, and not predicted from other networks.
    """

    networks: tuple[str, ...]
    weights: tuple[float, ...]
    loss: float
    rise: float
    standard_error: float
    expansion_error: float
    is_evaluated: bool

    def __str__(self) -> str:
        how = "evaluated" if self.is_evaluated else f"expansion error about {self.expansion_error:.2g}"
        return f"{', '.join(self.networks)}: loss {self.loss:.4g}, rise {self.in_words}, {how}"

    @property
    def in_words(self) -> str:
        """The rise with its sampling error; of a single network there is none."""
        return "none" if len(self.networks) == 1 else with_error(self.rise, self.standard_error, 3)


def shares(weights: Float[np.ndarray, " N"], members: Members) -> Float[np.ndarray, "subsets N"]:
    """The weights y of the networks in the mean of each subset; zero outside."""
    return members * weights / (members @ weights)[:, None]


def pair_rises(
    weights: Float[np.ndarray, " N"], pairs: Float[np.ndarray, "*batches N N"], members: Members
) -> Float[np.ndarray, "*batches subsets"]:
    """P(y) of each subset.

    Args:
        weights: w, what each network counts for.
        pairs: b_ij, symmetric, with zeros on the diagonal.
        members: The subsets.
    """
    whole = (weights[:, None] + weights) ** 2 * pairs
    each = members.astype(np.float64)
    return ((each @ whole) * each).sum(-1) / 2 / (members @ weights) ** 2


def triples(
    weights: Float[np.ndarray, " N"],
    pairs: Float[np.ndarray, "*batches N N"],
    whole: Float[np.ndarray, "*batches"],
    members: Members,
) -> Float[np.ndarray, "*batches subsets"]:
    """B(y) − P(y) of each subset: what three networks or more add to what their pairs make.

    Args:
        weights: w, what each network counts for.
        pairs: b_ij, symmetric, with zeros on the diagonal.
        whole: B(w), the barrier of the mean of all.
        members: The subsets.
    """
    every = np.ones((1, len(weights)), dtype=bool)
    if len(weights) < 3:
        return np.zeros((*np.shape(whole), len(members)))
    rest = whole - pair_rises(weights, pairs, every)[..., 0]
    parts = _third(shares(weights, members)) / _third(shares(weights, every))
    return rest[..., None] * parts


def _third(y: Float[np.ndarray, "subsets N"]) -> Float[np.ndarray, " subsets"]:
    """e₃(y), the third elementary symmetric polynomial of numbers that sum to one (by Newton's identities)."""
    return (1 - 3 * (y**2).sum(1) + 2 * (y**3).sum(1)) / 6


def every_subset(count: int) -> Members:
    """All subsets but the empty one, small ones first."""
    chosen = [set(some) for size in range(1, count + 1) for some in combinations(range(count), size)]
    return np.array([[number in some for number in range(count)] for some in chosen])


def search_subsets(count: int, losses: Callable[[Members], Float[np.ndarray, " subsets"]]) -> Members:
    """The subsets that a greedy search looks at: single networks, all but one, all, and those on its way.

    It begins at the best network, and takes in, one by one, the network that makes the best mean with those before, as
    greedy soups do (Wortsman et al. 2022).

    Args:
        count: Number of networks.
        losses: Loss of the mean of each of some subsets.
    """
    each = np.eye(count, dtype=bool)
    found = [each, ~each, np.ones((1, count), dtype=bool)]
    best = each[losses(each).argmin()]
    while best.sum() < count:
        steps = best | each[~best]
        found.append(steps)
        best = steps[losses(steps).argmin()]
    return np.unique(np.concatenate(found), axis=0)
