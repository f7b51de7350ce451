"""The timeline of a run as a file: measured and predicted as two processes of one Chrome trace."""

from __future__ import annotations

import os
from pathlib import Path

from headrace.errors import InvalidRequestError
from headrace.planning.timeline import Timeline, chrome_trace


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
