"""The arena: touched memory is held from then on, and all of it is still handed out."""

from __future__ import annotations

import pytest

from headrace.streaming.arena import Arena
from headrace.streaming.device import CpuDevice
from headrace.streaming.system_memory import resident_bytes


def test_touch_takes_every_page() -> None:
    size = (64 << 20) + 4096
    arena = Arena(size)
    before = resident_bytes()
    arena.touch()
    assert resident_bytes() - before > 0.95 * size
    arena.close()
    assert resident_bytes() - before < 0.05 * size


def test_the_processor_takes_its_memory_at_once() -> None:
    before = resident_bytes()
    arena = CpuDevice().allocate(64 << 20)
    assert resident_bytes() - before > 0.95 * arena.size_bytes
    arena.close()


@pytest.mark.parametrize("size_bytes", [0, 4096, 3 << 20])
def test_touch_leaves_all_of_it_to_be_taken(size_bytes: int) -> None:
    arena = Arena(size_bytes)
    arena.touch()
    assert arena.take(size_bytes).size_bytes == size_bytes
    assert arena.free_bytes == 0
    arena.close()
