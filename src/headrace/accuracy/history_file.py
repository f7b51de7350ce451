"""The local history of runs: where it lies, how a run is added, how it is read. It never makes a run fail."""

from __future__ import annotations

import os
from pathlib import Path

from headrace.accuracy.history import RunRecord
from headrace.errors import InvalidRequestError
from headrace.paths import user_directory, user_path

VARIABLE = "HEADRACE_HISTORY"
_MOST_BYTES = 64 << 20


def history_path() -> Path | None:
    """Return the history's file; None where HEADRACE_HISTORY is set to nothing, which turns it off."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return user_path(named) if named else None
    return user_directory("XDG_STATE_HOME", "~/.local/state") / "history.jsonl"


def read_history() -> list[RunRecord]:
    """Return all runs that can be read, the oldest first; a file that is missing holds none."""
    try:
        path = history_path()
        if path is None:
            return []
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _MOST_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except (OSError, InvalidRequestError):
        return []
    return [record for line in lines if (record := RunRecord.from_line(line)) is not None]


def add_to_history(record: RunRecord) -> str | None:
    """Append a run in one write; return where it is kept, or why it cannot be; None where the history is off."""
    try:
        path = history_path()
        if path is None:
            return None
        line = record.to_line().encode("utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)  # one write with O_APPEND: lines of two processes do not mix
        finally:
            os.close(descriptor)
    except (OSError, ValueError, InvalidRequestError) as error:
        return f"this run is not kept in the history: {error} ({VARIABLE}= turns it off)"
    return f"history: {path} (headrace accuracy reads it; {VARIABLE}= turns it off)"
