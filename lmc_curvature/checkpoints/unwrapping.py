"""The state dict of a network among what a checkpoint holds, under the names that the network has for its entries."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lmc_curvature.checkpoints.entries import faults, summary
from lmc_curvature.errors import CheckpointError

DEPTH = 2
"""How many keys may lead to a state dict."""

_SHOWN = 6
# DataParallel and AveragedModel, torch.compile, FSDP, and activation checkpointing name what they wrap so.
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Of these, what no module of one's own is called.
_INSERTED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_EXTRA_STATE = "_extra_state"
# What AveragedModel and modules with a state of their own keep beside a network's entries.
_BOOKKEEPING = ("n_averaged", _EXTRA_STATE)


@dataclasses.dataclass(frozen=True)
class _Reading:
    """One way to read a checkpoint.

    Attributes:
        key: The keys that lead to its state dict, joined by dots; empty at the top.
        prefix: What the names lose.
        entries: What is under names that begin with the prefix, by the network's names where it has them.
        others: The names of all other entries.
    """

    key: str
    prefix: str
    entries: dict[str, Any]
    others: list[str]

    def __str__(self) -> str:
        if self.others and not self.prefix:
            # Entries under other prefixes are left out for that alone.
            return f"key={self.key!r} and strip_prefix=''"
        options = {"key": self.key, "strip_prefix": self.prefix}
        return " and ".join(f"{name}={value!r}" for name, value in options.items() if value) or "key=''"


def unwrap(
    contents: Any, own: Mapping[str, Any], *, key: str | None, strip_prefix: str | None, source: str
) -> tuple[dict[str, Any], str]:
    """Find the entries of a network in what a checkpoint holds.

    Args:
        contents: What the checkpoint holds.
        own: The network's own state dict.
        key: The keys that lead to the state dict, joined by dots; by default those that fit.
        strip_prefix: What the names lose, all others being left out; by default what fits every entry.
        source: The checkpoint's name, for errors.

    Returns:
        The entries, and the place where they are, for errors. If nothing fits, what is nearest to fitting.

    Raises:
        CheckpointError: There is no state dict, it is not under the key, no name has the prefix, or there are several
            ways to read the network's entries.
    """
    candidates = dict(_state_dicts(contents))
    chosen = candidates if key is None else {key: candidates[key]} if key in candidates else {}
    if not chosen:
        raise CheckpointError(_absence(contents, candidates, key, source))
    readings = [reading for label, found in chosen.items() for reading in _readings(label, found, own, strip_prefix)]
    if not readings:
        names = [name for found in chosen.values() for name in found]
        raise CheckpointError(f"{source} has no name that begins with {strip_prefix!r}; its names are {_list(names)}.")
    fits = [reading for reading in readings if not any(faults(own, reading.entries).values())]
    if fits and key is None:
        # Elsewhere there may be all of the network's entries and more, such as a criterion's beside a moving average.
        needed = {name for name in own if not _is_bookkeeping(name)}
        fits += [r for r in readings if r not in fits and r.key != fits[0].key and needed <= r.entries.keys()]
    if len(fits) > 1 or (fits and fits[0].others and strip_prefix is None):
        raise CheckpointError(_ambiguity(fits, source))
    nearest = fits[0] if fits else max(readings, key=lambda reading: len(reading.entries.keys() & own.keys()))
    place = f"{source} (read with {nearest})" if nearest.key or nearest.prefix else source
    return ({} if fits else dict.fromkeys(nearest.others)) | nearest.entries, place


def unwrap_alone(contents: Any, *, key: str | None, strip_prefix: str | None, source: str) -> dict[str, Any]:
    """The entries of the one state dict in what a checkpoint holds, without what wrappers insert into their names.

    Args:
        contents: What the checkpoint holds.
        key: The keys that lead to the state dict, joined by dots; not needed if there is one.
        strip_prefix: What the names lose, all others being left out.
        source: The checkpoint's name, for errors.

    Raises:
        CheckpointError: There is no state dict, it is not under the key, no name has the prefix, or there are several.
    """
    candidates = dict(_state_dicts(contents))
    if not candidates or (key is not None and key not in candidates):
        raise CheckpointError(_absence(contents, candidates, key, source))
    if key is None and len(candidates) > 1:
        raise CheckpointError(
            f"{source} has state dicts under {_list(candidates)}: choose one with key (--key on the command line), or "
            "name the network (--model), which tells its own."
        )
    own = candidates[next(iter(candidates)) if key is None else key]
    prefix = f"{strip_prefix.rstrip('.')}." if strip_prefix else ""
    short = {name: own[full] for full, name in _names_alone(own).items()}
    entries = {name.removeprefix(prefix): entry for name, entry in short.items() if name.startswith(prefix)}
    if not entries:
        raise CheckpointError(f"{source} has no name that begins with {prefix!r}; its names are {_list(short)}.")
    return entries


def _state_dicts(contents: Any, key: str = "", depth: int = DEPTH) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping that has tensors in nested mappings, by its keys, without whatever else is in it."""
    if not isinstance(contents, Mapping):
        return
    named = {name: value for name, value in contents.items() if isinstance(name, str)}
    if any(isinstance(value, Tensor) for value in named.values()):
        kept = {name: value for name, value in named.items() if isinstance(value, Tensor) or _is_extra_state(name)}
        yield key, kept
    if depth:
        for name, value in named.items():
            yield from _state_dicts(value, f"{key}.{name}" if key else name, depth - 1)


