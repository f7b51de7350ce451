"""Everything headrace raises on purpose, in one tree.

    HeadraceError                    caught by the command line: one message, exit code 2
    ├── InvalidRequestError          an invalid argument: a size, a rate, a dtype, an empty prompt
    ├── CheckpointError              the checkpoint cannot be used as it lies there
    │   ├── CheckpointCorruptError   a header that lies, a missing or truncated shard
    │   └── CheckpointChangedError   a file that changed while it was being used
    ├── UnsupportedModelError        an architecture that headrace cannot stream correctly
    ├── MachineError                 a machine description that cannot be used
    ├── BudgetError                  the memory does not suffice; names what would
    ├── DependencyError              an optional library that is not installed
    └── StreamError                  the stream broke while it ran: names file and block

A message says what was asked, what was found and what to change. Anything else that escapes is a bug: exit code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HeadraceError(Exception):
    """Root of all errors that are the answer to a request rather than a bug in headrace."""


class InvalidRequestError(HeadraceError):
    """An invalid argument: a size without sense, an unknown dtype, an empty prompt."""


class CheckpointError(HeadraceError):
    """The checkpoint cannot be used as it lies on disk."""


class CheckpointCorruptError(CheckpointError):
    """A header that lies, or a shard that is missing or too short."""


class CheckpointChangedError(CheckpointError):
    """A file of the checkpoint changed while it was being used."""


class UnsupportedModelError(HeadraceError):
    """An architecture that headrace cannot stream correctly, refused by name."""


class MachineError(HeadraceError):
    """A machine description that cannot be used."""


class BudgetError(HeadraceError):
    """The memory budget does not suffice.

    `required_bytes` is the smallest budget that would, where one is known; `short` says it in a table's few words.
    """

    def __init__(self, message: str, *, required_bytes: int | None = None, short: str = "") -> None:
        super().__init__(message)
        self.required_bytes = required_bytes
        self.short = short or message


class DependencyError(HeadraceError):
    """An optional library that the request needs is not installed."""


class StreamError(HeadraceError):
    """The stream broke while it ran; the message names the file and the block."""


def near_names(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """`did you mean a, b or c? `, or nothing where no known name is near."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    names = [by_lower[near] for near in difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.5)]
    if not names:
        return ""
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    return f"did you mean {listed}? "
