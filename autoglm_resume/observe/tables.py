"""Tables: rich on a terminal, aligned plain text elsewhere, the same content in both.

Lists of facts are plain lines on a terminal too: what people copy from them, such as a digest, must
not be folded into a column.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from autoglm_resume.output import printable

NAME = 32
"""Characters up to which the first column is never folded."""


@dataclass
class Table:
    """Columns in `right` are aligned to the right; without `headers` it is a list of facts."""

    headers: Sequence[str] = ()
    right: frozenset[int] = frozenset()
    rows: list[tuple[tuple[str, ...], str]] = field(default_factory=list)

    def add(self, *cells: object, style: str = "") -> None:
        """A row; None shows as nothing. `style` is a rich style such as `red`, for terminals."""
        texts = ("" if cell is None else printable(str(cell)) for cell in cells)
        self.rows.append((tuple(texts), style))

    def lines(self) -> list[str]:
        """As plain text."""
        return [self._line(cells, self._widths()) for cells in self._shown()]

    def fits(self, width: int) -> bool:
        """Whether a terminal of `width` columns shows it without folding."""
        widths = self._widths()
        return sum(widths) + 3 * (len(widths) - 1) <= width

    def only(self, *columns: int) -> Table:
        """The same rows with only these columns."""
        rows = [(tuple(cells[n] for n in columns), style) for cells, style in self.rows]
        right = frozenset(place for place, n in enumerate(columns) if n in self.right)
        return Table([self.headers[n] for n in columns], right, rows)

    def _shown(self) -> list[tuple[str, ...]]:
        headers = [tuple(self.headers)] if self.headers else []
        return headers + [cells for cells, _ in self.rows]

    def _widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(*self._shown(), strict=True)]

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        padded = [
            cell.rjust(width) if index in self.right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    def print(self, stream: TextIO) -> None:
        """On `stream`, in the way it can show."""
        if self.headers and terminal(stream):
            self._print_rich(stream)
        else:
            stream.write("".join(f"{line}\n" for line in self.lines()))

    def _print_rich(self, stream: TextIO) -> None:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            header_style="bold",
        )
        for index, header in enumerate(self.headers):
            justify: Any = "right" if index in self.right else "left"
            # The first column is what people copy from it: a name. A path would take all the room.
            whole = index == 0 and self._widths()[0] <= NAME
            table.add_column(Text(header), justify=justify, overflow="fold", no_wrap=whole)
        for cells, style in self.rows:
            table.add_row(*(Text(cell) for cell in cells), style=style)
        Console(file=stream, highlight=False).print(table)


def terminal(stream: TextIO) -> bool:
    """Whether a person reads `stream` on a terminal that can do more than print."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # it is closed
        return False


def width(stream: TextIO) -> int | None:
    """Columns of the terminal that `stream` is, None if it is none."""
    return shutil.get_terminal_size().columns if terminal(stream) else None
