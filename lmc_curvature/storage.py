"""Files that are written whole or not at all, and never run code when they are read."""

import contextlib
import glob
import hashlib
import json
import os
import platform
import re
import signal
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import safetensors.numpy

from lmc_curvature import __version__
from lmc_curvature.errors import CheckpointError, FileFormatError, NewerVersionError, OptionError

_HEADER = "lmc_curvature"
_VERSION = "1"
_PARTIAL, _SHOWN = ".partial", 200
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it over `path` when the block ends without an error.

    A reader sees the old file or the new one, also when the process is killed or the disk fills up. Parent
    directories are made, and what killed processes left of the same file is removed.

    Raises:
        OSError: The file cannot be written; the error has its name and the reason.
    """
    path = Path(path)
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(path)
        # Others tell by the process whether the file is still written.
        head = f".{path.name}.{_MACHINE}-{os.getpid()}-"
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=head, suffix=_PARTIAL)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            # mkstemp makes files private; give this one the permissions a plain open() would have given.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(directory: str | os.PathLike[str], *, what: str | None = None) -> None:
    """Check that files can be written below a directory, which need not exist yet. Nothing is left behind.

    Args:
        directory: The directory.
        what: The name that messages give to what is to be written; by default the directory's.

    Raises:
        OptionError: It, or what it would lie in, is a file, or may not be written.
    """
    directory = Path(directory)
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    named = what or str(directory)
    subject = str(existing) if named == str(existing) else f"{named} cannot be written: {existing}"
    if not existing.is_dir():
        raise OptionError(f"{subject} is a file; expected a directory, or the name of one to be made.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OptionError(f"{subject}: {error.strerror}.") from error


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Within the block, let errors of the system about no file, or about a temporary one, name the path."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        # safetensors has its own class for the errors of the system, with their numbers in the message.
        number = re.search(r"os error (\d+)", str(error))
        code = error.errno if isinstance(error, OSError) else number and int(number[1])
        filename = getattr(error, "filename", None)
        if code is None or not (filename is None or Path(filename).parent == path or str(filename).endswith(_PARTIAL)):
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def remove_partial_files(directory: str | os.PathLike[str]) -> None:
    """Remove what `write_atomically` left in a directory when its process was killed."""
    for path in Path(directory).glob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def _remove_left_over(path: Path) -> None:
    """Remove what processes of this machine that are gone have left of a file."""
    head = f".{path.name}.{_MACHINE}-"
    for left in path.parent.glob(f"{glob.escape(head)}*{_PARTIAL}"):
        number = left.name.removeprefix(head).partition("-")[0]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            left.unlink(missing_ok=True)


def discard_if_damaged(path: Path, load: Callable[[Path], object]) -> None:
    """Remove a file that cannot be read, with a warning that names it, so that it is computed again.

    Raises:
        NewerVersionError: The file was written by another release; it is left alone.
    """
    if not path.is_file():
        return
    try:
        load(path)
    except NewerVersionError:
        raise
    except (FileFormatError, CheckpointError) as error:
        warnings.warn(f"{error} It is computed again.", stacklevel=2)
        path.unlink(missing_ok=True)


def save_arrays(path: str | os.PathLike[str], kind: str, arrays: Mapping[str, np.ndarray], **metadata: Any) -> None:
    """Write named arrays and JSON metadata as one safetensors file, atomically.

    Args:
        path: Where to write.
        kind: What the file holds; `load_arrays` refuses a file of another kind.
        arrays: Name to array, of any shape and any dtype that safetensors knows.
        **metadata: Anything JSON can hold.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with write_atomically(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary, make_header(kind, arrays, metadata))


