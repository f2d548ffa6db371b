"""Tables as data: the same ones become HTML and Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from laco_kernels.bench.page.text import escape_markdown

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Cell:
    """What stands in a table: a text, a smaller note below, ``"good"`` or ``"bad"``, a bar from 0 to 1."""

    text: str = ""
    note: str = ""
    kind: str = ""
    bar: float | None = None

    @property
    def percent(self) -> str:
        """How long the bar is drawn: never longer than its track."""
        return f"{100 * min(max(self.bar or 0.0, 0.0), 1.0):.1f}"


@dataclass(frozen=True)
class Line:
    """A line of a table: cells, or a heading over the whole width."""

    cells: tuple[Cell, ...] = ()
    heading: str = ""


@dataclass
class Table:
    """A title, the names of the columns, and lines."""

    columns: Sequence[str]
    lines: list[Line] = field(default_factory=list)
    title: str = ""
    closed: bool = False  # shown folded where that can be

    def add(self, *cells: Cell | str) -> None:
        """Add a line."""
        self.lines.append(Line(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)))

    def head(self, text: str) -> None:
        """Add a heading for the lines below it."""
        self.lines.append(Line(heading=text))

    def __len__(self) -> int:
        return sum(not line.heading for line in self.lines)

    def trimmed(self) -> Table:
        """Return the table without the columns in which no line has anything."""
        body = [line for line in self.lines if not line.heading]
        columns = list(enumerate(self.columns))[1:]
        return self.without(*(name for i, name in columns if all(line.cells[i].text in ("", "-") for line in body)))

    def without(self, *names: str) -> Table:
        """Return the table without some of its columns."""
        keep = [i for i, name in enumerate(self.columns) if name not in names]
        lines = [Line(tuple(line.cells[i] for i in keep), line.heading) if line.cells else line for line in self.lines]
        return Table([self.columns[i] for i in keep], lines, self.title, self.closed)

    def split(self, most: int) -> list[Table]:
        """Return the table whole where it is folded, headed or short; else its first lines, and the others folded."""
        if self.closed or len(self) <= most + most // 2 or len(self) < len(self.lines):
            return [self]
        rest = Table(self.columns, self.lines[most:], f"The other {len(self) - most}", closed=True)
        return [Table(self.columns, self.lines[:most], self.title), rest]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        rest = "---:|" * (len(self.columns) - 1)
        out = [f"| {' | '.join(map(escape_markdown, self.columns))} |", f"|---|{rest}"]
        for line in self.lines:
            if line.heading:
                out.append(f"| **{escape_markdown(line.heading)}** |{' |' * (len(self.columns) - 1)}")
            else:
                out.append(f"| {' | '.join(map(_cell, line.cells))} |")
        return "\n".join(out)


def _cell(cell: Cell) -> str:
    text = escape_markdown(cell.text)
    note = escape_markdown(cell.note)
    text = f"**{text}**" if cell.kind == "bad" and text else text
    return f"{text} ({note})" if note and text else text or note
