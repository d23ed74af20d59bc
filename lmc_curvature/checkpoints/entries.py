"""Entries of a state dict: whether they are those of a network, and how they get into it."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lmc_curvature.errors import CheckpointError, counted
from lmc_curvature.objective.normalization import is_batch_counter

_SHOWN = 3


def load_entries(model: nn.Module, entries: Mapping[str, Any], *, source: str) -> None:
    """Copy state-dict entries into a network, strictly.

    Counters of batches that normalisation saw may be missing (files from before they existed), and so may the
    other names of a tied parameter (safetensors stores it once).

    Args:
        model: The network; changed in place.
        entries: Name to tensor; to anything for what modules keep beside their tensors (`_extra_state`).
        source: What the entries came from, for the error.

    Raises:
        CheckpointError: Entries are missing, unexpected, of another shape or kind of type (whole numbers where the
            network computes with real ones), or differ where they are one parameter; or the network holds no numbers.
    """
    own = model.state_dict()
    absent = [name for name, tensor in own.items() if isinstance(tensor, Tensor) and tensor.is_meta]
    if absent:
        raise CheckpointError(
            f"{source} cannot be loaded: entry {absent[0]!r} of the network is on the meta device, where there are no "
            "numbers. Build the network on the CPU."
        )
    check_fit(own, entries, source=source, network=type(model).__name__)
    # The entries of `own` share memory with the network, so loading a missing name from there changes nothing.
    model.load_state_dict({**own, **entries}, strict=True)


def check_fit(own: Mapping[str, Any], entries: Mapping[str, Any], *, source: str, network: str) -> None:
    """Refuse entries that are not those of a network.

    Args:
        own: The network's own state dict.
        entries: The entries.
        source: What they came from, for the error.
        network: The name of the network's class, for the error.

    Raises:
        CheckpointError: They do not fit; see `load_entries`.
    """
    found = "; ".join(summary(fault, names) for fault, names in faults(own, entries).items() if names)
    if found:
        raise CheckpointError(
            f"{source} does not fit {network} ({counted(len(own), 'entry')}): {found}. Build the network "
            "that the checkpoint was saved from."
        )


def faults(own: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the entries that keep a state dict from being loaded into a network, by what is wrong with them.

    Args:
        own: The network's own state dict.
        entries: The state dict.
    """
    tensors = {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}
    present = {_address(tensors[name]) for name in entries if name in tensors} - {0}
    optional = {name for name, tensor in tensors.items() if is_batch_counter(name) or _address(tensor) in present}
    reshaped = [
        f"{name} {tuple(entries[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if isinstance(entries.get(name), Tensor) and not is_lazy(tensor) and entries[name].shape != tensor.shape
    ]
    retyped = [
        f"{name} {_type(entries[name])} instead of {_type(tensor)}"
        for name, tensor in tensors.items()
        if isinstance(entries.get(name), Tensor) and not is_batch_counter(name) and not _casts(entries[name], tensor)
    ]
    return {
        "missing": [name for name in own if name not in entries and name not in optional],
        "unexpected": [name for name in entries if name not in own],
        "of another shape": reshaped,
        "of another type": retyped,
        # Of what has another shape or type there is nothing to compare.
        "tied to another, with other numbers": [] if reshaped or retyped else list(_untied(tensors, entries)),
    }


def _casts(entry: Tensor, own: Tensor) -> bool:
    """Whether copying an entry into a tensor of the network leaves it the same but for rounding."""
    kinds = [(tensor.layout, tensor.is_quantized, tensor.is_complex()) for tensor in (entry, own)]
    if kinds[0] != kinds[1] or entry.is_meta:
        return False
    if own.is_floating_point() or own.is_complex():
        return entry.is_floating_point() == own.is_floating_point()
    # What has another shape may take any memory.
    return entry.shape != own.shape or torch.equal(entry.to(own.dtype).to(entry.dtype), entry)


def _type(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f"{tensor.layout} of "
    return f"{layout}{tensor.dtype}{' without numbers' if tensor.is_meta else ''}"


def _untied(tensors: Mapping[str, Tensor], entries: Mapping[str, Any]) -> Iterator[str]:
    """The entries that are one parameter of the network with an earlier one, and have other numbers."""
    names: dict[tuple[Any, ...], str] = {}
    for name, own in tensors.items():
        if isinstance(entries.get(name), Tensor) and _address(own):
            first = names.setdefault((_address(own), own.shape, own.stride()), name)
            one, other = (entries[each].to(own.dtype) for each in (first, name))
            if not bool(((one == other) | ((one != one) & (other != other))).all()):
                yield f"{name} is {first} in the network"


def _address(tensor: Tensor) -> int:
    """Where the numbers of a tensor lie; 0 if it has none."""
    return 0 if is_lazy(tensor) else tensor.data_ptr()


def summary(fault: str, names: list[str]) -> str:
    """The number of names, what is wrong with them, and the first of them."""
    more = ", …" if len(names) > _SHOWN else ""
    return f"{len(names)} {fault} ({', '.join(names[:_SHOWN])}{more})"