def load_arrays(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save_arrays` wrote: the arrays and the metadata.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file is damaged, is of another kind, or was written by a newer version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    header, arrays = read_safetensors(path, "np")
    if header.get("kind") != kind:
        raise FileFormatError(f"{path} holds {header.get('kind')!r}; expected a file of kind {kind!r}.")
    return arrays, check_header(path, header, arrays)


def make_header(kind: str, entries: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, str]:
    """The header of a safetensors file of ours, which holds arrays or tensors.

    It has one key: safetensors writes several in no fixed order, and the same result should give the same bytes.
    """
    contents = {"kind": kind, "version": _VERSION, "metadata": metadata, "checksum": _checksum(entries, metadata)}
    return {_HEADER: json.dumps({**contents, "release": __version__})}


def read_safetensors(
    path: str | os.PathLike[str], framework: Literal["np", "pt"]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header that `make_header` made, empty in a file of others, and the arrays of NumPy or tensors of torch.

    Raises:
        FileFormatError: The file is damaged, or is not a safetensors file.
    """
    try:
        with _signals_deferred(), safetensors.safe_open(path, framework) as file:
            header = parse_json((file.metadata() or {}).get(_HEADER, "{}"))
            return dict(header), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    # Types that NumPy does not have, and sizes that no memory has, are reported in many ways.
    except Exception as error:
        raise FileFormatError(f"{path} is damaged or is not a safetensors file ({error}).") from error


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """Within the block, keep interrupts for its end: code that is not Python's turns them into errors of its own."""
    kept: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda number, _frame: kept.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in kept[:1]:
            signal.raise_signal(number)


def check_header(
    path: str | os.PathLike[str], header: Mapping[str, Any], entries: Mapping[str, Any], *, verify: bool = True
) -> dict[str, Any]:
    """Return the metadata of a file of ours, whose version, and checksum if that is to be verified, must be right.

    Raises:
        NewerVersionError: The file was written by another release.
        FileFormatError: The file is damaged.
    """
    check_version(path, header.get("version"), _VERSION, release=header.get("release"))
    metadata = header.get("metadata", {})
    with refuse_damage(path):
        if verify and header.get("checksum") != _checksum(entries, metadata):
            raise FileFormatError(f"{path} is damaged: its contents do not match its checksum.")
        return dict(metadata)


@contextlib.contextmanager
def refuse_damage(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within the block, which makes something of a file's contents, let what fails be the damage of that file.

    Raises:
        FileFormatError: The contents are of other types, shapes or names, or too deeply nested.
    """
    try:
        yield
    except FileFormatError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:_SHOWN]
        raise FileFormatError(f"{path} is damaged: its contents are not what they should be ({said}).") from error


def check_arrays(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, str], **sizes: int) -> None:
    """Check that arrays have finite numbers and the shapes that belong together.

    Args:
        arrays: Name to array.
        shapes: Names of arrays that must be there to the names of their dimensions, with spaces between them, or their
            sizes. What has one name has one size.
        **sizes: Those that are known.

    Raises:
        ValueError: An array is missing, has another shape, or numbers that are none.
    """
    for name, dimensions in shapes.items():
        if name not in arrays:
            raise ValueError(f"there is no array {name!r}")
        array, names = arrays[name], dimensions.split()
        if len(names) != array.ndim or not all(
            size == (int(each) if each.isdecimal() else sizes.setdefault(each, size))
            for each, size in zip(names, array.shape, strict=True)
        ):
            raise ValueError(f"{name!r} has shape {array.shape}; expected ({', '.join(names)})")
        if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise ValueError(f"{name!r} has values that are no finite numbers")


def parse_json(text: str) -> Any:
    """What a text in JSON says.

    Raises:
        ValueError: It is not JSON, is nested too deeply, or has halves of characters in it, which no file can have.
    """
    try:
        contents = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(contents, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return contents


def write_json(path: str | os.PathLike[str], contents: Mapping[str, Any]) -> None:
    """Write anything JSON can hold, atomically and for people to read."""
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], version: str) -> dict[str, Any]:
    """Read what `write_json` wrote, without the key `version`. A file without that key is of the given version.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file is damaged.
        NewerVersionError: The file is of another version.
    """
    try:
        contents = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path} is damaged ({error}).") from error
    if not isinstance(contents, dict):
        raise FileFormatError(f"{path} is damaged: it holds {type(contents).__name__}; expected names and values.")
    check_version(path, contents.pop("version", version), version)
    return contents


def check_version(path: str | os.PathLike[str], found: Any, known: str, *, release: str | None = None) -> None:
    """Raise `NewerVersionError` unless a file is of the version that this release reads.

    Args:
        path: The file, for the error.
        found: The version of its format.
        known: The version that this release reads.
        release: The release that wrote it, if it says so.
    """
    if found == known:
        return
    older = found in map(str, range(int(known)))
    age, remedy = ("an older", "Use that release") if older else ("a newer", "Upgrade lmc_curvature")
    writer = f"{age} release" + (f", {release}" if release else "")
    raise NewerVersionError(
        f"{path} has format version {found!r}, of {writer}; this release reads {known!r}. {remedy}."
    )


def _checksum(entries: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, entry in sorted(entries.items()):
        digest.update(f"{name} {entry.dtype} {tuple(entry.shape)}".encode())
        digest.update(_raw(entry))
    return digest.hexdigest()


def _raw(entry: Any) -> bytes | memoryview:
    if isinstance(entry, np.ndarray):
        return entry.tobytes()
    # NumPy has no type for some of torch's.
    import torch

    return entry.contiguous().reshape(-1).view(torch.uint8).numpy().data
