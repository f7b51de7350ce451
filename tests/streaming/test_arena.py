"""The arena: touched memory is held from then on, and all of it is still handed out."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from headrace.streaming.arena import Arena
from headrace.streaming.device import CpuDevice

_ENTRY_BYTES = 8
_PRESENT_BIT = 7  # of an entry's last byte: the page is in memory


def share_of_pages_held(address: int, size_bytes: int) -> float:
    """Share of the pages of this stretch that are in memory, by the kernel's page map.

    Not the process's resident bytes: those fall whenever anything else in it is freed meanwhile.
    """
    page_bytes = mmap.PAGESIZE
    first, last = address // page_bytes, -(-(address + size_bytes) // page_bytes)
    with Path("/proc/self/pagemap").open("rb", buffering=0) as page_map:
        page_map.seek(first * _ENTRY_BYTES)
        entries = page_map.read((last - first) * _ENTRY_BYTES)
    assert len(entries) == (last - first) * _ENTRY_BYTES
    return sum(byte >> _PRESENT_BIT for byte in entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES]) / (last - first)


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
