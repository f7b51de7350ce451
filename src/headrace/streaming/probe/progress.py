"""How a long measurement tells what it is doing."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Called with what is being measured and the share of the work that is done, 0 to 1."""


def unheard(_what: str, _share: float) -> None:
    """Progress that nobody wants to know of."""


def part_of(progress: Progress, start: float, end: float) -> Progress:
    """Progress of a part of the work: its 0 to 1 is `start` to `end` of the whole."""
    return lambda what, share: progress(what, start + (end - start) * share)
