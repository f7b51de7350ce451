"""How a block's bytes come to where the consumer finds them: straight into place, or through a ring to a device.

`DirectTransfer` is the host's: a read call writes into the slot. `StagedTransfer` is an accelerator's: a read call
fills a chunk of page-locked memory, and a copy takes its bytes from there to their aligned places in the slot, while
the next chunk is being read; blocks that wait in page-locked host memory skip the first hop and are one copy each.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from headrace.model.layout import AlignedLayout
from headrace.streaming.device import DISK_LANE, STORE_LANE, Copied, CopyPart, Device
from headrace.streaming.fetch import Chunk, Fetch
from headrace.streaming.ring import Ring
from headrace.streaming.source import ByteSource, RateLimit


class Transfer(Protocol):
    """What the stream's readers do with a chunk. Called without the stream's lock."""

    def read(self, fetch: Fetch, chunk: Chunk) -> int:
        """Bring the bytes of one chunk; returns how many were read from a file."""

    def send(self, fetch: Fetch) -> None:
        """Enqueue the copy of a block that lies whole in page-locked host memory; never blocks."""

    def stop(self) -> None:
        """Let no reader wait any more."""


class DirectTransfer:
    """Reads write into the slot itself."""

    def __init__(self, source: ByteSource, limit: RateLimit | None) -> None:
        self._source, self._limit = source, limit

    def read(self, fetch: Fetch, chunk: Chunk) -> int:
        """One read call. The slot's former computation must be over before a byte is written."""
        if fetch.slot is not None:
            fetch.slot.reusable.wait()
        return read_chunk(
            self._source, self._limit, chunk, fetch.piece.buffer[chunk.start : chunk.start + chunk.length]
        )

    def send(self, fetch: Fetch) -> None:
        """There is no other memory."""
        del fetch
        raise AssertionError("nothing is copied where reads land in place")

    def stop(self) -> None:
        """Readers wait for nothing but files."""


class StagedTransfer:
    """Reads fill chunks of a ring; copies bring them to the device, or into stores of host memory."""

    def __init__(
        self,
        device: Device,
        source: ByteSource,
        limit: RateLimit | None,
        *,
        aligned: Sequence[AlignedLayout],
        ring: Ring,
    ) -> None:
        self._device, self._source, self._limit = device, source, limit
        self._aligned = aligned
        self._ring = ring
        self._sending = threading.Lock()
        """copies of one block are enqueued and noted in one order"""

    def read(self, fetch: Fetch, chunk: Chunk) -> int:
        """Fill a chunk of the ring and send it on. The copy, not this thread, waits for the slot."""
        place = self._ring.take()
        emptied = place.emptied
        try:
            if chunk.file_index is None:
                assert fetch.store is not None
                place.piece.tensor[: chunk.length].copy_(fetch.store.tensor[chunk.offset : chunk.offset + chunk.length])
                parts = [
                    CopyPart(
                        place.piece.tensor[: chunk.length],
                        fetch.piece.tensor[chunk.start : chunk.start + chunk.length],
                    )
                ]
                emptied = self._send(fetch, parts, DISK_LANE).end
                return 0
            size_bytes = read_chunk(self._source, self._limit, chunk, place.piece.buffer[: chunk.length])
            target = fetch.piece if fetch.store is None else fetch.store
            parts = [
                CopyPart(
                    place.piece.tensor[move.start - chunk.start : move.start - chunk.start + move.length],
                    target.tensor[move.target : move.target + move.length],
                )
                for move in self._aligned[fetch.block_index].moves_within(chunk.start, chunk.length)
            ]
            if fetch.store is not None:
                for part in parts:
                    part.target.copy_(part.source)  # within host memory, by this thread
            elif parts:
                emptied = self._send(fetch, parts, DISK_LANE).end
            return size_bytes
        finally:
            self._ring.give_back(place, emptied)

    def send(self, fetch: Fetch) -> None:
        """One copy for the whole block, from its store to its slot."""
        assert fetch.store is not None
        size_bytes = self._aligned[fetch.block_index].size_bytes
        part = CopyPart(fetch.store.tensor[:size_bytes], fetch.piece.tensor[:size_bytes])
        self._send(fetch, [part], STORE_LANE)

    def _send(self, fetch: Fetch, parts: Sequence[CopyPart], lane: int) -> Copied:
        after = () if fetch.slot is None else (fetch.slot.reusable,)
        with self._sending:
            copied = self._device.copy(parts, after=after, lane=lane)
            fetch.copied = copied
            if fetch.copy_begin is None:
                fetch.copy_begin = copied.begin
            return copied

    def stop(self) -> None:
        """Readers that wait for a chunk of the ring give up."""
        self._ring.stop()


def read_chunk(source: ByteSource, limit: RateLimit | None, chunk: Chunk, buffer: memoryview) -> int:
    """One read call, paced by the limit."""
    assert chunk.file_index is not None
    passed = limit.occupy(chunk.length) if limit is not None else None
    size_bytes = source.read_into(chunk.file_index, chunk.offset, buffer)
    if limit is not None and passed is not None:
        limit.wait_until(passed)
    return size_bytes
