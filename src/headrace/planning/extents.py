"""Which byte ranges of which files hold a block, and where they land in a slot.

Direct reads want file offsets, lengths and memory addresses that are multiples of the page size. Instead of copying
tensors to aligned places afterwards, the ranges are widened ("over-reading") and the tensors are used where they
land. Pure arithmetic: streaming reads these extents, planning counts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

PAGE_BYTES = 4096
"""Alignment of file offsets, lengths and slot positions; a multiple of every logical block size in use."""

COALESCE_GAP_BYTES = 128 * 1024
"""Two ranges closer than this are read as one: at 1 GB/s the gap costs 0.13 ms, about what one more request costs."""


class ByteRange(NamedTuple):
    """Bytes [offset, offset + size_bytes) of file `file_index`, known by `key`."""

    key: str
    file_index: int
    offset: int
    size_bytes: int


class Extent(NamedTuple):
    """One aligned read: `length` bytes from `file_offset` of a file to `slot_offset` of a slot. All page multiples."""

    file_index: int
    file_offset: int
    length: int
    slot_offset: int


class Layout(NamedTuple):
    """The reads that bring a block, and the position of every one of its ranges inside the slot."""

    extents: tuple[Extent, ...]
    positions: dict[str, int]
    """range key -> byte offset in the slot"""
    footprint_bytes: int
    """bytes of slot that the block takes, over-reading included; a page multiple"""


def align_down(value: int) -> int:
    """Largest page multiple that is not above `value`."""
    return value - value % PAGE_BYTES


def align_up(value: int) -> int:
    """Smallest page multiple that is not below `value`."""
    return -(-value // PAGE_BYTES) * PAGE_BYTES


def lay_out(ranges: Iterable[ByteRange]) -> Layout:
    """Cover `ranges` with as few aligned extents as reading them costs least.

    Ranges of one file whose widened forms touch, overlap or leave a gap below COALESCE_GAP_BYTES share an extent.
    """
    groups: list[list[ByteRange]] = []
    reach = 0
    for item in sorted((r for r in ranges), key=lambda r: (r.file_index, r.offset)):
        joins = (
            groups
            and groups[-1][0].file_index == item.file_index
            and align_down(item.offset) <= reach + COALESCE_GAP_BYTES
        )
        if joins:
            groups[-1].append(item)
            reach = max(reach, align_up(item.offset + item.size_bytes))
        else:
            groups.append([item])
            reach = align_up(item.offset + item.size_bytes)
    extents: list[Extent] = []
    positions: dict[str, int] = {}
    slot_offset = 0
    for group in groups:
        start = align_down(group[0].offset)
        end = align_up(max(item.offset + item.size_bytes for item in group))
        extents.append(Extent(group[0].file_index, start, end - start, slot_offset))
        for item in group:
            positions[item.key] = slot_offset + item.offset - start
        slot_offset += end - start
    return Layout(tuple(extents), positions, slot_offset)
