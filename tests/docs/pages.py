"""The blocks of the documentation's pages, and how they are run."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"

_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: The file it stands in.
        line: Lines of the page before its first.
        language: What stands behind the fence: python, bash or text.
        title: The name of the file that it is the text of; empty for others.
        text: What stands between the fences.
    """

    page: Path
    line: int
    language: str
    title: str
    text: str

    def run(self, namespace: dict) -> None:
        """Execute a block of Python, so that errors name the page and the line."""
        exec(compile("\n" * self.line + self.text, str(self.page), "exec"), namespace)

    def commands(self) -> Iterator[list[str]]:
        """The words of each line of a block of shell commands, without the file that their output goes to."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words[: words.index(">")] if ">" in words else words


def pages() -> list[Path]:
    """Every page of the site that is a file of its own."""
    return sorted(DOCS.rglob("*.md"))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start(3)].count("\n"), found[1], found[2] or "", found[3])
        for found in _FENCE.finditer(text)
    ]
