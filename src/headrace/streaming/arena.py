"""All memory that weights as stored may ever hold, taken once at the start.

Python's `mmap.mmap(-1, n)` is shared memory and ignores the advice for huge pages; private anonymous memory takes it,
and direct reads into it are up to twice as fast, since the kernel pins 512 times fewer pages.

Pages are touched before they are read into. On a virtual machine the first touch of memory that its host has not
given it yet was seen to take up to 2 seconds per GiB; taken within direct reads, it made blocks that compute meanwhile
10 to 20 times as slow, and the first pass twice as long.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading

import torch

from headrace.errors import BudgetError
from headrace.planning.extents import PAGE_BYTES
from headrace.units import format_bytes

HUGE_PAGE_BYTES = 2 << 20
_TOUCHED_AT_ONCE_BYTES = 8 << 20
_TOUCHING_THREADS_MAX = 8


class Arena:
    """One private anonymous mapping, handed out in page-aligned pieces from the start on; never grows.

    Pages are taken from the system when they are first written, or all at once by `touch`. `close` gives everything
    back; views handed out before must not be used afterwards.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._taken_bytes = 0
        try:
            self._map = mmap.mmap(-1, max(size_bytes, PAGE_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise BudgetError(f"the system refuses {format_bytes(size_bytes)} of memory: {error}") from error
        if size_bytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without huge pages: slower, not wrong
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._view = memoryview(self._map)

    @property
    def free_bytes(self) -> int:
        """Bytes not handed out yet."""
        return self.size_bytes - self._taken_bytes

    def take(self, size_bytes: int) -> Piece:
        """Hand out the next `size_bytes` (a page multiple); raises BudgetError beyond the arena's size."""
        if size_bytes % PAGE_BYTES:
            raise ValueError(f"arena pieces are page multiples, not {size_bytes} bytes")
        if size_bytes > self.free_bytes:
            raise BudgetError(f"the arena of {self.size_bytes} bytes has {self.free_bytes} left, not {size_bytes}")
        start = self._taken_bytes
        self._taken_bytes += size_bytes
        return Piece(self._bytes[start : start + size_bytes], self._view[start : start + size_bytes])

    def touch(self) -> None:
        """Take all pages from the system now, with a thread per processor; what is in them becomes undefined.

        Threads, since the time goes into the kernel's (and a host's) clearing of pages.
        """
        starts = range(0, self.size_bytes, _TOUCHED_AT_ONCE_BYTES)
        count = min(len(starts), os.cpu_count() or 1, _TOUCHING_THREADS_MAX)

        def work(number: int) -> None:
            with torch.inference_mode():  # allowed to write to any tensor, however it was made
                for start in starts[number::count]:
                    self._bytes[start : min(start + _TOUCHED_AT_ONCE_BYTES, self.size_bytes) : PAGE_BYTES].zero_()

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(1, count)]
        for thread in threads:
            thread.start()
        if count:
            work(0)
        for thread in threads:
            thread.join()

    def close(self) -> None:
        """Give the memory back to the system. The mapping itself goes when the last view of it does."""
        if hasattr(mmap, "MADV_DONTNEED") and len(self._map):
            self._map.madvise(mmap.MADV_DONTNEED)


class Piece:
    """A stretch of an arena, seen as a tensor of bytes and as a writable buffer. Owner: whoever took it."""

    __slots__ = ("buffer", "tensor")

    def __init__(self, tensor: torch.Tensor, buffer: memoryview) -> None:
        self.tensor = tensor
        self.buffer = buffer

    @property
    def size_bytes(self) -> int:
        """Length."""
        return len(self.buffer)
