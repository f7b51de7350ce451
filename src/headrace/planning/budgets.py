"""What is left alone of free memory when no budget is given, and what is said of budgets above what there is."""

from __future__ import annotations

from headrace.units import format_bytes

RESERVE_SHARE = 0.05
RESERVE_MIN_BYTES = 160 << 20
DEVICE_RESERVE_MIN_BYTES = 512 << 20
HOST_RESERVE_SHARE = 0.1
HOST_RESERVE_MIN_BYTES = 1 << 30


def reserve_bytes(free_bytes: int) -> int:
    """Of the host's memory where its CPU computes: a twentieth, 160 MiB at least."""
    return max(RESERVE_MIN_BYTES, int(RESERVE_SHARE * free_bytes))


def device_reserve_bytes(free_bytes: int) -> int:
    """Of an accelerator's memory: a twentieth, 512 MiB at least."""
    return max(DEVICE_RESERVE_MIN_BYTES, int(RESERVE_SHARE * free_bytes))


def host_reserve_bytes(free_bytes: int) -> int:
    """Of the host's memory where an accelerator computes: a tenth, 1 GiB at least.

    More than where the CPU computes: page-locked memory cannot be taken back by a system that runs short.
    """
    return max(HOST_RESERVE_MIN_BYTES, int(HOST_RESERVE_SHARE * free_bytes))


def beyond_memory(option: str, asked_bytes: float | None, has_bytes: float, owner: str, done: str) -> tuple[str, ...]:
    """A note where `option` allows more memory than its owner has, with what was done about it."""
    if asked_bytes is None or asked_bytes <= has_bytes:
        return ()
    return (f"{option} is more than {format_bytes(has_bytes)}, all that {owner} has: {done}",)
