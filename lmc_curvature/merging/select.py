"""The heaviest set of layers that can be averaged within a budget, as predicted."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from torch import nn
from tqdm.auto import tqdm

from lmc_curvature.barrier import BarrierPrediction
from lmc_curvature.errors import OptionError, PartitionError, check_choice
from lmc_curvature.merging.budgets import check_not_negative, limit_of
from lmc_curvature.merging.merge import merge_predicted
from lmc_curvature.merging.rises import BASES, Base, mean_loss, points_of, sampling_error, set_errors, set_rises
from lmc_curvature.merging.search import Score, every_set, search_sets
from lmc_curvature.merging.summaries import selection_summary, selection_text
from lmc_curvature.plotting.summary import Display, Summary
from lmc_curvature.segment import layer_indices

if TYPE_CHECKING:
    import pandas as pd

    from lmc_curvature.merging.verify import Verification

Weight = Literal["parameters", "distance"] | Mapping[str, float | int]
"""What a layer counts for: its parameters, the norm of its displacement, or a number for every layer."""

# Up to so many layers, all their sets are looked at.
_EXHAUSTIVE = 20
# Where there are more, searches begin at so many random sets, too, and the curve is of so many budgets.
_STARTS, _BUDGETS = 2, 21
# Equal rises and weights that come by different sums differ by less, in units of the losses and of the total weight.
_ROUNDING = 1e-12


def select_layers(
    prediction: BarrierPrediction,
    budget: float | int | None = None,
    *,
    relative_budget: float | int | None = None,
    base: Base | None = None,
    weight: Weight = "parameters",
    required: Iterable[str] | str = (),
    excluded: Iterable[str] | str = (),
) -> "Selection":
    """Select the heaviest set of layers to average whose predicted rise of the loss stays within a budget.

    A merge makes one network: the selected layers halfway between both, the others those of its base. Its rise is its
    loss minus the mean loss of the two networks. Rises are not monotone in the set. With up to 20 layers to choose
    from, every set is looked at, so the selection is exact under the prediction; with more, a search is made, see
    `search_sets`. Of sets of one weight, that with the least rise is taken.

    Args:
        prediction: The prediction.
        budget: The largest rise, in units of the loss, above the mean of the two: of unequal networks the better alone
            may have far less loss than a merge within it. Below zero it asks for less than that mean.
        relative_budget: The largest rise as a part of the mean loss of the two networks, without its sign, instead of
            `budget`.
        base: Whose the other layers are, `"a"` or `"b"`; `"mean"` bounds the mean rise of both merges, the barrier
            B_S(½). By default, the base of the two that lets more be averaged.
        weight: What makes a set heavy: the sum of its layers' `"parameters"`, of their `"distance"` (the norms of their
            displacements), or of a number for every layer.
        required: Layers that are in the set.
        excluded: Layers that are not.

    Raises:
        OptionError: An option is not what it should be, or no set stays within the budget.
        PartitionError: A layer is unknown, both required and excluded, or without a weight.
    """
    limit = limit_of(prediction, budget, relative_budget)
    if base is not None:
        check_choice("base", base, BASES)
    weights = _weights(prediction, weight)
    inside, outside = (np.zeros(len(weights), dtype=bool) for _ in range(2))
    groups = prediction.groups
    known = prediction.layers if groups is None else {name: groups.get(name, ()) for name in prediction.layers}
    inside[layer_indices(known, required)] = True
    outside[layer_indices(known, excluded)] = True
    if (inside & outside).any():
        name = prediction.layers[int((inside & outside).argmax())]
        raise PartitionError(f"Layer {name!r} is both required and excluded: leave it out of one of them.")
    bases: tuple[Base, ...] = ("a", "b") if base is None else (base,)
    choice = Choice(prediction, limit, bases, weights, inside, outside)
    best: dict[Base, tuple[float, np.ndarray]] = {each: choice.best(each, limit) for each in bases}
    chosen = max(best, key=lambda each: best[each][0])
    score, members = best[chosen]
    if score < 0:
        least = float(set_rises(prediction, members[None], chosen)[0])
        raise OptionError(
            f"budget={limit:.4g}: no set of layers stays within it, with base {' or '.join(bases)}; the least rise "
            f"found is {least:.4g}, by averaging {choice.describe(members)}. Give a larger budget, or require less."
        )
    return Selection.of(choice, members, chosen)


@dataclass(frozen=True, eq=False)
class Choice:
    """What a selection is made from, and what it has to satisfy.

    Attributes:
        prediction: The prediction.
        budget: The largest rise, in units of the loss.
        bases: The bases to choose from.
        weights: What each layer counts for, (L,).
        required, excluded: True at the layers that are in, or not in, every set, (L,).
    """

    prediction: BarrierPrediction
    budget: float
    bases: tuple[Base, ...]
    weights: Float[np.ndarray, " L"]
    required: Bool[np.ndarray, " L"]
    excluded: Bool[np.ndarray, " L"]

    @property
    def free(self) -> np.ndarray:
        """Indices of the layers to choose from."""
        return np.flatnonzero(~self.required & ~self.excluded)

    @property
    def exact(self) -> bool:
        """Whether every set is looked at."""
        return len(self.free) <= _EXHAUSTIVE

    @property
    def total(self) -> float:
        """Weight of all layers; 1 if that is zero, to divide by."""
        return float(self.weights.sum()) or 1.0

    @property
    def starts(self) -> list[Bool[np.ndarray, " L"]]:
        """The lightest and the heaviest set, where searches begin."""
        return [self.required, ~self.excluded]

    def names(self, members: Bool[np.ndarray, " L"]) -> tuple[str, ...]:
        """Names of a set's layers."""
        return tuple(name for name, member in zip(self.prediction.layers, members, strict=True) if member)

    def members(self, names: Iterable[str]) -> Bool[np.ndarray, " L"]:
        """The set of the layers of these names."""
        return np.isin(np.arange(len(self.weights)), layer_indices(self.prediction.layers, names))

    def describe(self, members: Bool[np.ndarray, " L"]) -> str:
        """Names of a set's layers, in words."""
        return "all layers" if members.all() else ", ".join(self.names(members)) or "no layer"

    def best(self, base: Base, budget: float) -> tuple[float, Bool[np.ndarray, " L"]]:
        """The best set for a base, and its score: negative where it is not within the budget."""
        score = self._score(base, budget)
        starts = (
            () if self.exact else self.required | (np.random.default_rng(0).random((_STARTS, len(self.weights))) < 0.5)
        )
        members = self.search(score, starts=[each & ~self.excluded for each in starts])
        return float(score(members[None])[0]), members

    def search(self, score: Score, *, starts: Sequence[Bool[np.ndarray, " L"]] = (), width: int = 12) -> np.ndarray:
        """The set with the highest score: exact where every set is looked at."""
        if self.exact and not starts:
            return search_sets(score, [self.required], self.free, width=_EXHAUSTIVE)
        return search_sets(score, [*starts, *self.starts], self.free, width=width)

    def front(self, base: Base, *, progress: bool | None = None) -> Bool[np.ndarray, "sets L"]:
        """Sets of which none is lighter than another with as little a rise, from light to heavy."""
        if self.exact:
            return _undominated(self, base, every_set(self.required, self.free))
        lowest = self.search(lambda members: -set_rises(self.prediction, members, base))
        ends = set_rises(self.prediction, np.stack([lowest, ~self.excluded]), base)
        found = [lowest]
        budgets = np.linspace(ends.min(), ends.max(), _BUDGETS)
        for budget in tqdm(budgets, desc="budgets", disable=None if progress is None else not progress, leave=False):
            found.append(self.search(self._score(base, float(budget)), starts=found[-1:]))
        return _undominated(self, base, [np.stack(found)])

    def _score(self, base: Base, budget: float) -> Score:
        scale = max(abs(mean_loss(self.prediction)), *(abs(end.loss) for end in self.prediction.endpoints), 1e-300)

        def score(members: np.ndarray) -> np.ndarray:
            rises = set_rises(self.prediction, members, base)
            over = rises - budget
            # Rises decide between sets of one weight alone.
            within = 1 + members @ self.weights / self.total - _ROUNDING * rises / (np.abs(rises) + scale)
            return np.where(over <= _ROUNDING * scale, within, -np.abs(over) / (np.abs(over) + scale))

        return score


