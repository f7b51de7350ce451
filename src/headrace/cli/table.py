"""Text in columns and paragraphs: no line is longer than the width, no word and no number is broken."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

GAP = 2
READABLE_WIDTH = 22
"""a column of words narrower than this, where its words need more, is left out rather than squeezed"""
_TIED = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under headings. The first column names the row; the others hold numbers, but for those of `words`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[str] = ()
    """columns of words, which go on in a further line where they must"""
    least: Sequence[str] = ()
    """columns that are left out where the width does not suffice, the least important first"""

    def text(self, width: int) -> str:
        """Lay it out; ends with a newline. Wider than `width` only if the columns that always stay are."""
        kept = list(self.columns)
        for name in self.least:
            if sum(map(self._least, kept)) + GAP * (len(kept) - 1) <= width:
                break
            kept.remove(name)
        widths = self._widths(kept, width)
        head = self._lines({name: name for name in kept}, widths, top=False)
        rule = "─" * (sum(widths.values()) + GAP * (len(kept) - 1))
        body = [line for row in self.rows for line in self._lines(self._cells(row), widths, top=True)]
        return "\n".join([*head, rule, *body]) + "\n"

    def _cells(self, row: Sequence[str]) -> dict[str, str]:
        return dict(zip(self.columns, row, strict=True))

    def _is_words(self, name: str) -> bool:
        return name == self.columns[0] or name in self.words

    def _column(self, name: str) -> list[str]:
        return [self._cells(row)[name] for row in self.rows]

    def _most(self, name: str) -> int:
        return max(map(len, [name, *self._column(name)]))

    def _least(self, name: str) -> int:
        """Headings break at spaces, and so do words in cells; numbers stay whole."""
        heading = max(map(len, _tied(name).split(" ")))
        cells = [0, *map(len, self._column(name))]
        if not self._is_words(name):
            return max(heading, *cells)
        longest = max((len(part) for cell in self._column(name) for part in _tied(cell).split(" ")), default=0)
        return max(heading, min(max(cells), max(longest, READABLE_WIDTH)))

    def _widths(self, kept: Sequence[str], width: int) -> dict[str, int]:
        """What is left over goes to the columns of words, then to the headings."""
        widths = {name: self._least(name) for name in kept}
        left = width - sum(widths.values()) - GAP * (len(kept) - 1)
        for name in sorted(kept, key=self._is_words, reverse=True):
            more = max(0, min(left, self._most(name) - widths[name]))
            widths[name] += more
            left -= more
        return widths

    def _lines(self, cells: dict[str, str], widths: dict[str, int], *, top: bool) -> list[str]:
        """One row in as many lines as its fullest cell needs, the others at their top or at their bottom."""
        wrapped = {name: wrapped_lines(cells[name], size) for name, size in widths.items()}
        height = max(map(len, wrapped.values()))
        lines = []
        for number in range(height):
            parts = []
            for name, size in widths.items():
                own = wrapped[name]
                at = number if top else number - (height - len(own))
                text = own[at] if 0 <= at < len(own) else ""
                parts.append(text.ljust(size) if self._is_words(name) else text.rjust(size))
            lines.append((" " * GAP).join(parts).rstrip())
        return lines


def wrapped(text: str, width: int, *, hanging: int = 0) -> str:
    """Break lines that are too long at spaces; what follows is indented as the line was, by `hanging` more."""
    return "\n".join("\n".join(wrapped_lines(line, width, hanging=hanging)) for line in text.split("\n"))


def wrapped_lines(line: str, width: int, *, hanging: int = 0) -> list[str]:
    """Break one line at spaces, not between a number and the word after it; a path may be longer than the width."""
    if len(line) <= width:
        return [line]
    body = line.lstrip(" ")
    indent = " " * (len(line) - len(body))
    made = textwrap.wrap(
        _tied(body),
        max(1, width),
        initial_indent=indent,
        subsequent_indent=indent + " " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [part.replace(_TIED, " ") for part in made] or [""]


def _tied(text: str) -> str:
    """Tie numbers to the words that they count, and the ends of a range: 12.3 ms, 8 devices, 6 - 12."""
    text = re.sub(r"(?<=\d) - (?=\d)", f"{_TIED}-{_TIED}", text)
    return re.sub(r"(?<=\d) (?=[^\W\d]|[%$])", _TIED, text)
