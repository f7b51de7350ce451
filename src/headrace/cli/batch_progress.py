"""How far a batch job is: requests, tokens per second and per pass, time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from headrace.cli.run_progress import Share
from headrace.units import format_number, format_seconds

if TYPE_CHECKING:
    from headrace.inference.batching.job import DonePass, Tally

RECENT_PASSES = 32


class BatchProgress:
    """Told by the job after every pass; `changed` is called after every change."""

    def __init__(
        self, doing: str, note: Callable[[str], None], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.note = note
        self.changed: Callable[[], None] = lambda: None
        self._doing = doing
        self._clock = clock
        self._phase_started_s = clock()
        self._requests = self._before = 0
        self._work_tokens = 0
        self._predicted_s = 0.0
        self._tally: Tally | None = None
        self._recent: deque[DonePass] = deque(maxlen=RECENT_PASSES)

    def enter(self, doing: str) -> None:
        """Say what goes on before the first pass."""
        self._doing = doing
        self._phase_started_s = self._clock()
        self.changed()

    def count(self, what: str, number: int) -> None:
        """Say how many of something were read."""
        if number % 64 == 0:
            self._doing = f"{what} {number}"
            self.changed()

    def begin(self, *, requests: int, before: int, work_tokens: int, predicted_s: float) -> None:
        """The passes begin: `before` of the requests were answered by earlier starts."""
        self._requests, self._before = requests, before
        self._work_tokens, self._predicted_s = work_tokens, predicted_s
        self._phase_started_s = self._clock()
        self.changed()

    def passed(self, done: DonePass, tally: Tally) -> None:
        """A pass is done."""
        self._recent.append(done)
        self._tally = tally
        self.changed()

    @property
    def share(self) -> Share:
        """What is done of the present phase."""
        elapsed = self._clock() - self._phase_started_s
        tally = self._tally
        if not self._requests:
            return Share(0, 1, self._doing + (f" ({elapsed:.0f} s)" if elapsed >= 1 else ""))
        if tally is None:
            return Share(0, 1, f"{self._before} of {self._requests} requests, all in {_about(self._predicted_s)}")
        done = min(tally.pass_tokens + tally.shared_tokens + tally.unused_tokens, self._work_tokens)
        part = done / self._work_tokens
        # At the beginning the prediction knows better, later on the job itself.
        left = (1 - part) * (elapsed / part if part else 0.0) * part + (1 - part) * self._predicted_s * (1 - part)
        seconds = sum(item.seconds for item in self._recent)
        generated = sum(item.load.samples for item in self._recent)
        tokens = sum(item.load.tokens for item in self._recent)
        words = (
            f"{self._before + tally.requests + tally.errors} of {self._requests} requests, "
            f"{format_number(generated / seconds)} tokens/s, {tokens / len(self._recent):.0f} tokens per pass, "
            f"about {_about(left)} left"
        )
        return Share(done, self._work_tokens, words)


def _about(seconds: float) -> str:
    return format_seconds(float(f"{seconds:.2g}")) if seconds < 120 else format_seconds(seconds)
