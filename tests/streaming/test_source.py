"""Files are read past the page cache and in place; whatever happens to them meanwhile is told; the rate is kept."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import CheckpointChangedError, CheckpointError
from headrace.model.layout import PAGE_BYTES
from headrace.model.safetensors_index import ShardFile
from headrace.streaming.source import DirectFiles, RateLimit

pytestmark = pytest.mark.timeout(60)

SHARED_MEMORY = Path("/dev/shm")
UNALIGNED_BYTES = 5 * PAGE_BYTES + 1234


def content_of(size_bytes: int, seed: int = 7) -> bytes:
    """Return bytes that differ from page to page."""
    return bytes((step * 31 + (step >> 12) * 17 + seed) % 251 for step in range(size_bytes))


def write(path: Path, content: bytes) -> ShardFile:
    """Write a file and describe it as it lies there now."""
    path.write_bytes(content)
    return shard(path)


def shard(path: Path) -> ShardFile:
    status = path.stat()
    return ShardFile(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


def aligned(size_bytes: int) -> memoryview:
    """Memory that begins at a page, as a slot does, filled with a byte that no file holds."""
    buffer = memoryview(mmap.mmap(-1, size_bytes))
    buffer[:] = b"\xee" * size_bytes
    return buffer


@pytest.fixture(params=["disk", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Yield a folder on the disk of the checkout, then one on tmpfs, which handles direct reads differently."""
    parent = Path(__file__).parent if request.param == "disk" else SHARED_MEMORY
    if not parent.is_dir():
        pytest.skip("this machine has no /dev/shm, so no tmpfs to try")
    with tempfile.TemporaryDirectory(dir=parent, prefix=".headrace-test-") as name:
        yield Path(name)


@pytest.fixture
def files(directory: Path) -> Iterator[DirectFiles]:
    source = DirectFiles([write(directory / "a.bin", content_of(UNALIGNED_BYTES))])
    yield source
    source.close()


# -- reading -------------------------------------------------------------------------------------------------------


def test_bytes_arrive_as_they_lie_there(directory: Path) -> None:
    contents = [content_of(4 * PAGE_BYTES, seed=1), content_of(6 * PAGE_BYTES, seed=2)]
    source = DirectFiles([write(directory / f"{number}.bin", content) for number, content in enumerate(contents)])
    buffer = aligned(2 * PAGE_BYTES)
    for file_index, content in enumerate(contents):
        for offset in (0, PAGE_BYTES, 2 * PAGE_BYTES):
            assert source.read_into(file_index, offset, buffer) == len(buffer)
            assert bytes(buffer) == content[offset : offset + len(buffer)]
        assert source.describe(file_index) == str(directory / f"{file_index}.bin")
    source.close()
    source.close()


def test_the_end_of_a_file_need_not_be_aligned(files: DirectFiles) -> None:
    buffer = aligned(3 * PAGE_BYTES)
    content = content_of(UNALIGNED_BYTES)
    start = 4 * PAGE_BYTES
    assert files.read_into(0, start, buffer) == UNALIGNED_BYTES - start
    assert bytes(buffer[: UNALIGNED_BYTES - start]) == content[start:]


