"""One block on its way, and the places that its bytes pass: reads of files, a slot, a store in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headrace.model.layout import PAGE_BYTES, Layout, align_down
from headrace.streaming.arena import Piece
from headrace.streaming.device import COMPLETE, Copied, DeviceEvent


class Chunk(NamedTuple):
    """One piece of reading: a call that reads a file, or (`file_index` None) a copy out of a store."""

    file_index: int | None
    offset: int
    start: int
    """where these bytes lie in the block as it is read, or in the store"""
    length: int


@dataclass(eq=False)
class Slot:
    """A place for one travelling block. Refilled only when `reusable`, recorded at release, has passed."""

    piece: Piece
    reusable: DeviceEvent = COMPLETE


@dataclass(eq=False)
class Fetch:
    """One block on its way, or arrived and not yet given back."""

    block_index: int
    pass_index: int
    piece: Piece
    """where the consumer will find it"""
    slot: Slot | None
    chunks_left: int
    store: Piece | None = None
    """host memory that is filled on the way, or from which the block comes"""
    copied: Copied | None = None
    """the latest copy into `piece` so far; None where there was none, or where reads land in place"""
    copy_begin: DeviceEvent | None = None
    started_s: float = 0.0
    handed_out_s: float = 0.0
    began: DeviceEvent | None = None
    """on an accelerator: when the device could begin to compute with it"""

    @property
    def arrived(self) -> bool:
        """Read to the end, and on an accelerator all of its copies are enqueued."""
        return self.chunks_left == 0


def cut(layout: Layout, chunk_bytes: int) -> list[Chunk]:
    """Cut a block's extents into reads of at most `chunk_bytes`, in whole pages."""
    size = max(PAGE_BYTES, align_down(chunk_bytes))
    return [
        Chunk(extent.file_index, extent.file_offset + done, extent.slot_offset + done, min(size, extent.length - done))
        for extent in layout.extents
        for done in range(0, extent.length, size)
    ]


def cut_store(size_bytes: int, chunk_bytes: int) -> Sequence[Chunk]:
    """Cut a block that lies in host memory into pieces that the ring can carry."""
    return [Chunk(None, done, done, min(chunk_bytes, size_bytes - done)) for done in range(0, size_bytes, chunk_bytes)]
