"""Our own files of training states: a network's entries, its optimiser's, and how far the training has come.

A snapshot is a safetensors file with the entries of the network under `model.` and those of the optimiser under
`optimizer.`; its header is that of `lmc_curvature.storage`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lmc_curvature.errors import CheckpointError, FileFormatError, NewerVersionError
from lmc_curvature.storage import check_header, make_header, read_safetensors, write_atomically

_KIND = "training state"


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
    with write_atomically(path) as temporary:
        safetensors.torch.save_file(entries, temporary, make_header(_KIND, entries, dict(metadata)))


def read_snapshot(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Read what `write_snapshot` wrote: the network's entries, the optimiser's entries, and the metadata.

    Raises:
        CheckpointError: The file is missing, damaged, not a snapshot, or from a newer version.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"Snapshot {path} does not exist.")
    entries, metadata = read_tensors(path)
    if metadata is None:
        raise CheckpointError(f"{path} is not a snapshot of a training run; load it with load_checkpoint.")
    return with_prefix(entries, "model."), with_prefix(entries, "optimizer."), metadata


def read_tensors(
    path: str | os.PathLike[str], *, verify: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a safetensors file, and the metadata of a snapshot; None if it is another's file.

    Args:
        path: The file.
        verify: Compare the contents of a snapshot with its checksum, for which it is read whole.

    Raises:
        CheckpointError: The file is damaged, or a snapshot from a newer version.
    """
    try:
        header, entries = read_safetensors(path, "pt")
        if header.get("kind") != _KIND:
            return entries, None
        return entries, check_header(path, header, entries, verify=verify)
    except NewerVersionError:
        raise
    except FileFormatError as error:
        raise CheckpointError(str(error)) from error


def with_prefix(entries: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in entries.items() if name.startswith(prefix)}
