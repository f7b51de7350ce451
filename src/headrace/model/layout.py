"""Which byte ranges of which files hold a block, and where they land in a slot.

Direct reads want file offsets, lengths and memory addresses that are multiples of the page size. Instead of copying
tensors to aligned places afterwards, the ranges are widened ("over-reading") and the tensors are used where they
land. Pure arithmetic: streaming reads these extents, planning counts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

PAGE_BYTES = 4096
"""Alignment of file offsets, lengths and slot positions; a multiple of every logical block size in use."""

HOST_ALIGNMENT_BYTES = 64
"""Where torch's own allocator begins tensors on the host. What a CPU's products give may depend, in the last bit, on
where weights begin modulo this."""

DEVICE_ALIGNMENT_BYTES = 256
"""Where tensors begin in a block's memory on an accelerator, as its own allocators align them: matrix libraries choose
their kernels by alignment, and safetensors files often begin their tensors at 8 modulo 16."""

COPY_GAP_BYTES = 4096
"""Bytes between two tensors that are rather copied along than skipped by a copy of their own."""

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


class Move(NamedTuple):
    """Bytes of a block as read (`start`, in its Layout's slot) and where they belong in its aligned form (`target`)."""

    start: int
    target: int
    length: int


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


def align_device(value: int) -> int:
    """Smallest multiple of DEVICE_ALIGNMENT_BYTES that is not below `value`."""
    return -(-value // DEVICE_ALIGNMENT_BYTES) * DEVICE_ALIGNMENT_BYTES


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


class AlignedLayout(NamedTuple):
    """A block as an accelerator holds it: only the bytes that are needed, tensors at aligned places, contiguous."""

    moves: tuple[Move, ...]
    """from the block as it is read, in the order of the file"""
    positions: dict[str, int]
    """range key -> byte offset"""
    size_bytes: int
    """a multiple of DEVICE_ALIGNMENT_BYTES"""

    def moves_within(self, start: int, length: int) -> list[Move]:
        """The moves of the bytes [start, start + length) as read: what a reader that has just these can place."""
        found = []
        for move in self.moves:
            first, last = max(start, move.start), min(start + length, move.start + move.length)
            if first < last:
                found.append(Move(first, move.target + first - move.start, last - first))
        return found


def align_layout(layout: Layout, sizes: Mapping[str, int]) -> AlignedLayout:
    """Place a block's tensors (`sizes` in bytes, by range key) at multiples of DEVICE_ALIGNMENT_BYTES.

    Tensors that follow one another in the file and keep their distance are moved as one.
    """
    moves: list[Move] = []
    positions: dict[str, int] = {}
    end = 0
    for key, start in sorted(layout.positions.items(), key=lambda item: item[1]):
        length = sizes[key]
        if not length:
            positions[key] = end
            continue
        if moves:
            last = moves[-1]
            gap = start - (last.start + last.length)
            target = last.target + start - last.start
            if 0 <= gap <= COPY_GAP_BYTES and target % DEVICE_ALIGNMENT_BYTES == 0:
                positions[key] = target
                moves[-1] = Move(last.start, last.target, start + length - last.start)
                end = align_device(target + length)
                continue
        positions[key] = end
        moves.append(Move(start, end, length))
        end = align_device(end + length)
    return AlignedLayout(tuple(moves), positions, end)
