"""Reading checkpoints without running code, and our own snapshot files.

A snapshot is a safetensors file with the entries of the network under `model.` and those of the optimiser
under `optimizer.`. Its header holds, as JSON under one key, the kind of file, the version of its format, metadata,
and a checksum. (safetensors writes several keys in a random order; with one, equal states are equal files.)
"""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lmc_curvature.errors import CheckpointError
from lmc_curvature.storage import check_version, write_atomically

_HEADER = "lmc_curvature"
_KIND = "training state"
_VERSION = "1"
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
        header, entries = _read_safetensors(path)
        if header.get("kind") == _KIND:
            _check_snapshot(path, header, entries)
            entries = _with_prefix(entries, "model.")
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
        if name not in entries and (name.endswith("num_batches_tracked") or tensor.data_ptr() in present)
    }
    missing = [name for name in own if name not in entries and name not in optional]
    unexpected = [name for name in entries if name not in own]
    reshaped = [
        f"{name} {tuple(entries[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in entries and entries[name].shape != tensor.shape
    ]
    problems = [
        _summary("missing", missing),
        _summary("unexpected", unexpected),
        _summary("of another shape", reshaped),
    ]
    if any(problems):
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__} ({len(own)} entries): "
            f"{'; '.join(filter(None, problems))}. Build the network that the checkpoint was saved from."
        )
    # The entries of `own` share memory with the network, so loading a missing name from there changes nothing.
    model.load_state_dict({**optional, **entries}, strict=True)


def write_snapshot(
    path: str | os.PathLike[str],
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Write a snapshot file, whole or not at all.

    Args:
        path: Where to write.
        model: The network's entries, on the CPU, none sharing memory with another.
        optimizer: The optimiser's entries, likewise.
        metadata: Anything JSON can hold.
    """
    entries = {f"model.{name}": tensor for name, tensor in model.items()}
    entries |= {f"optimizer.{name}": tensor for name, tensor in optimizer.items()}
    header = {"kind": _KIND, "version": _VERSION, "metadata": dict(metadata), "checksum": _checksum(entries, metadata)}
    with write_atomically(path) as temporary:
        save_file(entries, temporary, {_HEADER: json.dumps(header)})


def read_snapshot(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Read what `write_snapshot` wrote: the network's entries, the optimiser's entries, and the metadata.

    Raises:
        CheckpointError: The file is missing, damaged, not a snapshot, or from a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"Snapshot {path} does not exist.")
    header, entries = _read_safetensors(path)
    _check_snapshot(path, header, entries)
    return (
        _with_prefix(entries, "model."),
        _with_prefix(entries, "optimizer."),
        header["metadata"],
    )


def _with_prefix(entries: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in entries.items() if name.startswith(prefix)}


def _is_safetensors(path: Path) -> bool:
    # A safetensors file is an 8-byte length followed by a JSON object.
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return our header, empty in a foreign file, and the tensors."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged or is not a safetensors file ({error}).") from error


def _check_snapshot(path: Path, header: Mapping[str, Any], entries: Mapping[str, Tensor]) -> None:
    if header.get("kind") != _KIND:
        raise CheckpointError(f"{path} is not a snapshot of a training run; load it with load_checkpoint.")
    check_version(path, header.get("version"), _VERSION)
    if header.get("checksum") != _checksum(entries, header.get("metadata", {})):
        raise CheckpointError(f"{path} is damaged: its contents do not match its checksum.")


def _checksum(entries: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(entries):
        tensor = entries[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({_first_line(error)}).") from error
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
        entries = _with_prefix(entries, "module.")
    return entries


def _summary(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = ", …" if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
