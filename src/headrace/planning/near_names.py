"""Offer what was perhaps meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near_names(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """`did you mean a, b or c? `, or nothing where no known name is near."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    names = [by_lower[near] for near in difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.5)]
    if not names:
        return ""
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    return f"did you mean {listed}? "
