"""Entries that stay where they are, chosen by layers, by patterns or by what a network trains."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lmc_curvature.errors import OptionError, PartitionError, counted, suggest
from lmc_curvature.objective.network import tied_names
from lmc_curvature.objective.normalization import statistic_names, tracked_modules

Frozen = str | Iterable[str]
"""What `frozen_entries` understands: one of its choices, or several."""

REQUIRES_GRAD = "requires_grad"


def frozen_choices(frozen: Frozen) -> tuple[str, ...]:
    """The choices one by one.

    Raises:
        OptionError: They are not strings.
    """
    choices = (frozen,) if isinstance(frozen, str) else tuple(frozen) if isinstance(frozen, Iterable) else (frozen,)
    if not all(isinstance(choice, str) for choice in choices):
        raise OptionError(
            f"frozen={frozen!r}: expected names of layers, regular expressions for entries, or {REQUIRES_GRAD!r}."
        )
    return choices


def frozen_entries(
    frozen: Frozen, network: nn.Module, entries: Sequence[str], layers: Mapping[str, Sequence[str]]
) -> frozenset[str]:
    """Names of the entries that some choices freeze.

    Args:
        frozen: Each choice is the name of a layer, a module or an entry; or a regular expression, searched in the
            entry's name; or `"requires_grad"`, for the parameters of the network that do not require gradients, with
            the running statistics of modules all of whose own parameters are among them. Tied parameters are meant by
            each of their names.
        network: The network whose entries stay, and whose requires_grad is read.
        entries: Names of all entries that could move.
        layers: Layer name to the names of its entries.

    Raises:
        PartitionError: A choice matches nothing, or is no regular expression.
        OptionError: Every entry is frozen, or a choice is not a string.
    """
    members = {choice: _members(choice, network, entries, layers) for choice in frozen_choices(frozen)}
    found = frozenset(entry for chosen in members.values() for entry in chosen)
    if found and len(found) == len(entries):
        raise OptionError(
            f"frozen={frozen!r} freezes all {counted(len(entries), 'entry')}: leave at least one layer that moves."
        )
    return found


def _members(
    choice: str, network: nn.Module, entries: Sequence[str], layers: Mapping[str, Sequence[str]]
) -> Sequence[str]:
    if choice == REQUIRES_GRAD:
        untrained = _untrained(network)
        if not untrained:
            raise PartitionError(
                f"frozen={choice!r}: every parameter of the network whose entries stay (model_a, or model_b with "
                "base='b') requires gradients. Name the layers that stay, or switch their requires_grad off first."
            )
        return [entry for entry in entries if entry in untrained]
    names = {entry: {entry} for entry in entries}
    for alias, first in tied_names(network).items():
        names[first].add(alias)
    # A layer may be a module whose weight is tied to an earlier one's, which no partition counts among its entries.
    inside = {
        entry for entry, known in names.items() if any(f"{name}.".startswith(f"{choice}.") for name in known - {entry})
    }
    if choice in layers:
        return [*layers[choice], *inside.difference(layers[choice])]
    inside |= {entry for entry in entries if f"{entry}.".startswith(f"{choice}.")}
    if inside:
        return [entry for entry in entries if entry in inside]
    try:
        pattern = re.compile(choice)
    except re.error as error:
        raise PartitionError(f"frozen={choice!r} is neither a layer nor a regular expression: {error}.") from error
    found = [entry for entry, known in names.items() if any(map(pattern.search, known))]
    if not found:
        raise PartitionError(f"frozen={choice!r} matches no layer and no entry: {suggest(choice, [*layers, *entries])}")
    return found


def _untrained(network: nn.Module) -> set[str]:
    found = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    for name, module in tracked_modules(network):
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            found.update(statistic_names(name))
    return found
