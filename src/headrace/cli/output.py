"""Where a command writes: its result to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from headrace.cli.table import Table, wrapped
from headrace.errors import HeadraceError, InvalidRequestError
from headrace.planning.timeline import Timeline, chrome_trace

PLAIN_WIDTH = 80
"""columns of text that goes to a file or a pipe, unless COLUMNS says otherwise"""
LEAST_WIDTH = 40


class OutputLostError(HeadraceError):
    """Standard output takes no more, though somebody is there to read it: a full disk, for instance."""


class Output:
    """Standard output carries the result and nothing else; with `as_json` that is exactly one JSON object.

    Everything else goes to standard error, and with `quiet` nowhere: only what ends a command is told then.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        from rich.console import Console

        if quiet:
            self.own_progress_only()
        self.as_json = as_json
        self.stdout: TextIO = sys.stdout
        self.to_stdout = Console(file=sys.stdout, highlight=False)
        self.to_stderr = Console(stderr=True, highlight=False, quiet=quiet)
        self.width = text_width()

    @staticmethod
    def own_progress_only() -> None:
        """Let the hub's library draw no bars of its own; before it is imported."""
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

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
        """Write part of the result at once, as it is."""
        try:
            self.stdout.write(text)
            self.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputLostError(f"standard output cannot be written: {error.strerror}") from error

    def show(self, *parts: str | Table, hanging: int = 0) -> None:
        """Print parts of the result, for people: paragraphs, whose further lines are indented, and tables."""
        for part in parts:
            self.text(self._laid_out(part, hanging))

    def note(self, *parts: str | Table) -> None:
        """Print a remark to standard error; nothing fails for want of a remark."""
        with contextlib.suppress(OSError):
            for part in parts:
                self.to_stderr.print(self._laid_out(part, 2), end="", soft_wrap=True, markup=False, emoji=False)

    def _laid_out(self, part: str | Table, hanging: int) -> str:
        return part.text(self.width) if isinstance(part, Table) else wrapped(part, self.width, hanging=hanging) + "\n"

    def goes_to(self, path: Path) -> bool:
        """Whether standard output is this file or pipe."""
        try:
            return os.path.samestat(path.stat(), os.fstat(self.stdout.fileno()))
        except (OSError, ValueError):  # nothing there yet, a stream without a descriptor
            return False

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


def check_writable(path: Path, *, option: str) -> None:
    """Raise InvalidRequestError, before any work is done, where `path` could not be written at its end."""
    existed = os.path.lexists(path)
    if path.exists() and not path.is_file() and not path.is_dir() and os.access(path, os.W_OK):
        return  # a pipe: whoever reads it would take this trial for the whole
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


def text_width() -> int:
    """Columns of the terminal, or what COLUMNS says."""
    return max(LEAST_WIDTH, shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns)
