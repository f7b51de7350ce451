"""How much of the CPUs, the disk and the memory other work takes while something is measured here.

A measurement beside other work says how fast the rest of the machine is: a product of several threads, which waits for
the slowest of them, was seen to take 2.5 to 10 times as long.

Own work must not count. Of the CPUs that is a subtraction: the kernel counts their busy seconds (proc(5), /proc/stat)
and this process's. Of the disk and the memory nothing can be subtracted, since the kernel does not say for whom a
task stalled; so they are looked at only in moments before and after, when this process sleeps: then whoever waits
(/proc/pressure, Documentation/accounting/psi.rst) is another one. The averages that the same files hold (avg10) reach
back ten seconds, to when this process itself read its libraries.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

QUIET_S = 0.05
"""this process sleeps so long before and after, to hear others"""
NOTED_SHARE = 0.1
"""Less is left out: others with a tenth of the time lengthen work by 1 / 0.9 = 1.11, no more than what the ranges of
predictions (`COMPUTE_RANGE`, `READ_RANGE`) allow on a quiet machine anyway."""
MOST_SHARE = 0.9
"""Lengthens work tenfold, the most that was seen."""


class Moment(NamedTuple):
    """What the kernel has counted up to a moment, in seconds; of pressure None where it does not count it."""

    now_s: float
    busy_s: float
    """of the CPUs that this process may use, for all"""
    all_s: float
    """the same with idle time"""
    own_s: float
    """CPU time of this process, all its threads"""
    disk_waits_s: float | None = None
    """while at least one task waited for the disk"""
    memory_waits_s: float | None = None
    """while at least one task waited for memory to be reclaimed"""
    blocked: bool = False
    """whether any task is blocked by the disk right now: where there is no pressure to read"""

    @classmethod
    def read(cls, proc: Path = Path("/proc")) -> Moment:
        """The present one."""
        busy_s = all_s = 0.0
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        for number, cpu in enumerate(psutil.cpu_times(percpu=True)):
            if usable is not None and number not in usable:
                continue
            # Time of virtual guests is in `user` already; time that a hypervisor gave to others counts as theirs.
            counted = sum(cpu) - getattr(cpu, "guest", 0.0) - getattr(cpu, "guest_nice", 0.0)
            all_s += counted
            busy_s += counted - cpu.idle - getattr(cpu, "iowait", 0.0)
        return cls(
            time.perf_counter(),
            busy_s,
            all_s,
            time.process_time(),
            _waits_s(proc / "pressure" / "io"),
            _waits_s(proc / "pressure" / "memory"),
            _blocked(proc / "stat"),
        )

    def cpu_share(self, later: Moment) -> float:
        """Share of the CPUs that others had until `later`."""
        others_s = later.busy_s - self.busy_s - (later.own_s - self.own_s)
        return _share(others_s, later.all_s - self.all_s)

    def disk_share(self, later: Moment) -> float:
        """Share of the time until `later` in which any task waited for the disk."""
        if self.disk_waits_s is None or later.disk_waits_s is None:
            return float(self.blocked and later.blocked)
        return _share(later.disk_waits_s - self.disk_waits_s, later.now_s - self.now_s)

    def memory_share(self, later: Moment) -> float:
        """Share of the time until `later` in which any task waited for memory; 0 where the kernel does not count."""
        if self.memory_waits_s is None or later.memory_waits_s is None:
            return 0.0
        return _share(later.memory_waits_s - self.memory_waits_s, later.now_s - self.now_s)


def _share(part_s: float, whole_s: float) -> float:
    return min(1.0, max(0.0, part_s / whole_s)) if whole_s > 0 else 0.0


def _waits_s(path: Path) -> float | None:
    try:
        found = re.search(r"^some .*\btotal=(\d+)", path.read_text(), re.MULTILINE)
    except OSError:  # no such file, or the kernel was told not to count
        return None
    return None if found is None else int(found[1]) * 1e-6


def _blocked(path: Path) -> bool:
    try:
        found = re.search(r"^procs_blocked (\d+)", path.read_text(), re.MULTILINE)
    except OSError:
        return False
    return found is not None and int(found[1]) > 0


class Pressure(NamedTuple):
    """Shares of the time in which other work had the CPUs, or waited for the disk or for memory."""

    cpu: float = 0.0
    disk: float = 0.0
    memory: float = 0.0

    @property
    def busy(self) -> float:
        """The largest of them, 0 where none is worth noting."""
        share = max(self)
        return min(share, MOST_SHARE) if share >= NOTED_SHARE else 0.0

    def notes(self) -> tuple[str, ...]:
        """What that means for predictions, in a sentence; none on a quiet machine."""
        if not self.busy:
            return ()
        found = [
            f"{what} for {share:.0%} of the measurement"
            for what, share in (
                ("the CPU was busy with other work", self.cpu),
                ("other work waited for the disk", self.disk),
                ("other work ran short of memory", self.memory),
            )
            if share >= NOTED_SHARE
        ]
        factor = 1 / (1 - self.busy)
        return (
            f"{', '.join(found)}; predictions may be off by a factor of {factor:.2g}: close other programs and measure "
            "again",
        )


class PressureGauge:
    """Made before a measurement, asked after it. This process sleeps for `QUIET_S` at both ends."""

    def __init__(self, read: Callable[[], Moment] = Moment.read, sleep: Callable[[float], object] = time.sleep) -> None:
        self._read, self._sleep = read, sleep
        self._first, self._begin = self._quiet()

    def _quiet(self) -> tuple[Moment, Moment]:
        before = self._read()
        self._sleep(QUIET_S)
        return before, self._read()

    def pressure(self) -> Pressure:
        """Of the time since this was made."""
        end, last = self._quiet()
        # Others that wait at one end only are no work that lasts: a log was flushed.
        return Pressure(
            cpu=self._first.cpu_share(last),
            disk=min(self._first.disk_share(self._begin), end.disk_share(last)),
            memory=min(self._first.memory_share(self._begin), end.memory_share(last)),
        )
