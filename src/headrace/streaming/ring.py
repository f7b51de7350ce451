"""A few page-locked chunks of host memory between disk and device.

Bytes are read into one, copied from it, and it is free again when the copy is done. Chunks, not blocks: copying begins
before a block is read to its end.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from headrace.errors import StreamError
from headrace.streaming.arena import Arena, Piece
from headrace.streaming.device import COMPLETE, Device, DeviceEvent


@dataclass(eq=False)
class RingChunk:
    """One chunk. Whoever took it may write into it; `emptied` is the copy that read it last."""

    piece: Piece
    emptied: DeviceEvent = COMPLETE


class Ring:
    """`chunks` chunks of `chunk_bytes` each, taken in the order in which they were given back."""

    def __init__(self, device: Device, *, chunks: int, chunk_bytes: int) -> None:
        self._arena: Arena = device.allocate_host(chunks * chunk_bytes)
        self._free = deque(RingChunk(self._arena.take(chunk_bytes)) for _ in range(chunks))
        self._given_back = threading.Condition()
        self._closed = False

    @property
    def size_bytes(self) -> int:
        """Host memory that the ring holds."""
        return self._arena.size_bytes

    def take(self) -> RingChunk:
        """The next chunk, once the copy from it is done. Blocks the calling reader; raises StreamError when closed."""
        with self._given_back:
            while not self._free:
                if self._closed:
                    raise StreamError("the stream is closed")
                self._given_back.wait()
            chunk = self._free.popleft()
        chunk.emptied.wait()
        return chunk

    def give_back(self, chunk: RingChunk, emptied: DeviceEvent) -> None:
        """The chunk may be written to again when `emptied` has passed."""
        with self._given_back:
            chunk.emptied = emptied
            self._free.append(chunk)
            self._given_back.notify()

    def stop(self) -> None:
        """Let nobody wait for a chunk any more."""
        with self._given_back:
            self._closed = True
            self._given_back.notify_all()

    def close(self) -> None:
        """Give the memory back; all copies from it must be done."""
        self.stop()
        self._arena.close()
