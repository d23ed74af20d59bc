"""The contents of checkpoint files of any origin, read without running code."""

import mmap
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmc_curvature.checkpoints.pickles import code_in
from lmc_curvature.checkpoints.snapshots import read_tensors, with_prefix
from lmc_curvature.errors import CheckpointError, counted
from lmc_curvature.storage import parse_json

# In the order in which they are looked for; libraries write the same weights as several of them.
_IN_DIRECTORIES = tuple(f"*{kind}{index}" for kind in (".safetensors", ".bin") for index in (".index.json", ""))

_EXPECTED = "Expected safetensors, or what torch.save(model.state_dict(), path) writes."
_COMPRESSED = 1 << 24
_BYTES = re.compile(rb"c(builtins|__builtin__)\nbytearray\n")


def read_contents(path: Path, *, mapped: bool = False) -> Any:
    """What a checkpoint holds: tensors by name, or mappings that have such mappings in them.

    Args:
        path: A safetensors file, one of our snapshots, what `torch.save` wrote of tensors, the index of a checkpoint
            that is cut into shards, or a directory that holds one of these.
        mapped: Map tensors into memory from the files, which are read where numbers are used. Checksums are left
            unread, and what torch wrote before version 1.6 is read whole all the same.

    Raises:
        CheckpointError: The file, or a shard, is missing, damaged, or would have to run code to be read.
    """
    if path.is_dir():
        path = file_of(path)
    if not path.is_file():
        raise CheckpointError(f"Checkpoint {path} does not exist.")
    try:
        if path.name.endswith(".index.json"):
            return _read_shards(path, mapped=mapped)
        return (_read_safetensors if is_safetensors(path) else _read_torch)(path, mapped=mapped)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def file_of(directory: Path) -> Path:
    """The checkpoint, or its index, in a directory.

    Raises:
        CheckpointError: There is none, or there are several and no index.
    """
    for pattern in _IN_DIRECTORIES:
        found = sorted(directory.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:4])
            raise CheckpointError(
                f"{directory} is a directory with several checkpoints ({names}{', …' if len(found) > 4 else ''}), and "
                "no index that joins them: name one."
            )
        if found:
            return found[0]
    raise CheckpointError(
        f"Checkpoint {directory} is a directory, and holds neither model.safetensors nor pytorch_model.bin, nor the "
        "index of their shards (model.safetensors.index.json): name a file."
    )


def files_of(path: Path) -> list[Path]:
    """The files that a checkpoint is read from: itself, or an index and its shards.

    Raises:
        CheckpointError: It is a directory without a checkpoint, or the index is damaged.
    """
    path = file_of(path) if path.is_dir() else path
    return [path, *(shards_of(path) if path.name.endswith(".index.json") else ())]


def shards_of(index: Path) -> dict[Path, list[str]]:
    """The files of a checkpoint in shards, each with the names of the entries that it holds.

    Raises:
        CheckpointError: The index is damaged, or names what is no file beside it.
    """
    names_by_shard: dict[str, list[str]] = {}
    try:
        for name, shard in parse_json(index.read_text(encoding="utf-8"))["weight_map"].items():
            names_by_shard.setdefault(str(shard), []).append(name)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{index} is damaged, or is not the index of a checkpoint: it has no weight_map from names to files."
        ) from error
    for shard in names_by_shard:
        if shard != Path(shard).name or shard in ("", "..") or "\0" in shard or shard.endswith(".index.json"):
            raise CheckpointError(
                f"{index} names {shard!r} as a part of the checkpoint; expected names of files beside it."
            )
    return {index.parent / shard: names for shard, names in sorted(names_by_shard.items())}


def _read_shards(index: Path, *, mapped: bool) -> dict[str, Tensor]:
    entries = {}
    for path, names in shards_of(index).items():
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {index} says that it holds {counted(len(names), 'entry')}.")
        found = read_contents(path, mapped=mapped)
        absent = [name for name in names if not (isinstance(found, Mapping) and name in found)]
        if absent:
            raise CheckpointError(f"{path} lacks {absent[0]!r}, which {index} says that it holds.")
        entries |= {name: found[name] for name in names}
    return entries


