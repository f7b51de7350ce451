"""How much other processes, and other machines on the same host, took of the processors meanwhile."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path


class Others:
    """Counts from its construction on. Jiffies of all processors, less this process's and its children's own."""

    def __init__(self) -> None:
        self._started = _busy_s(), _own_s(), time.perf_counter()

    def processors(self) -> float:
        """Processors that others kept busy, on average since the start: 1.0 is one of them all the time."""
        busy_s, own_s, now = _busy_s(), _own_s(), time.perf_counter()
        elapsed = max(now - self._started[2], 1e-6)
        return max(0.0, busy_s - self._started[0] - (own_s - self._started[1])) / elapsed


def wait_until_quiet(*, processors: float = 0.1, at_most_s: float = 90.0) -> None:
    """Return when others have used less than this for a second, or after `at_most_s`."""
    deadline = time.perf_counter() + at_most_s
    while time.perf_counter() < deadline:
        others = Others()
        time.sleep(1.0)
        if others.processors() < processors:
            return


def _busy_s() -> float:
    """User, nice, system, interrupts and what the host took away; not idle, not waiting for the disk."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
