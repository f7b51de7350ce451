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
from collections.abc import Callable
from typing import Protocol

import torch

from headrace.errors import BudgetError
from headrace.model.layout import DEVICE_ALIGNMENT_BYTES, PAGE_BYTES
from headrace.units import format_bytes

HUGE_PAGE_BYTES = 2 << 20
_TOUCHED_AT_ONCE_BYTES = 8 << 20
_TOUCHING_THREADS_MAX = 8


class Memory(Protocol):
    """Memory taken at once and handed out piece by piece, on the host or on a device; never grows."""

    @property
    def size_bytes(self) -> int:
        """All of it."""

    @property
    def free_bytes(self) -> int:
        """Bytes not handed out yet."""

    def take(self, size_bytes: int) -> Piece:
        """Hand out the next `size_bytes`; raises BudgetError beyond the memory's size."""

    def close(self) -> None:
        """Give everything back; pieces handed out must not be used afterwards."""


class Arena:
    """One private anonymous mapping, handed out in page-aligned pieces from the start on; never grows.

    Pages are taken from the system when they are first written, or all at once by `touch`. `close` gives everything
    back; views handed out before must not be used afterwards.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.pinned = False
        """page-locked and known to a device, which copies from it without a detour (`Device.allocate_host`)"""
        self.on_close: Callable[[], None] | None = None
        """called before the memory is unmapped, so that locked pages are unlocked first"""
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

    @property
    def address(self) -> int:
        """Where the memory begins."""
        return self._bytes.data_ptr()

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
        if self.on_close is not None:
            drop_views = self.on_close
            self.on_close = None
            drop_views()
        if hasattr(mmap, "MADV_DONTNEED") and len(self._map):
            self._map.madvise(mmap.MADV_DONTNEED)


class Piece:
    """A stretch of memory: a tensor of bytes, and on the host a writable buffer too. Owner: the caller that took it."""

    __slots__ = ("_buffer", "tensor")

    def __init__(self, tensor: torch.Tensor, buffer: memoryview | None) -> None:
        self.tensor = tensor
        self._buffer = buffer

    @property
    def buffer(self) -> memoryview:
        """The bytes as a buffer, for reading files into; a device's memory has none and raises TypeError."""
        if self._buffer is None:
            raise TypeError("memory of a device has no buffer on the host")
        return self._buffer

    @property
    def size_bytes(self) -> int:
        """Length."""
        return self.tensor.numel()


class TensorMemory:
    """Memory of a device as its allocator gives it: one tensor of bytes, handed out from the start on."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor
        self.size_bytes = tensor.numel()
        self._taken_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Bytes not handed out yet."""
        return self.size_bytes - self._taken_bytes

    def take(self, size_bytes: int) -> Piece:
        """Hand out the next `size_bytes` (a multiple of DEVICE_ALIGNMENT_BYTES); raises BudgetError beyond its size."""
        if size_bytes % DEVICE_ALIGNMENT_BYTES:
            raise ValueError(f"device pieces are multiples of {DEVICE_ALIGNMENT_BYTES}, not {size_bytes} bytes")
        if self._tensor is None or size_bytes > self.free_bytes:
            raise BudgetError(f"the memory of {self.size_bytes} bytes has {self.free_bytes} left, not {size_bytes}")
        start = self._taken_bytes
        self._taken_bytes += size_bytes
        return Piece(self._tensor[start : start + size_bytes], None)

    def close(self) -> None:
        """Let go of the memory; the allocator has it back when the last piece of it is dropped."""
        self._tensor = None