def is_safetensors(path: Path) -> bool:
    """Tell a safetensors file from other checkpoints."""
    # A safetensors file is an 8-byte length followed by a JSON object.
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_safetensors(path: Path, *, mapped: bool) -> dict[str, Tensor]:
    _refuse_text(path)
    # safetensors maps tensors into memory by itself.
    entries, metadata = read_tensors(path, verify=not mapped)
    return entries if metadata is None else with_prefix(entries, "model.")


def _read_torch(path: Path, *, mapped: bool) -> Any:
    check_archive(path, verify=not mapped)
    try:
        with warnings.catch_warnings():
            # Of protocols: what cannot be read is an error below.
            warnings.simplefilter("ignore")
            # A file from before torch's archives cannot be mapped.
            can_map = mapped and zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    except PermissionError:
        raise
    # torch reports damage as whatever the unpickler stumbled over.
    except Exception as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        code = code_in(path) or (named and named[1])
        if code:
            raise CheckpointError(
                f"{path} is refused: it holds more than tensors, and reading it would run code that it names "
                f"({code}). Save the state dict alone: torch.save(model.state_dict(), path)."
            ) from error
        _refuse_text(path)
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: it is damaged, of another kind, or pickled by another protocol "
            f"than torch.save's own. {_EXPECTED}"
        ) from error


def check_archive(path: Path, *, verify: bool = True) -> None:
    """Refuse a file of torch that would fill memory, or an archive whose contents are not those of its checksums.

    Args:
        path: The file, which need not be an archive.
        verify: Compare the contents with the checksums, which torch writes and does not read.

    Raises:
        CheckpointError: It is damaged, or made to fill memory.
    """
    try:
        if not zipfile.is_zipfile(path):
            # What is mapped counts as memory once it is read.
            if path.stat().st_size and not is_safetensors(path):
                with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
                    _refuse_allocation(path, contents)
            return
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # torch compresses nothing but the code of its own language.
            if sum(member.file_size for member in members) > path.stat().st_size + _COMPRESSED:
                raise CheckpointError(f"{path} is refused: it unpacks to far more than its size. {_EXPECTED}")
            for member in members:
                # Zero is what torch writes if it is told not to compute checksums, and nothing is compared with None.
                member.CRC = member.CRC or None  # pyright: ignore[reportAttributeAccessIssue]
                if member.filename.endswith(".pkl"):
                    with archive.open(member) as stream:
                        # Without a number it unpacks all that there is, whatever it is said to be.
                        _refuse_allocation(path, stream.read(member.file_size))
            for member in members if verify else ():
                if member.CRC:
                    with archive.open(member) as stream:
                        while stream.read(1 << 20):
                            pass
    except (PermissionError, CheckpointError):
        raise
    # What reads archives stumbles over damage as pickles do.
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: its contents do not match their checksums.") from error


def _refuse_allocation(path: Path, contents: bytes | mmap.mmap) -> None:
    """Refuse a pickle that makes an array of bytes of any size: the one thing that torch lets it fill memory with."""
    if contents.find(b"bytearray\n") >= 0 and _BYTES.search(contents):
        raise CheckpointError(f"{path} is refused: it holds more than tensors (bytearray). {_EXPECTED}")


def _refuse_text(path: Path) -> None:
    """Refuse a text, such as a web page or a pointer of Git LFS in place of the file that it stands for."""
    with path.open("rb") as file:
        start = file.read(400).decode("utf-8", "replace")
    if start.strip() and "\ufffd" not in start[:-1] and all(char.isprintable() or char in "\n\r\t" for char in start):
        first = start.strip().splitlines()[0][:60]
        raise CheckpointError(f"{path} is a text, which begins with {first!r}. {_EXPECTED}")
