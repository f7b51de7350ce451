"""What the operating system says about memory: this process's peak, the machine's free bytes, the cgroup's limit.

Sources: proc(5) for /proc/self/status; cgroups(7), the kernel's cgroup-v1 `memory.txt` and cgroup-v2 documents for
the limits.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path
from typing import NamedTuple

import psutil

from headrace.planning.budgets import reserve_bytes

_NO_LIMIT = 1 << 60
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def resident_bytes(process_status: Path = Path("/proc/self/status")) -> int:
    """Bytes of memory that this process holds now (resident set)."""
    return _status_bytes(process_status, "VmRSS")


def peak_resident_bytes(process_status: Path = Path("/proc/self/status")) -> int:
    """The most that this process ever held, or held since `reset_peak`, by the kernel's own high-water mark."""
    return _status_bytes(process_status, "VmHWM")


def reset_peak() -> bool:
    """Let the kernel's high-water mark start again from the present value; False where that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def keep_heap_small() -> None:
    """Let the C allocator take buffers of 4 MiB and more from the system and give them back when they are freed.

    glibc otherwise learns, from the first large buffer that is freed, to keep all up to 32 MiB in its heap, where
    they leave holes: a prefill of 1,024 tokens through a 135 M model was seen to hold 130 MB that nothing used. For
    the whole process; where there is no glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 4 << 20)


def return_free_memory() -> None:
    """Let the C allocator give its free pages back to the system, where it can (glibc's malloc_trim)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(process_status: Path, field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", process_status.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{process_status} has no {field}")
    return int(match[1]) * 1024


class GroupMemory(NamedTuple):
    """What a memory cgroup allows its processes together."""

    limit_bytes: int
    free_bytes: int
    """page cache that the group could drop counts as free"""


def cgroup_memory(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[GroupMemory]:
    """The limits of all memory cgroups above this process, v1 and v2; none where nothing limits it."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []
    found: list[GroupMemory] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for base in (root, root / "unified"):
                found += _groups(base, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            found += _groups(
                root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            )
    return found


def _groups(base: Path, path: str, limit_name: str, usage_name: str, cache_name: str) -> list[GroupMemory]:
    found = []
    group = base / path.lstrip("/")
    while True:
        try:
            limit_text = (group / limit_name).read_text().strip()
            if limit_text != "max" and int(limit_text) < _NO_LIMIT:
                limit, usage = int(limit_text), int((group / usage_name).read_text())
                cache = re.search(rf"^{cache_name} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
                free = max(0, limit - usage + (int(cache[1]) if cache else 0))
                found.append(GroupMemory(limit, free))
        except (OSError, ValueError):
            pass
        if group == base or base not in group.parents:
            return found
        group = group.parent


def free_bytes() -> int:
    """Bytes that could be taken now without swapping or breaking a cgroup's limit."""
    return min([int(psutil.virtual_memory().available), *(group.free_bytes for group in cgroup_memory())])


def total_bytes() -> int:
    """Bytes of memory that this machine has, no more than a cgroup's limit."""
    return min([int(psutil.virtual_memory().total), *(group.limit_bytes for group in cgroup_memory())])


def default_budget_bytes() -> int:
    """What headrace takes when no budget is given: the free memory less a twentieth (160 MiB at least)."""
    free = free_bytes()
    return max(0, free - reserve_bytes(free))
