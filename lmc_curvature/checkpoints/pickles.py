"""What a pickle would run, found without running it.

Reading a pickle calls the functions and classes that it names. `torch.load(weights_only=True)` refuses all but those
that tensors need, though it names none where it does not know the pickle's protocol.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import pickletools
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

_COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
# What tensors, and mappings of them, are made of.
_HARMLESS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_\w+|collections\.OrderedDict|torch\.\w+Storage"
    r"|torch\.storage\.\w+Storage|torch\.(Size|device|Tensor|nn\.parameter\.Parameter)|_codecs\.encode"
)
# What any object's pickle may begin with: they say nothing of what it is.
_OPENINGS = ("copyreg._reconstructor", "copy_reg._reconstructor", "object", "set")
_NAME = re.compile(r"[\w.<>]+")
_DECOMPRESSED = 1 << 24

_Stream = io.BytesIO | io.BufferedReader


def code_in(path: Path) -> str | None:
    """The name of what a file would run when it is read as a pickle; None if it is no pickle, or names no code.

    Pickles of all protocols are looked into: alone, one after the other, compressed, and in the archives of torch.
    """
    found: list[str] = []
    with _until_an_error():
        for stream in _streams(path):
            with _until_an_error():
                # A list that grows keeps what was found before an error.
                for name in _names(stream):
                    found.append(re.sub(r"^(__builtin__|builtins)\.", "", name))  # noqa: PERF401
    names = [name for name in found if not _HARMLESS.fullmatch(name)]
    return next((name for name in names if name not in _OPENINGS), next(iter(names), None))


@contextlib.contextmanager
def _until_an_error() -> Iterator[None]:
    """Leave the block at any error: readers of pickles and archives tell the end, damage or another kind by many."""
    with contextlib.suppress(Exception):
        yield


def _streams(path: Path) -> Iterator[_Stream]:
    """The streams of a file in which pickles may lie."""
    with path.open("rb") as stream:
        start = stream.read(8)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    with archive.open(name) as file:
                        yield io.BytesIO(file.read(_DECOMPRESSED))
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            files = (archive.extractfile(member) for member in archive)
            yield from (io.BytesIO(file.read(_DECOMPRESSED)) for file in files if file is not None)
    elif opener := next((opener for magic, opener in _COMPRESSIONS.items() if start.startswith(magic)), None):
        with opener(path, "rb") as stream:
            yield io.BytesIO(stream.read(_DECOMPRESSED))
    elif start[:1] == b"x":
        yield io.BytesIO(zlib.decompressobj().decompress(path.read_bytes(), _DECOMPRESSED))
    else:
        with path.open("rb") as stream:
            yield stream


def _names(stream: _Stream) -> Iterator[str]:
    """The names of the functions and classes in the pickles of a stream, until something else follows."""
    while True:
        memo: dict[int, str | None] = {}
        strings: list[str] = []
        last: str | None = None
        for opcode, argument, _ in pickletools.genops(stream):
            kind = opcode.name
            if kind in ("GLOBAL", "INST"):
                yield from _NAME.findall(str(argument).replace(" ", "."))[:1]
            elif kind == "STACK_GLOBAL":
                yield ".".join(strings[-2:])
            if kind == "MEMOIZE":
                memo[len(memo)] = last
            elif kind.endswith("PUT"):
                memo[int(str(argument))] = last
            else:
                last = memo.get(int(str(argument))) if kind.endswith("GET") else None
                if "UNICODE" in kind or "STRING" in kind:
                    last = str(argument)
                if last is not None:
                    strings.append(last)
