"""Sets of layers with the highest score: all of them are looked at, or where they are too many, large neighbourhoods.

Scores are of any kind: barriers are not monotone in the set, so nothing is concluded from a set for those around it.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

Score = Callable[[Bool[np.ndarray, "sets L"]], Float[np.ndarray, " sets"]]
"""Scores of sets of layers; those that are out of question score −∞."""

_AT_ONCE = 2**14
# Rounds of a search without a better set before it ends, and in all.
_PATIENCE, _ROUNDS = 4, 40


def every_set(base: Bool[np.ndarray, " L"], free: Int[np.ndarray, " k"]) -> Iterator[Bool[np.ndarray, "sets L"]]:
    """All 2^k sets that differ from one in some free layers alone, part by part."""
    for start in range(0, 2 ** len(free), _AT_ONCE):
        codes = np.arange(start, min(start + _AT_ONCE, 2 ** len(free)))
        members = np.tile(base, (len(codes), 1))
        members[:, free] = (codes[:, None] >> np.arange(len(free))) & 1
        yield members


def search_sets(
    score: Score,
    starts: Sequence[Bool[np.ndarray, " L"]],
    free: Int[np.ndarray, " k"],
    *,
    width: int = 12,
    seed: int = 0,
) -> Bool[np.ndarray, " L"]:
    """The set with the highest score that a search in large neighbourhoods finds (Shaw 1998).

    In each round the free layers are shuffled and dealt into groups of `width`. Of each group in turn, all 2^width
    choices are looked at, the other layers as they are, and the best is taken. A search ends after a few rounds without
    a better set; it is made from every start, and the best end is returned. Where one group holds all free layers, the
    first round is exhaustive.

    Args:
        score: The score.
        starts: Sets to begin with.
        free: Indices of the layers to choose from.
        width: Layers in a group.
        seed: Of the shuffles.
    """
    rng, found = np.random.default_rng(seed), []
    for start in starts:
        best, highest, idle = start, float(score(start[None])[0]), 0
        for _ in range(_ROUNDS):
            before = highest
            for group in _groups(rng.permutation(free), width):
                for members in every_set(best, group):
                    scores = score(members)
                    top = int(scores.argmax())
                    if scores[top] > highest:
                        best, highest = members[top], float(scores[top])
            idle = 0 if highest > before else idle + 1
            if idle == _PATIENCE or len(free) <= width:
                break
        found.append((highest, best))
    return max(found, key=lambda pair: pair[0])[1]


def _groups(indices: Int[np.ndarray, " k"], width: int) -> list[Int[np.ndarray, " _"]]:
    return np.array_split(indices, -(-len(indices) // width)) if len(indices) else []
