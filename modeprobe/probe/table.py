"""A table for terminals of any width: cells fold at dots and underscores, not inside words or `file.py:3`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_GAP = 2
_NARROWEST = 14


def fold(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, broken after a dot, underscore, slash, comma or space.

    A piece without such a place keeps its length; what stands in brackets stays with the word before.
    """
    lines = [""]
    for piece in re.findall(r"(?:[^._/, ]|\.(?=py:))*(?: \([^)]*\)|[._/, ])?", text):
        if piece and lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def fit(rows: Sequence[Sequence[str]], width: int, drop: Sequence[int]) -> dict[int, int]:
    """Width of each column kept, so that all rows fit.

    Empty columns go. The widest column is folded first; where words alone are too wide, the columns in `drop`
    go, in order.
    """
    columns = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    wanted = {i: max(len(row[i]) for row in rows) for i in columns}
    # A name may be folded into some lines, not into a ladder of them; a heading may.
    least = {
        i: max(
            min(_NARROWEST, max(len(row[i]) for row in rows[1:])),
            *(len(line) for row in rows for line in fold(row[i], 1)),
        )
        for i in columns
    }
    for gone in (*drop, None):
        room = width - _GAP * (len(wanted) - 1)
        widths = dict(wanted)
        while sum(widths.values()) > room:
            loose = [i for i in widths if widths[i] > least[i]]
            if not loose:
                break
            widths[max(loose, key=widths.__getitem__)] -= 1
        if sum(widths.values()) <= room or gone is None:
            return widths
        wanted.pop(gone, None)
    return wanted


class Table:
    """Renders itself at the width of the console. styles: one per row, for the column `styled`."""

    def __init__(
        self,
        headings: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        right: frozenset[int],
        drop: Sequence[int],
        styled: int,
        styles: Sequence[str],
    ) -> None:
        self.headings, self.rows, self.right, self.drop = headings, rows, right, drop
        self.styled, self.styles = styled, styles

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.text import Text

        widths = fit([self.headings, *self.rows], options.max_width, self.drop)
        for row, style in zip([self.headings, *self.rows], ["dim", *self.styles], strict=True):
            folded = {i: fold(row[i], widths[i]) for i in widths}
            for n in range(max(map(len, folded.values()))):
                line = Text(no_wrap=True, overflow="ignore")
                for i, lines in folded.items():
                    cell = lines[n] if n < len(lines) else ""
                    cell = cell.rjust(widths[i]) if i in self.right else cell.ljust(widths[i])
                    tinted = row is self.headings or i == self.styled
                    line.append(cell + " " * _GAP, style=style if tinted else "")
                line.rstrip()
                yield line
