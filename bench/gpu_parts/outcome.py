"""What became of a part: measured, skipped or failed; its tables, its goals and its raw figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple


class Goal(NamedTuple):
    """Something that was hoped for, and the figure that was found."""

    what: str
    wanted: str
    found: str
    reached: bool
    required: bool = False
    """a run in which it is not reached ends with an error"""


class Table(NamedTuple):
    """Rows of text under columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a part found. `record` goes into the JSON as it is."""

    tables: Sequence[Table] = ()
    goals: Sequence[Goal] = ()
    notes: Sequence[str] = ()
    record: Mapping[str, Any]


class SkippedError(Exception):
    """A part cannot be measured here; the message says why."""


class State(StrEnum):
    """What became of a part."""

    MEASURED = "measured"
    SKIPPED = "skipped"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A part's name and end; `reason` says why it was skipped, or how it failed."""

    name: str
    title: str
    state: State
    seconds: float
    reason: str = ""
    measured: Measured | None = None


def at_least(what: str, wanted: float, found: float) -> Goal:
    """A figure that should be no smaller."""
    return Goal(what, f">= {wanted:g}", f"{found:.3f}", found >= wanted)


def holds(what: str, *, found: str, reached: bool) -> Goal:
    """Something that must be so, or the run ends with an error."""
    return Goal(what, "always", found, reached, required=True)
