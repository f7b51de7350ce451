"""The threads that read: chunk after chunk of what a stream has requested, until it closes or fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from headrace.streaming.fetch import Chunk, Fetch


class ChunkToRead(NamedTuple):
    """A chunk that a reader has taken, and when."""

    fetch: Fetch
    chunk: Chunk
    start_s: float


class ReadQueue(Protocol):
    """What readers work for. Each method takes the stream's lock for itself."""

    def next_chunk(self) -> ChunkToRead | None:
        """Wait for a chunk to read; None when the readers are to end."""

    def chunk_read(self, taken: ChunkToRead, size_bytes: int) -> None:
        """All bytes of the chunk are where they belong."""

    def chunk_failed(self, taken: ChunkToRead, error: BaseException) -> None:
        """The chunk could not be read; the readers end."""


class Readers:
    """`count` threads that take chunks from the queue and bring their bytes with `read`."""

    def __init__(self, queue: ReadQueue, read: Callable[[Fetch, Chunk], int], *, count: int) -> None:
        self._queue, self._read = queue, read
        self._threads = [
            threading.Thread(target=self._work, name=f"headrace-reader-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        with torch.inference_mode():  # allowed to write to any tensor, however it was made
            while (taken := self._queue.next_chunk()) is not None:
                try:
                    size_bytes = self._read(taken.fetch, taken.chunk)
                except BaseException as error:
                    self._queue.chunk_failed(taken, error)
                    return
                self._queue.chunk_read(taken, size_bytes)

    def join(self) -> None:
        """Wait for all of them to end, but for one that calls this itself."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
