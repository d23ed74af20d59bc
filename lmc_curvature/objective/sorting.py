"""Data that arrive in the order of their classes: noticed by their labels, and warned of."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# A random order is taken for a sorted one in at most one of a million looks.
_EVIDENCE = math.log(1e6)
# Below this, standard errors are hardly touched.
_INFLATION = 1.5


@dataclass(frozen=True)
class Purity:
    """How far each batch holds examples of one class, beside what a random cut of the same examples would give.

    Batch b has n_b examples, c_bk of them of class k; all batches together have N, N_k of class k.

    Attributes:
        within: Share of one class among the pairs of examples of a batch, Σ_b Σ_k c_bk (c_bk − 1) / Σ_b n_b (n_b − 1).
        by_chance: Its mean over all random cuts, Σ_k N_k (N_k − 1) / N (N − 1).
        inflation: How many times too large the variance of the mean of a quantity is estimated from the spread between
            batches if the class alone decides the quantity: Kish's design effect,
            1 + (within − by_chance) / (1 − by_chance) · Σ_b n_b (n_b − 1) / N.
        evidence: Logarithm of how much likelier the labels are if every batch has class shares of its own, drawn from
            a Dirichlet distribution with parameters N_k / N, than if all orders of them are equally likely:
            log N! − Σ_k log N_k! + Σ_b [Σ_k log Γ(c_bk + N_k/N) / Γ(N_k/N) − log n_b!].
            In a random order it exceeds t with a probability of at most exp(−t) (Markov's inequality: its exponential
            has a mean of at most 1), however the classes are balanced and whatever the sizes of batches.
    """

    within: float
    by_chance: float
    inflation: float
    evidence: float

    @classmethod
    def of(cls, batches: Sequence[Counter[Any]]) -> "Purity":
        """Compute it from how many examples of each class each batch holds."""
        pooled = Counter[Any]()
        for counts in batches:
            pooled.update(counts)
        examples = pooled.total()
        pairs = sum(counts.total() * (counts.total() - 1) for counts in batches)
        by_chance = _pairs_of_one_class(pooled) / max(examples * (examples - 1), 1)
        within = sum(map(_pairs_of_one_class, batches)) / pairs if pairs else by_chance
        excess = (within - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0
        evidence = math.lgamma(examples + 1) - sum(math.lgamma(count + 1) for count in pooled.values())
        for counts in batches:
            evidence -= math.lgamma(counts.total() + 1)
            for label, count in counts.items():
                share = pooled[label] / examples
                evidence += math.lgamma(count + share) - math.lgamma(share)
        return cls(within, by_chance, 1 + excess * pairs / max(examples, 1), evidence)

    @property
    def is_of_sorted_data(self) -> bool:
        """Whether the order cannot be a random one, and matters."""
        return self.evidence > _EVIDENCE and self.inflation > _INFLATION


def _pairs_of_one_class(counts: Counter[Any]) -> int:
    return sum(count * (count - 1) for count in counts.values())


def warn_of_sorted_data(batches: Iterable[Any]) -> Iterator[Any]:
    """Pass on the batches of one pass over a loader, and warn, once, if the data come in the order of their classes.

    It is told by the labels of (x, y) batches, or of batches that name them, with one label an example or class
    probabilities, as soon as these are evidence enough: after 2, 4, 8, … batches, or at the end. That two or three
    examples of a rare class come together is not noticed.
    """
    seen: list[Counter[Any]] = []
    warned = False
    for data in batches:
        labels = None if warned else _labels(data)
        if labels is not None:
            seen.append(Counter(labels.flatten().tolist()))
            # At numbers that double, so that all looks together cost little more than the last.
            warned = len(seen).bit_count() == 1 and _warn_if_sorted(seen)
        yield data
    if not warned:
        _warn_if_sorted(seen)


# As batches of named tensors call their labels.
_LABEL_NAMES = ("labels", "label", "targets", "target", "y")


def targets_of(data: Any) -> Any:
    """The targets of a batch: the last of several parts, or what a mapping calls so; None where nothing says so."""
    if isinstance(data, (tuple, list)) and len(data) > 1:
        data = data[-1]
        if not isinstance(data, Mapping):
            return data
    return next((data[name] for name in _LABEL_NAMES if name in data), None) if isinstance(data, Mapping) else None


def _labels(data: Any) -> Tensor | None:
    """The label of each example of a batch: its target, where that is one number or one class by its probabilities."""
    if isinstance(data, (tuple, list)) and len(data) == 2:
        inputs = data[0]
    elif isinstance(data, Mapping):
        inputs = {key: value for key, value in data.items() if key not in _LABEL_NAMES}
    else:
        return None
    target = targets_of(data)
    leading = next((leaf.shape[:1] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    if not isinstance(target, Tensor) or not target.ndim or leading != target.shape[:1] or target.is_complex():
        return None
    if target.numel() == len(target):
        return target
    # One-hot vectors, or the like with smoothed or mixed labels.
    sums = target.double().sum(1)
    of_classes = (
        target.ndim == 2 and bool((target >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), rtol=1e-2)
    )
    return target.double().argmax(1) if of_classes else None


def _warn_if_sorted(batches: Sequence[Counter[Any]]) -> bool:
    purity = Purity.of(batches)
    if purity.is_of_sorted_data:
        warnings.warn(
            f"The data come in the order of their classes: in the first {len(batches)} batches, two examples of a "
            f"batch are of one class in {100 * purity.within:.3g} % of cases, any two in "
            f"{100 * purity.by_chance:.3g} %. Standard errors then mix in the spread between classes, and with "
            "batch_norm='batch' or 'recalibrate' the batch statistics are those of one class or a few. Shuffle the "
            "data once: DataLoader(Subset(data, torch.randperm(len(data)).tolist()), batch_size=...).",
            stacklevel=4,
        )
    return purity.is_of_sorted_data
