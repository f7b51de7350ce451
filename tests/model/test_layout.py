"""Extents cover every byte of every range once, in aligned reads that do not overlap in the slot."""

from __future__ import annotations

import itertools
import random

from hypothesis import example, given
from hypothesis import strategies as st

from headrace.model.layout import (
    COALESCE_GAP_BYTES,
    PAGE_BYTES,
    ByteRange,
    Layout,
    align_down,
    align_up,
    lay_out,
)

FILE_BYTES = 3 * COALESCE_GAP_BYTES
FILES = tuple(
    bytes((offset * 7 + (offset >> 12) * 13 + 101 * index) % 251 for offset in range(FILE_BYTES)) for index in range(3)
)


@st.composite
def byte_ranges(draw: st.DrawFn) -> list[ByteRange]:
    """Ranges of a few files in any order, empty, adjacent and overlapping ones among them."""
    near_a_page = st.builds(
        lambda page, shift: max(0, page * PAGE_BYTES + shift), st.integers(0, 80), st.integers(-2, 2)
    )
    ranges = []
    for number in range(draw(st.integers(0, 8))):
        offset = draw(st.integers(0, FILE_BYTES) | near_a_page)
        size_bytes = draw(st.integers(0, 5 * PAGE_BYTES) | st.sampled_from([0, 1, PAGE_BYTES]))
        size_bytes = min(size_bytes, FILE_BYTES - offset)
        ranges.append(ByteRange(f"tensor {number}", draw(st.integers(0, 2)), offset, size_bytes))
    return ranges


def read(layout: Layout) -> bytearray:
    """Bring a block into a slot, as a reader does; the end of a file may come before the end of an extent."""
    slot = bytearray(b"\xff" * layout.footprint_bytes)
    for extent in layout.extents:
        data = FILES[extent.file_index][extent.file_offset : extent.file_offset + extent.length]
        slot[extent.slot_offset : extent.slot_offset + len(data)] = data
    return slot


@given(byte_ranges())
@example([])
@example([ByteRange("empty", 0, 0, 0)])
@example([ByteRange("a", 0, 0, 1), ByteRange("b", 1, 0, 1)])
@example([ByteRange("a", 0, 100, 5000), ByteRange("inside", 0, 200, 10), ByteRange("after", 0, 5200, 10)])
def test_slices_of_the_slot_are_the_ranges(ranges: list[ByteRange]) -> None:
    layout = lay_out(ranges)
    slot = read(layout)
    assert layout.positions.keys() == {item.key for item in ranges}
    for item in ranges:
        position = layout.positions[item.key]
        expected = FILES[item.file_index][item.offset : item.offset + item.size_bytes]
        assert bytes(slot[position : position + item.size_bytes]) == expected


@given(byte_ranges())
def test_extents_are_aligned_and_hold_their_ranges(ranges: list[ByteRange]) -> None:
    layout = lay_out(ranges)
    for extent in layout.extents:
        for value in (extent.file_offset, extent.length, extent.slot_offset):
            assert value % PAGE_BYTES == 0
            assert value >= 0
    for item in ranges:
        position = layout.positions[item.key]
        homes = [
            extent
            for extent in layout.extents
            if extent.file_index == item.file_index
            and extent.slot_offset <= position
            and position + item.size_bytes <= extent.slot_offset + extent.length
            and position - extent.slot_offset == item.offset - extent.file_offset
        ]
        assert homes, f"{item} lies in no extent at its position"


@given(byte_ranges())
def test_extents_fill_the_slot_without_gap_or_overlap(ranges: list[ByteRange]) -> None:
    layout = lay_out(ranges)
    reached = 0
    for extent in layout.extents:
        assert extent.slot_offset == reached
        reached += extent.length
    assert layout.footprint_bytes == reached


@given(byte_ranges())
@example([ByteRange("a", 0, 0, 300_000), ByteRange("inside", 0, 100, 10), ByteRange("near its end", 0, 299_000, 10)])
def test_no_byte_is_read_twice_and_few_in_vain(ranges: list[ByteRange]) -> None:
    layout = lay_out(ranges)
    for first, second in itertools.pairwise(layout.extents):
        assert first.file_index <= second.file_index
        if first.file_index == second.file_index:
            gap_bytes = second.file_offset - (first.file_offset + first.length)
            assert gap_bytes > COALESCE_GAP_BYTES, "extents so near to one another are read as one"
    wanted_bytes = sum(item.size_bytes for item in ranges)
    in_vain_bytes = layout.footprint_bytes - wanted_bytes
    assert in_vain_bytes <= len(ranges) * (2 * PAGE_BYTES + COALESCE_GAP_BYTES)


@given(byte_ranges(), st.randoms(use_true_random=False))
def test_the_order_of_the_ranges_does_not_matter(ranges: list[ByteRange], chance: random.Random) -> None:
    shuffled = list(ranges)
    chance.shuffle(shuffled)
    first, second = lay_out(ranges), lay_out(shuffled)
    assert (first.extents, first.positions) == (second.extents, second.positions)


def test_neighbours_share_an_extent_and_far_ones_do_not() -> None:
    near = ByteRange("near", 0, 2 * PAGE_BYTES + COALESCE_GAP_BYTES, 1)
    far = ByteRange("far", 0, 2 * PAGE_BYTES + COALESCE_GAP_BYTES + PAGE_BYTES, 1)
    start = ByteRange("start", 0, 100, 2 * PAGE_BYTES - 100)
    assert len(lay_out([start, near]).extents) == 1
    assert len(lay_out([start, far]).extents) == 2
    assert len(lay_out([start, start._replace(key="elsewhere", file_index=1)]).extents) == 2


@given(st.integers(0, 2**62))
def test_alignment(value: int) -> None:
    assert align_down(value) <= value <= align_up(value)
    assert align_down(value) % PAGE_BYTES == align_up(value) % PAGE_BYTES == 0
    assert value - align_down(value) < PAGE_BYTES
    assert align_up(value) - value < PAGE_BYTES