def test_many_threads_read_at_once(files: DirectFiles) -> None:
    content = content_of(UNALIGNED_BYTES)
    wrong: list[int] = []

    def read(page: int) -> None:
        buffer = aligned(PAGE_BYTES)
        for _ in range(20):
            files.read_into(0, page * PAGE_BYTES, buffer)
            if bytes(buffer) != content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]:
                wrong.append(page)

    threads = [threading.Thread(target=read, args=(page,)) for page in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_refused_direct_read_becomes_an_ordinary_one(directory: Path) -> None:
    """Memory that is not aligned is what every file system refuses that has direct reads at all."""
    content = content_of(UNALIGNED_BYTES)
    source = DirectFiles([write(directory / "a.bin", content)])
    (directory / "a.bin").unlink()  # it is not looked up by its path again
    buffer = aligned(4 * PAGE_BYTES)[1 : 1 + PAGE_BYTES]
    assert source.read_into(0, PAGE_BYTES, buffer) == PAGE_BYTES
    assert bytes(buffer) == content[PAGE_BYTES : 2 * PAGE_BYTES]
    buffer = aligned(6 * PAGE_BYTES)
    assert source.read_into(0, 0, buffer) == UNALIGNED_BYTES
    assert bytes(buffer[:UNALIGNED_BYTES]) == content
    source.close()


def test_several_threads_may_be_refused_at_once(files: DirectFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    files.direct[0] = True
    both = threading.Barrier(2)
    outcomes: list[int | OSError] = []
    refused: set[int] = set()
    ordinary_read = os.preadv

    def refuse_once(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if threading.get_ident() not in refused:
            refused.add(threading.get_ident())
            both.wait(10)
            raise OSError(errno.EINVAL, "Invalid argument")
        return ordinary_read(descriptor, buffers, offset)

    def read() -> None:
        try:
            outcomes.append(files.read_into(0, 0, aligned(PAGE_BYTES)))
        except OSError as error:
            outcomes.append(error)

    monkeypatch.setattr(os, "preadv", refuse_once)
    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [PAGE_BYTES, PAGE_BYTES]
    assert files.direct == [False]


def test_where_direct_opening_is_refused_reads_are_ordinary(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = content_of(UNALIGNED_BYTES)
    file = write(directory / "a.bin", content)
    monkeypatch.setattr(os, "O_DIRECT", 0)
    source = DirectFiles([file])
    assert source.direct == [False]
    buffer = aligned(6 * PAGE_BYTES)
    assert source.read_into(0, 0, buffer) == UNALIGNED_BYTES
    assert bytes(buffer[:UNALIGNED_BYTES]) == content
    source.close()


def test_files_are_opened_for_reading_only(directory: Path) -> None:
    source = DirectFiles([write(directory / "a.bin", content_of(PAGE_BYTES))])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(source._descriptors[0], b"x")
    source.close()


# -- the page cache --------------------------------------------------------------------------------------------------


def cached_pages(path: Path) -> int:
    """Pages of the file that lie in the page cache, as the kernel tells util-linux."""
    told = subprocess.run(
        ["fincore", "--noheadings", "--raw", "--output", "PAGES", str(path)], check=True, capture_output=True, text=True
    )
    return int(told.stdout)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "ordinary"])
def test_reading_leaves_the_page_cache_empty(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("fincore") is None:
        pytest.skip("fincore, which tells what the page cache holds, is not installed")
    pages = 512
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent, prefix=".headrace-test-") as name:
        path = Path(name) / "a.bin"
        with open(path, "wb") as file:
            file.write(bytes(pages * PAGE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cached_pages(path) != 0:
            pytest.skip("the file system under the checkout keeps pages that it was told to drop")
        if not direct:
            monkeypatch.setattr(os, "O_DIRECT", 0)
        source = DirectFiles([shard(path)])
        buffer = aligned(64 * PAGE_BYTES)
        for offset in range(0, pages * PAGE_BYTES, len(buffer)):
            assert source.read_into(0, offset, buffer) == len(buffer)
        source.close()
        if direct and source.direct == [False]:
            pytest.skip("the file system under the checkout has no direct reads")
        left = cached_pages(path)
        assert left == 0 if direct else left < 2 * len(buffer) // PAGE_BYTES  # reading ahead is the kernel's own


# -- files that do not stay what they were -----------------------------------------------------------------------------


def test_a_file_that_was_written_to_is_noticed(files: DirectFiles, directory: Path) -> None:
    buffer = aligned(PAGE_BYTES)
    files.read_into(0, 0, buffer)
    path = directory / "a.bin"
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(b"changed")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(CheckpointChangedError, match="changed while it was in use") as caught:
        files.read_into(0, 0, buffer)
    assert str(path) in str(caught.value)


def test_a_file_that_grew_is_noticed(files: DirectFiles, directory: Path) -> None:
    path = directory / "a.bin"
    before = path.stat()
    with open(path, "ab") as file:
        file.write(b"more")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointChangedError, match=f"{UNALIGNED_BYTES} bytes before, {UNALIGNED_BYTES + 4} now"):
        files.read_into(0, 0, aligned(PAGE_BYTES))


def test_a_file_that_was_truncated_is_noticed(files: DirectFiles, directory: Path) -> None:
    path = directory / "a.bin"
    os.truncate(path, 2 * PAGE_BYTES)
    with pytest.raises(CheckpointChangedError) as caught:
        files.read_into(0, PAGE_BYTES, aligned(PAGE_BYTES))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("left_bytes", [0, 2 * PAGE_BYTES, 2 * PAGE_BYTES + 100])
def test_a_file_that_is_truncated_in_the_middle_of_a_read_is_noticed(
    files: DirectFiles, directory: Path, monkeypatch: pytest.MonkeyPatch, left_bytes: int
) -> None:
    """The check passes, then the file is cut, then it is read."""
    path = directory / "a.bin"
    monkeypatch.setattr(files, "_check_unchanged", lambda file_index: os.truncate(path, left_bytes))
    with pytest.raises(CheckpointChangedError) as caught:
        files.read_into(0, 0, aligned(6 * PAGE_BYTES))
    assert str(path) in str(caught.value)
    assert "ended early" in str(caught.value)


def test_a_file_that_was_replaced_before_it_was_opened_is_noticed(directory: Path) -> None:
    path = directory / "a.bin"
    file = write(path, content_of(PAGE_BYTES))
    path.write_bytes(content_of(2 * PAGE_BYTES))
    source = DirectFiles([file])
    with pytest.raises(CheckpointChangedError):
        source.read_into(0, 0, aligned(PAGE_BYTES))
    source.close()


def test_a_file_that_was_unlinked_can_still_be_read(files: DirectFiles, directory: Path) -> None:
    (directory / "a.bin").unlink()
    buffer = aligned(PAGE_BYTES)
    assert files.read_into(0, 0, buffer) == PAGE_BYTES
    assert bytes(buffer) == content_of(PAGE_BYTES)


def test_a_missing_file_is_named_and_the_others_are_closed_again(directory: Path) -> None:
    present = write(directory / "a.bin", content_of(PAGE_BYTES))
    missing = present._replace(path=directory / "missing.bin")
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CheckpointError, match=r"missing\.bin cannot be opened: No such file"):
        DirectFiles([present, missing])
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


# -- the rate ----------------------------------------------------------------------------------------------------------


class FakeTime:
    """A clock that moves only when somebody sleeps or the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds


@given(
    rate=st.floats(1.0, 1e10),
    reads=st.lists(st.tuples(st.integers(1, 1 << 24), st.floats(0.0, 10.0)), min_size=1, max_size=30),
)
@settings(deadline=None)
def test_bytes_never_come_faster_than_the_rate(rate: float, reads: list[tuple[int, float]]) -> None:
    time = FakeTime()
    limit = RateLimit(rate, clock=time.clock, sleep=time.sleep)
    finished: list[tuple[float, float, int]] = []
    for size_bytes, idle_s in reads:
        time.now_s += idle_s
        began = time.now_s
        limit.wait_until(limit.occupy(size_bytes))
        finished.append((began, time.now_s, size_bytes))
    # Over every stretch from the beginning of one read to the end of another: idle time earns no credit.
    for first, (began, _, _) in enumerate(finished):
        total_bytes = 0
        for _, ended, size_bytes in finished[first:]:
            total_bytes += size_bytes
            assert total_bytes <= rate * (ended - began) * (1 + 1e-9) + rate * 1e-9
    lower_s = sum(size_bytes for size_bytes, _ in reads) / rate + sum(idle_s for _, idle_s in reads)
    assert time.now_s - 1000.0 == pytest.approx(lower_s, rel=1e-6, abs=1e-6), "and not slower either"


def test_a_reader_that_took_its_time_need_not_wait() -> None:
    time = FakeTime()
    limit = RateLimit(100.0, clock=time.clock, sleep=time.sleep)
    passed = limit.occupy(50)
    time.now_s += 2.0  # the disk itself was slower than the limit
    limit.wait_until(passed)
    assert time.now_s == 1002.0


def test_threads_share_one_link() -> None:
    time = FakeTime()
    limit = RateLimit(100.0, clock=time.clock, sleep=time.sleep)
    moments: list[float] = []
    threads = [threading.Thread(target=lambda: moments.append(limit.occupy(100))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(moments) == [1001.0, 1002.0, 1003.0, 1004.0]