def _readings(
    key: str, found: Mapping[str, Any], own: Mapping[str, Any], strip_prefix: str | None
) -> Iterator[_Reading]:
    """The ways to read a state dict: without each prefix under which it has names of the network, and as it is."""
    own_names = {short: name for name, short in _short_names(own).items()}
    short_names = _short_names(found)
    if any(map(_WRAPPER.search, short_names.values())):
        # What wrappers inserted is all that tells two entries apart.
        own_names = {name: name for name in own}
    heads = {head for short in short_names.values() for head in _heads(short) if short[len(head) :] in own_names}
    prefixes = {"", *heads}
    if strip_prefix is not None:
        prefixes = {f"{strip_prefix.rstrip('.')}." if strip_prefix else ""}
    for prefix in sorted(prefixes):
        entries, others = {}, []
        for name, short in short_names.items():
            # A prefix may be given as it stands in the file, or without what wrappers inserted.
            if not prefix and short not in own_names and short.startswith(tuple(heads)):
                others.append(name)
                continue
            if short.startswith(prefix):
                rest = short.removeprefix(prefix)
            elif name.startswith(prefix):
                rest = _WRAPPER.sub("", name.removeprefix(prefix))
            else:
                others.append(name)
                continue
            entries[own_names.get(rest, rest)] = found[name]
        entries = {name: value for name, value in entries.items() if name in own or not _is_bookkeeping(name)}
        others = [name for name in others if not _is_bookkeeping(name)]
        if entries or not strip_prefix:
            yield _Reading(key, prefix, entries, others)


def _short_names(names: Iterable[str]) -> dict[str, str]:
    """Names without what wrappers insert into them, by the names; as they are if two would be the same."""
    short = {name: _WRAPPER.sub("", name) for name in names}
    return short if len(set(short.values())) == len(short) else {name: name for name in short}


def _names_alone(names: Iterable[str]) -> dict[str, str]:
    """The same without a network, which may have a module called `module`: that goes where all names begin with it."""
    short = {name: _INSERTED.sub("", name) for name in names if not _is_bookkeeping(name)}
    while short and all(name.startswith("module.") for name in short.values()):
        short = {full: name.removeprefix("module.") for full, name in short.items()}
    return short if len(set(short.values())) == len(short) else {name: name for name in short}


def wrapper_in(name: str) -> str | None:
    """What a wrapper has inserted into a name, such as `module.`; None where none has."""
    found = _WRAPPER.search(name)
    return None if found is None else found[0]


def _heads(name: str) -> Iterator[str]:
    """The beginnings of a name that end with a dot."""
    return (name[: dot.end()] for dot in re.finditer(r"\.", name))


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA_STATE


def _is_bookkeeping(name: str) -> bool:
    return name.rpartition(".")[2] in _BOOKKEEPING


def _absence(contents: Any, candidates: Mapping[str, Any], key: str | None, source: str) -> str:
    if not isinstance(contents, Mapping):
        return f"{source} holds {type(contents).__name__}; expected a state dict, name to tensor."
    if key is not None and candidates:
        return f"{source} has no state dict under key={key!r}; its state dicts are under {_list(candidates)}."
    return f"{source} holds no state dict, name to tensor; at the top it has {_list(map(str, contents)) or 'nothing'}."


def _ambiguity(fits: list[_Reading], source: str) -> str:
    on_the_command_line = "(--key, --strip-prefix on the command line)"
    if len(fits) == 1:
        return (
            f"{source} has the network's entries, and beside them {summary('more', fits[0].others)}. To leave those "
            f"out, pass {fits[0]} {on_the_command_line}."
        )
    ways = "; ".join(map(str, fits[:_SHOWN])) + ("; …" if len(fits) > _SHOWN else "")
    return f"{source} has the network's entries in {len(fits)} places. Choose one of {ways} {on_the_command_line}."


def _list(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")
