"""Checkpoints of any origin are read into a network, without running code."""

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmc_curvature.checkpoints.snapshots import read_tensors, with_prefix
from lmc_curvature.errors import CheckpointError
from lmc_curvature.objective.normalization import is_batch_counter

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_SHOWN = 3


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint into a network, strictly: the same entries with the same shapes.

    Accepts safetensors files, our own snapshots, and what `torch.save` wrote as long as it holds tensors
    only. A state dict may lie under `state_dict`, `model_state_dict` or `model`, and its names may begin with
    `module.` (DataParallel) or contain `_orig_mod.` (torch.compile).

    Args:
        model: The network; changed in place.
        path: The file.

    Returns:
        The same network.

    Raises:
        CheckpointError: The file is missing, damaged, would have to run code to be read, holds no state dict,
            or does not fit the network.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"Checkpoint {path} {'is a directory' if path.is_dir() else 'does not exist'}.")
    if _is_safetensors(path):
        entries, metadata = read_tensors(path)
        if metadata is not None:
            entries = with_prefix(entries, "model.")
    else:
        entries = _read_torch(path)
    load_entries(model, _unwrap_names(entries, model), source=str(path))
    return model


def load_entries(model: nn.Module, entries: Mapping[str, Tensor], *, source: str) -> None:
    """Copy state-dict entries into a network, strictly.

    Counters of batches that normalisation saw may be missing (files from before they existed), and so may the
    other names of a tied parameter (safetensors stores it once).

    Args:
        model: The network; changed in place.
        entries: Name to tensor.
        source: What the entries came from, for the error.

    Raises:
        CheckpointError: Entries are missing, unexpected, or of another shape.
    """
    own = model.state_dict()
    present = {own[name].data_ptr() for name in entries if name in own}
    optional = {
        name: tensor
        for name, tensor in own.items()
        if name not in entries and (is_batch_counter(name) or tensor.data_ptr() in present)
    }
    missing = [name for name in own if name not in entries and name not in optional]
    unexpected = [name for name in entries if name not in own]
    reshaped = [
        f"{name} {tuple(entries[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in entries and entries[name].shape != tensor.shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    found = "; ".join(_summary(fault, names) for fault, names in faults.items() if names)
    if found:
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__} ({len(own)} entries): {found}. Build the network that the "
            "checkpoint was saved from."
        )
    # The entries of `own` share memory with the network, so loading a missing name from there changes nothing.
    model.load_state_dict({**optional, **entries}, strict=True)


def _is_safetensors(path: Path) -> bool:
    # A safetensors file is an 8-byte length followed by a JSON object.
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint: it is damaged or of another kind."
            ) from error
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors, and reading it would run code that it names "
            f"({named[1]}). Save the state dict alone: torch.save(model.state_dict(), path)."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        # torch reports damage as whatever the unpickler stumbled over.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({reason}).") from error
    return _unwrap_state_dict(contents, path)


def _unwrap_state_dict(contents: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(contents, Mapping) and isinstance(contents.get(wrapper), Mapping):
            contents = contents[wrapper]
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path} holds {type(contents).__name__}; expected a state dict, name to tensor.")
    strange = [str(name) for name, value in contents.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"{path} is not a state dict: {_summary('not tensors', strange)}. Its state dict may lie at the top or "
            f"under {', '.join(repr(name) for name in _WRAPPERS)}."
        )
    return dict(contents)


def _unwrap_names(entries: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    own = model.state_dict().keys()
    if not any("_orig_mod." in name for name in own):
        entries = {name.replace("_orig_mod.", ""): tensor for name, tensor in entries.items()}
    # A network may itself have a submodule called "module".
    if entries and all(name.startswith("module.") for name in entries) and not entries.keys() & own:
        entries = with_prefix(entries, "module.")
    return entries


def _summary(fault: str, names: list[str]) -> str:
    more = ", …" if len(names) > _SHOWN else ""
    return f"{len(names)} {fault} ({', '.join(names[:_SHOWN])}{more})"
