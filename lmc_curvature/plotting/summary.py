"""What an object is, in ten lines of text or, in a notebook, in a small table with a small picture."""

import base64
import html
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Lines and columns of a text, and dots an inch of a picture.
LINES, COLUMNS, _DOTS = 10, 100, 96


@dataclass(frozen=True)
class Summary:
    """What an object is, its key numbers, and how to see more.

    Attributes:
        title: What it is, in a line.
        facts: Name to text: numbers with their errors, and what they are of; no more than eight are shown.
        more: What to call to see more; nothing if all is shown.
        draw: Draws a small picture; None if there is none.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    more: str = ""
    draw: "Callable[[], Figure] | None" = None

    def text(self) -> str:
        """Ten lines at most, of at most a hundred columns."""
        rows = self._rows()
        width = max(map(len, rows), default=0)
        lines = [self.title, *(f"  {name:<{width}}  {fact}" for name, fact in rows.items())]
        return "\n".join(_one_line(line) for line in lines)

    def html(self) -> str:
        """A table, and the picture under it; what names hold is text, whatever it looks like."""
        rows = "".join(
            f'<tr><th style="text-align: left">{html.escape(name)}</th>'
            f'<td style="text-align: left">{html.escape(_one_line(fact))}</td></tr>'
            for name, fact in self._rows().items()
        )
        title = html.escape(_one_line(self.title))
        picture = f"<div>{_image(self.draw(), title)}</div>" if self.draw is not None else ""
        return f'<div><div style="font-weight: bold">{title}</div><table>{rows}</table>{picture}</div>'

    def _rows(self) -> dict[str, str]:
        room = LINES - 1 - bool(self.more)
        shown = dict([*self.facts.items()][:room])
        return shown | {"more": self.more} if self.more else shown


class Display:
    """Base of what shows its summary as `repr`, and in notebooks."""

    def _summary(self) -> Summary:
        raise NotImplementedError

    def __repr__(self) -> str:
        return self._summary().text()

    def _repr_html_(self) -> str:
        return self._summary().html()


def some(names: Sequence[str], columns: int = 60) -> str:
    """As many of some names as there is room for, one at least, and how many there are besides."""
    ends = itertools.accumulate(len(name) + 2 for name in names)
    count = max(sum(end <= columns for end in ends), 1)
    shown = ", ".join(names[:count]) or "none"
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown


def _one_line(text: str) -> str:
    """A text on one line, cut where it is too long."""
    indent = text[: len(text) - len(text.lstrip())]
    joined = indent + " ".join(text.split()) if "\n" in text else text
    return joined if len(joined) <= COLUMNS else joined[: COLUMNS - 1].rstrip() + "…"


def _image(figure: "Figure", title: str) -> str:
    from lmc_curvature.plotting.style import look

    file = io.BytesIO()
    with look():
        figure.savefig(file, format="png", dpi=_DOTS)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{title}" src="data:image/png;base64,{data}"/>'