@dataclass(frozen=True, eq=False, repr=False)
class Selection(Display):
    """A set of layers to average, with its predicted rise of the loss.

    Attributes:
        members: Names of the layers that are averaged, in the order of the network.
        base: Whose the others are: `"a"`, `"b"`, or `"mean"` where the rise is the mean of both merges.
        rise: Predicted loss of the merged network, minus the mean loss of the two.
        expansion_error: Expansion error of the rise: nine sets in ten on related networks are off by less.
        standard_error: Sampling error of the rise; NaN for a single batch.
        weight: Weight of the set.
        budget: The largest rise, in units of the loss.
        exact: Whether every set was looked at, or a search was made.
        choice: What the selection was made from.
    """

    members: tuple[str, ...]
    base: Base
    rise: float
    expansion_error: float
    standard_error: float
    weight: float
    budget: float
    exact: bool
    choice: Choice = field(repr=False)

    @classmethod
    def of(cls, choice: Choice, members: Bool[np.ndarray, " L"], base: Base) -> "Selection":
        """The selection of a set, with what is predicted of it."""
        return cls(
            members=choice.names(members),
            base=base,
            rise=float(set_rises(choice.prediction, members[None], base)[0]),
            expansion_error=float(set_errors(choice.prediction, members[None], base)[0]),
            standard_error=sampling_error(choice.prediction, [each[0] for each in points_of(members[None], base)]),
            weight=float(members @ choice.weights),
            budget=choice.budget,
            exact=choice.exact,
            choice=choice,
        )

    @property
    def share(self) -> float:
        """Weight of the set as a part of that of all layers."""
        return self.weight / self.choice.total

    @property
    def is_whole(self) -> bool:
        """Whether all layers are averaged."""
        return len(self.members) == len(self.choice.weights)

    def curve(self, *, progress: bool | None = None) -> "pd.DataFrame":
        """The trade-off between weight and rise for the selection's base, whatever the budget.

        Args:
            progress: Show a progress bar over budgets, of more than 20 layers; by default on a terminal and in
                notebooks.

        Returns:
            A row a set, from light to heavy: `weight`, `share`, `rise`, `expansion_error` and `layers`. No set is
            lighter than another with as little a rise; of more than 20 layers there are the best sets found for 21
            budgets.
        """
        import pandas as pd

        sets, prediction = self.choice.front(self.base, progress=progress), self.choice.prediction
        weights = sets @ self.choice.weights
        return pd.DataFrame(
            {
                "weight": weights,
                "share": weights / self.choice.total,
                "rise": set_rises(prediction, sets, self.base),
                "expansion_error": set_errors(prediction, sets, self.base),
                "layers": [self.choice.names(members) for members in sets],
            }
        )

    def merge(self, model_a: nn.Module, model_b: nn.Module, **options: Any) -> nn.Module:
        """The merged network, as it was predicted: its layers, what is frozen, and its batch normalisation.

        Args:
            model_a: The network at α = 0; it is not modified.
            model_b: The network at α = 1; it is not modified.
            **options: `batch_norm`, by default that of the prediction, `loader` and others of `merge`.

        Raises:
            OptionError: The base is `"mean"`, which is two merges.
        """
        if self.base == "mean":
            raise OptionError("base='mean' is the mean of two merges: select with base='a' or 'b' to merge.")
        prediction, members = self.choice.prediction, self.choice.members(self.members)
        point = points_of(members[None], self.base)[0][0]
        alphas = dict(zip(prediction.layers, point.tolist(), strict=True))
        return merge_predicted(prediction, alphas, model_a, model_b, base=self.base, **options)

    def verify(
        self,
        model_a: nn.Module,
        model_b: nn.Module,
        loader: Iterable[Any],
        *,
        measurements: int = 10,
        held_out: Iterable[Any] | None = None,
        caution: float | int = 2.0,
        **options: Any,
    ) -> "Verification":
        """Measure the selected set, and repair the selection by what is learned; see `verify_selection`."""
        from lmc_curvature.merging.verify import verify_selection

        return verify_selection(
            self,
            model_a,
            model_b,
            loader,
            measurements=measurements,
            held_out=held_out,
            caution=caution,
            options=options,
        )

    def _summary(self) -> Summary:
        return selection_summary(self)

    def __str__(self) -> str:
        return selection_text(self)


