"""Checkpoints tensor by tensor: read from mapped files and written to a safetensors file, and never held whole."""

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from lmc_curvature.checkpoints.entries import check_fit
from lmc_curvature.checkpoints.files import check_archive, file_of, is_safetensors, read_contents, shards_of
from lmc_curvature.checkpoints.unwrapping import DEPTH, unwrap, unwrap_alone, wrapper_in
from lmc_curvature.errors import CheckpointError
from lmc_curvature.storage import write_atomically

_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ALIGNMENT, _CHUNK = 8, 1 << 24
# The key of a header that is no entry.
_METADATA = "__metadata__"


class MappedCheckpoint:
    """The entries of a network in a checkpoint, each read from the file when its numbers are used.

    What was read is let go of again, so that no more of the file is in memory at a time than its largest entry.

    Args:
        path: The checkpoint; see `load_checkpoint`.
        own: The state dict of the network that it is of; None where that is not known.
        network: The name of the network's class, for errors.
        key: The key of the state dict; see `load_checkpoint`.
        strip_prefix: What the names of the entries begin with; see `load_checkpoint`.

    Attributes:
        path: The checkpoint.
        forms: Entry name to a tensor of the entry's shape and type without numbers, in the order of the file.
        ties: Further names of entries that are one tensor in the file, to the first.

    Raises:
        CheckpointError: The checkpoint cannot be read, or does not fit the network; see `load_checkpoint`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        own: Mapping[str, Any] | None = None,
        *,
        network: str = "the network",
        key: str | None = None,
        strip_prefix: str | None = None,
    ):
        self.path = Path(path)
        contents = read_contents(self.path, mapped=True)
        options = {"key": key, "strip_prefix": strip_prefix, "source": str(path)}
        if own is None:
            entries = unwrap_alone(contents, **options)
        else:
            entries, source = unwrap(contents, own, **options)
            check_fit(own, entries, source=source, network=network)
        for name, entry in entries.items():
            if not isinstance(entry, Tensor) or entry.layout != torch.strided or entry.is_meta or entry.is_nested:
                raise CheckpointError(f"{path} has an entry {name!r} that is no dense tensor, and cannot be streamed.")
            if entry.nbytes > max(entry.untyped_storage().nbytes(), _CHUNK):
                raise CheckpointError(
                    f"{path} has an entry {name!r} of shape {tuple(entry.shape)}, which stands for more numbers than "
                    "the file holds: save it by .contiguous()."
                )
        self.forms: dict[str, Tensor] = {name: torch.empty_like(t, device="meta") for name, t in entries.items()}
        first: dict[tuple[Any, ...], str] = {}
        places = {name: (t.data_ptr(), t.shape, t.stride()) for name, t in entries.items() if t.numel()}
        self.ties = {n: first[place] for n, place in places.items() if first.setdefault(place, n) != n}
        # One tensor may have several names.
        keys = {id(entry): keys for keys, entry in _tensors_in(contents)}
        self._keys = {name: keys[id(entry)] for name, entry in entries.items()}
        self._contents, self._in_memory = contents, 0
        # What cannot be mapped is in memory anyway.
        mapped = all(is_safetensors(file) or zipfile.is_zipfile(file) for file in files_of(self.path))
        self._most: float = max((t.nbytes for t in self.forms.values()), default=0) if mapped else math.inf

    @property
    def wrapping(self) -> str | None:
        """Within what the file has the entries, if not at the top and by plain names; None if it has."""
        for name, (*outer, stored) in self._keys.items():
            if outer:
                return f"under {'.'.join(map(str, outer))!r}"
            if stored != name and (inserted := wrapper_in(stored)):
                return f"with {inserted!r} in their names"
        return None

    def __getitem__(self, name: str) -> Tensor:
        """An entry, mapped from the file; to be let go of before the next is asked for."""
        size = self.forms[name].nbytes
        if self._in_memory + size > self._most:
            self._contents, self._in_memory = None, 0
            self._contents = read_contents(self.path, mapped=True)
        self._in_memory += size
        found: Any = self._contents
        for key in self._keys[name]:
            found = found[key]
        return found


def _tensors_in(contents: Mapping[Any, Any], keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Every tensor in nested mappings, as deep as state dicts are looked for, after the keys that lead to it."""
    for key, value in contents.items():
        if isinstance(value, Mapping) and len(keys) < DEPTH:
            yield from _tensors_in(value, (*keys, key))
        elif isinstance(value, Tensor):
            yield (*keys, key), value


def files_of(path: Path) -> list[Path]:
    """The files that a checkpoint consists of: itself, or its shards.

    Raises:
        CheckpointError: A directory holds no checkpoint, or several; or an index is damaged.
    """
    if path.is_dir():
        path = file_of(path)
    return list(shards_of(path)) if path.name.endswith(".index.json") else [path]


def digests_of(path: Path) -> dict[str, str]:
    """Name to SHA-256 of each file of a checkpoint, whose archives must be whole.

    Raises:
        CheckpointError: A file is damaged.
    """
    digests = {}
    for file in files_of(path):
        check_archive(file)
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file or of the first of its shards; none of other files."""
    first = files_of(path)[0]
    if not is_safetensors(first):
        return {}
    with safetensors.safe_open(first, "pt") as file:
        return dict(file.metadata() or {})


@dataclass(frozen=True)
class EntryForm:
    """The form of an entry to write.

    Attributes:
        dtype: Its type.
        shape: Its shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_stream(
    path: str | os.PathLike[str],
    forms: Mapping[str, EntryForm],
    parts: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file entry by entry, whole or not at all.

    Args:
        path: Where to write.
        forms: Entry name to its form, in an order in which they are well read.
        parts: Makes the numbers of an entry, in parts one after the other, on the CPU and of the entry's type.
        metadata: The metadata of the header.

    Raises:
        CheckpointError: An entry is of a type that safetensors does not know, or has a name that it cannot have; names
            it.
        OSError: The file cannot be written.
    """
    unknown = next((name for name, form in forms.items() if form.dtype not in _TYPES), None)
    if unknown is not None:
        raise CheckpointError(
            f"Entry {unknown!r} is of type {forms[unknown].dtype}, which safetensors files cannot hold."
        )
    for name in forms:
        if name == _METADATA or name != name.encode(errors="replace").decode():
            raise CheckpointError(f"An entry is called {name!r}, which no entry of a safetensors file can be.")
    # So that every entry begins at a multiple of its type's size.
    ordered = dict(sorted(forms.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {_METADATA: {"format": "pt", **metadata}}
    end = 0
    for name, form in ordered.items():
        start, end = end, end + form.bytes
        header[name] = {"dtype": _TYPES[form.dtype], "shape": list(form.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in ordered:
            for part in parts(name):
                file.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
