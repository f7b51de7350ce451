"""Find the beginnings that requests of a job have in common, in one go over them and in little memory.

Beginnings are looked at in steps of STEP_TOKENS. A longer one is only counted once the next shorter ones were seen
before, twice as long each time, so the table holds about one entry for each request that shares nothing.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

STEP_TOKENS = 16


class CommonPrefixes:
    """Counts beginnings: `see` every request's tokens first, then ask for `best`."""

    def __init__(self) -> None:
        self._counts: dict[bytes, int] = {}

    @property
    def any_shared(self) -> bool:
        """Whether any two requests begin alike."""
        return any(count > 1 for count in self._counts.values())

    def see(self, tokens: Sequence[int]) -> None:
        """Count a request's beginnings."""
        matched = 0
        for level, digest in enumerate(_digests(tokens), start=1):
            known = digest in self._counts
            if not known and level > 2 * matched + 2:
                return
            self._counts[digest] = self._counts.get(digest, 0) + 1
            if known:
                matched = level

    def best(self, tokens: Sequence[int]) -> tuple[int, bytes] | None:
        """Length and digest of the beginning whose sharing saves most tokens over the job; None: nobody shares."""
        found, most = None, 0
        for level, digest in enumerate(_digests(tokens), start=1):
            count = self._counts.get(digest, 0)
            if count < 2:
                break
            saved = (count - 1) * level
            if saved > most:
                most, found = saved, (level * STEP_TOKENS, digest)
        return found


def _digests(tokens: Sequence[int]) -> list[bytes]:
    """Digest of each beginning of k x STEP_TOKENS tokens that leaves at least one token over."""
    running = hashlib.blake2b(digest_size=12)
    digests = []
    for end in range(STEP_TOKENS, len(tokens), STEP_TOKENS):
        running.update(array("q", tokens[end - STEP_TOKENS : end]).tobytes())
        digests.append(running.digest())
    return digests