def _undominated(choice: Choice, base: Base, sets: Iterable[Bool[np.ndarray, "sets L"]]) -> np.ndarray:
    kept = np.zeros((0, len(choice.weights)), dtype=bool)
    for part in sets:
        kept = np.concatenate([kept, part])
        weights, rises = kept @ choice.weights, set_rises(choice.prediction, kept, base)
        order = np.lexsort((rises, -weights))
        below = np.minimum.accumulate(np.append(math.inf, rises[order][:-1]))
        kept = kept[order[rises[order] < below][::-1]]
    return kept


def _weights(prediction: BarrierPrediction, weight: Weight) -> Float[np.ndarray, " L"]:
    if isinstance(weight, Mapping):
        layer_indices(prediction.layers, weight)
        missing = next((layer for layer in prediction.layers if layer not in weight), None)
        if missing is not None:
            raise PartitionError(f"weight has no number for layer {missing!r}: name every layer.")
        return np.array([check_not_negative(f"weight[{layer!r}]", weight[layer]) for layer in prediction.layers])
    check_choice("weight", weight, ("parameters", "distance"))
    if weight == "distance":
        return np.asarray(prediction.distances, dtype=np.float64)
    if prediction.parameters is None:
        raise OptionError(
            "weight='parameters': this prediction comes from a file of an earlier version, which has no numbers of "
            "parameters. Use weight='distance' or numbers of your own, or predict again."
        )
    return prediction.parameters.astype(np.float64)
