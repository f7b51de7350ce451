"""The output of a batch job: one line per answered request, never two, whatever happens in between.

A line counts once it ends with a newline. It is written by appending alone, so a kill, a full disk or a power cut can
leave at most an unfinished end, which the next start cuts off. Each line's `id` is a digest of custom_id, request,
model and settings, so a start that finds other ids knows that the file belongs to another job.

What is no file but a pipe or a device takes lines as well; nothing of it can be read again, so every start writes all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headrace.errors import HeadraceError, InvalidRequestError

SYNC_S = 1.0


class OutputError(HeadraceError):
    """The output cannot be written; what was written before is kept, and the next start goes on from there."""


def line_id(custom_id: str, digest: str, job: str) -> str:
    """The `id` of a request's line in a job (a digest of model and settings)."""
    return (
        "batch_req_" + hashlib.sha256(f"{job}\n{custom_id}\n{digest}".encode(errors="surrogatepass")).hexdigest()[:24]
    )


class OutputFile:
    """Appends lines to a file that one process at a time may hold open.

    Raises InvalidRequestError where the file belongs to another job or is in use, OutputError where it cannot be
    written.
    """

    def __init__(self, path: Path, expected: Mapping[str, str], *, clock: Callable[[], float] = time.monotonic) -> None:
        """`expected` maps each custom_id of the input to the id of its line."""
        self.path = path
        self._clock = clock
        self._synced = clock()
        self._is_file = path.is_file() or not path.exists()
        # Whoever may read a pipe himself never learns that its reader has gone.
        access = os.O_RDWR | os.O_CREAT | os.O_APPEND if self._is_file else os.O_WRONLY
        try:
            self._descriptor = os.open(path, access, 0o644)
        except OSError as error:
            raise InvalidRequestError(f"the output {path} cannot be opened: {error.strerror}") from error
        self.answered: set[str] = set()
        self.repaired_bytes = 0
        if not self._is_file:
            return
        try:
            self._lock()
            self.answered, self.repaired_bytes = self._recover(expected)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line at once, and see to it that it is on the disk about once a second.

        Raises BrokenPipeError where nobody reads any more.
        """
        try:
            data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:  # a custom_id with half a character, which comes back as it was given
            data = json.dumps(line).encode() + b"\n"
        size = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
            if self._clock() - self._synced >= SYNC_S:
                self.sync()
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self._is_file:
                raise OutputError(f"{self.path} cannot be written: {error.strerror}") from error
            os.ftruncate(self._descriptor, size)
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror}. {size} bytes of answers are kept; start the same "
                "command again when there is room, and it goes on from there"
            ) from error
        self.answered.add(str(line["custom_id"]))

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        self._synced = self._clock()
        if self._is_file:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Sync and close; a second call does nothing."""
        if self._descriptor >= 0:
            try:
                self.sync()
            finally:
                os.close(self._descriptor)
                self._descriptor = -1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InvalidRequestError(f"{self.path} is being written by another process; wait for it to end") from error

    def _recover(self, expected: Mapping[str, str]) -> tuple[set[str], int]:
        """Read what earlier starts wrote; cut off an unfinished end."""
        answered: set[str] = set()
        good = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                found = _read(line)
                if found is None:
                    rest = line + file.read()
                    torn = not line.endswith(b"\n") or b"\0" in line  # a power cut may leave zeros for unwritten bytes
                    if not torn or b"\n" in rest[len(line) :].rstrip(b"\0\n"):
                        raise InvalidRequestError(
                            f"line {number} of {self.path} is no answer of a batch job; give another output file"
                        )
                    break
                self._check(found, number, expected, answered)
                answered.add(found["custom_id"])
                good += len(line)
        size = os.fstat(self._descriptor).st_size
        if good < size:
            if good == 0 and not _begins_like_an_answer(self.path):
                raise InvalidRequestError(f"{self.path} is no output of a batch job; give another output file")
            os.ftruncate(self._descriptor, good)
        return answered, size - good

    def _check(self, line: dict[str, Any], number: int, expected: Mapping[str, str], answered: set[str]) -> None:
        custom_id = line["custom_id"]
        where = f"line {number} of {self.path} answers {custom_id!r}"
        remedy = "give another output file, or move this one away to begin anew"
        if custom_id not in expected:
            raise InvalidRequestError(
                f"{where}, which the input does not hold: the file belongs to another job; {remedy}"
            )
        if custom_id in answered:
            raise InvalidRequestError(f"{where} for the second time; {remedy}")
        if line["id"] != expected[custom_id]:
            raise InvalidRequestError(
                f"{where}, but to another request, or by another model or other settings: the input or the command "
                f"has changed since; {remedy}"
            )


def _read(line: bytes) -> dict[str, Any] | None:
    """A complete line of answers, or None."""
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("custom_id"), str):
        return None
    return found if isinstance(found.get("id"), str) else None


def _begins_like_an_answer(path: Path) -> bool:
    """Whether a file without a single complete line may be the torn first line of a job."""
    start = b'{"id": "batch_req_'
    with open(path, "rb") as file:
        beginning = file.read(len(start)).rstrip(b"\0")
    return start.startswith(beginning)
