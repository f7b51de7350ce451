"""The arena: touched memory is held from then on, and all of it is still handed out."""

from __future__ import annotations

import pytest

from headrace.streaming.arena import Arena
from headrace.streaming.device import CpuDevice
from pages_held import share_of_pages_held


def test_touch_takes_every_page() -> None:
    size = (64 << 20) + 4096
    arena = Arena(size)
    address = arena.take(size).tensor.data_ptr()
    assert share_of_pages_held(address, size) == 0
    arena.touch()
    assert share_of_pages_held(address, size) == 1
    arena.close()
    assert share_of_pages_held(address, size) == 0


def test_the_processor_takes_its_memory_at_once() -> None:
    arena = CpuDevice().allocate(64 << 20)
    assert share_of_pages_held(arena.take(arena.size_bytes).tensor.data_ptr(), arena.size_bytes) == 1
    arena.close()


@pytest.mark.parametrize("size_bytes", [0, 4096, 3 << 20])
def test_touch_leaves_all_of_it_to_be_taken(size_bytes: int) -> None:
    arena = Arena(size_bytes)
    arena.touch()
    assert arena.take(size_bytes).size_bytes == size_bytes
    assert arena.free_bytes == 0
    arena.close()
