"""Where a command writes: its result to standard output, everything else to standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from headrace.errors import InvalidRequestError
from headrace.planning.timeline import Timeline, chrome_trace

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

PLAIN_WIDTH = 132
"""columns of tables that go to a file or a pipe"""


class Output:
    """Standard output carries the result and nothing else; with `as_json` that is exactly one JSON object."""

    def __init__(self, *, as_json: bool = False) -> None:
        from rich.console import Console

        self.as_json = as_json
        self.stdout: TextIO = sys.stdout
        self.to_stdout = _console(Console(file=sys.stdout, highlight=False))
        self.to_stderr = _console(Console(stderr=True, highlight=False))

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Lead whatever libraries and model code print to standard error, so that the result stays alone."""
        former, sys.stdout = sys.stdout, sys.stderr
        try:
            yield
        finally:
            sys.stdout = former

    def json(self, value: dict[str, Any]) -> None:
        """Write the command's one JSON object."""
        self.text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def text(self, text: str) -> None:
        """Write part of the result at once."""
        self.stdout.write(text)
        self.stdout.flush()

    def show(self, *renderables: RenderableType) -> None:
        """Print part of the result, for people."""
        for renderable in renderables:
            self.to_stdout.print(renderable)

    def note(self, *renderables: RenderableType) -> None:
        """Print a remark to standard error."""
        for renderable in renderables:
            self.to_stderr.print(renderable, soft_wrap=isinstance(renderable, str), markup=False)

    @property
    def one_terminal(self) -> bool:
        """Whether text and remarks appear on one screen, where they must not run into one another."""
        return self.to_stdout.is_terminal and self.to_stderr.is_terminal

    @property
    def one_file(self) -> bool:
        """Whether both streams end in the same file or pipe."""
        try:
            return os.path.sameopenfile(self.stdout.fileno(), sys.stderr.fileno())
        except (OSError, ValueError):  # streams without a descriptor, closed ones
            return False


def _console(console: Console) -> Console:
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def three_digits(value: float) -> str:
    """Write a number for people: three digits, no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> Table:
    """Lay out a small table: the first column names the row, the others hold numbers."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="", pad_edge=False)
    for number, name in enumerate(columns):
        made.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def check_writable(path: Path, *, option: str) -> None:
    """Raise InvalidRequestError, before any work is done, where `path` could not be written at its end."""
    existed = os.path.lexists(path)
    try:
        with open(path, "ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise InvalidRequestError(f"{option} {path} cannot be written: {error.strerror}") from error


def write_trace(path: Path, *, predicted: Timeline, measured: Timeline | None = None) -> None:
    """Write the timelines, one over the other when the file is opened."""
    processes = [("predicted", predicted)] if measured is None else [("measured", measured), ("predicted", predicted)]
    try:
        path.write_text(chrome_trace(processes), encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(f"--trace {path} cannot be written: {error.strerror}") from error
