"""A source of made-up bytes whose speed and failures a test controls. Shipped beside the real one, as its mirror."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field


def expected_byte(file_index: int, offset: int) -> int:
    """The byte that the fake source holds at this place: different for neighbours, files and pages."""
    return (offset + 37 * (offset >> 12) + 101 * file_index) % 251


@dataclass
class FakeSource:
    """Files of unlimited length with computed contents.

    `delay_s` is slept at each read; `fail_at_read` counts reads from 0 and raises OSError there; `on_read` is called
    before each read with its number, so that a test can hold a reader exactly where it wants it.
    """

    delay_s: float = 0.0
    fail_at_read: int | None = None
    on_read: Callable[[int], None] | None = None
    reads: list[tuple[int, int, int]] = field(default_factory=list)
    """(file, offset, length) of every read so far"""
    closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read_into(self, file_index: int, offset: int, buffer: memoryview) -> int:
        """Fill the buffer with `expected_byte`; raise where told to."""
        with self._lock:
            number = len(self.reads)
            self.reads.append((file_index, offset, len(buffer)))
        if self.on_read is not None:
            self.on_read(number)
        if self.delay_s:
            time.sleep(self.delay_s)
        if number == self.fail_at_read:
            raise OSError(5, "Input/output error")
        for page in range(0, len(buffer), 4096):
            base = expected_byte(file_index, offset + page)
            count = min(4096, len(buffer) - page)
            row = bytes((base + step) % 251 for step in range(251))
            buffer[page : page + count] = (row * (count // 251 + 1))[:count]
        return len(buffer)

    def describe(self, file_index: int) -> str:
        """Name the made-up file."""
        return f"fake file {file_index}"

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True
