"""Where bytes come from: direct reads of the checkpoint's files, past the page cache.

`ByteSource` is the seam; `fake_source.py` has the one for tests.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from headrace.errors import CheckpointChangedError, CheckpointError
from headrace.model.safetensors_index import ShardFile


class ByteSource(Protocol):
    """Something that fills buffers with bytes of numbered files. Called from several threads at once."""

    def read_into(self, file_index: int, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` on and return the bytes read: fewer than asked only at the end of the file."""

    def describe(self, file_index: int) -> str:
        """Name the file for error messages."""

    def close(self) -> None:
        """Give back what is held."""


class DirectFiles:
    """Read-only files opened with O_DIRECT.

    Where a file system refuses direct reads (tmpfs does), reads are ordinary ones followed by the advice to drop the
    pages at once, so that the page cache still does not fill. A file that changes while it is open raises
    CheckpointChangedError at the next read of it.
    """

    def __init__(self, files: Sequence[ShardFile]) -> None:
        self._files = tuple(files)
        self._descriptors: list[int] = []
        self.direct: list[bool] = []
        try:
            for file in self._files:
                descriptor, direct = _open_direct(file.path)
                self._descriptors.append(descriptor)
                self.direct.append(direct)
        except BaseException:
            self.close()
            raise

    def read_into(self, file_index: int, offset: int, buffer: memoryview) -> int:
        """See ByteSource. For direct files offset, length and address must be page multiples."""
        self._check_unchanged(file_index)
        descriptor = self._descriptors[file_index]
        done = 0
        while done < len(buffer):
            direct = self.direct[file_index]  # another thread may fall back while this one reads
            try:
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    # Some file systems accept the flag and refuse the read.
                    self._fall_back(file_index)
                    continue
                raise
            done += count
            if offset + done >= self._files[file_index].size_bytes:
                break
            if count == 0:
                raise CheckpointChangedError(f"{self.describe(file_index)} ended early, at byte {offset + done}")
        if not self.direct[file_index]:
            os.posix_fadvise(descriptor, offset, done, os.POSIX_FADV_DONTNEED)
        return done

    def describe(self, file_index: int) -> str:
        """Return the file's path."""
        return str(self._files[file_index].path)

    def close(self) -> None:
        """Close all files; a second call does nothing."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _check_unchanged(self, file_index: int) -> None:
        file = self._files[file_index]
        status = os.fstat(self._descriptors[file_index])
        if (status.st_size, status.st_mtime_ns) != (file.size_bytes, file.mtime_ns):
            raise CheckpointChangedError(
                f"{file.path} changed while it was in use ({file.size_bytes} bytes before, {status.st_size} now, or "
                "written to); start again when whatever writes it is done"
            )

    def _fall_back(self, file_index: int) -> None:
        """Make the open file an ordinary one; opening its path again might find another file."""
        descriptor = self._descriptors[file_index]
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
        self.direct[file_index] = False


def _open_direct(path: Path) -> tuple[int, bool]:
    """Open for direct reads where possible; returns the descriptor and whether reads will be direct."""
    flag = getattr(os, "O_DIRECT", 0)
    if flag:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error


class RateLimit:
    """Shares one virtual link of `bytes_per_s` among threads: every read occupies it for size / rate seconds.

    Idle time is not saved up, so the rate is steady and never exceeded over any stretch longer than one chunk.
    `sleep` must return early, and may, when the stream is being closed.
    """

    def __init__(
        self,
        bytes_per_s: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._link_free_at = 0.0

    def occupy(self, size_bytes: int) -> float:
        """Reserve the link for `size_bytes` and return the moment at which the last byte has passed it."""
        with self._lock:
            start = max(self._clock(), self._link_free_at)
            self._link_free_at = start + size_bytes / self._bytes_per_s
            return self._link_free_at

    def wait_until(self, moment: float) -> None:
        """Sleep until `moment` of the clock."""
        left = moment - self._clock()
        if left > 0:
            self._sleep(left)
