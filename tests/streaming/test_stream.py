"""The stream hands out the right bytes and never touches them while they are lent; errors and close leave nothing."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from queue import SimpleQueue

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.errors import CheckpointChangedError, StreamError
from headrace.model.layout import PAGE_BYTES, ByteRange, Layout, lay_out
from headrace.planning.plan import Placement
from headrace.planning.timeline import Lane
from headrace.streaming.arena import Piece
from headrace.streaming.device import CpuDevice, Device
from headrace.streaming.fakes.host import FakeDevice, FakeEvent
from headrace.streaming.fakes.source import FakeSource, expected_byte
from headrace.streaming.stream import POISON, Stream, StreamSettings

pytestmark = pytest.mark.timeout(90)

READER_NAME = "headrace-reader"
PATIENCE_S = 30.0
MOST_BLOCKS = 9

property_settings = settings(max_examples=200, deadline=None)


# -- made-up models ------------------------------------------------------------------------------------------------


@lru_cache
def layout_of(block_index: int) -> Layout:
    """One to three pages of file 0 at an odd offset, and in every third block as far-off bytes of file 1."""
    pages = 1 + block_index % 3
    ranges = [ByteRange("matrix", 0, block_index * 0x20000 + 37, pages * PAGE_BYTES - 100)]
    if block_index % 3 == 1:
        ranges.append(ByteRange("bias", 1, block_index * 0x50000 + 4000, 300))
    return lay_out(ranges)


@lru_cache
def content_of(block_index: int) -> bytes:
    """Return the block's memory, over-reading included, byte for byte."""
    return b"".join(
        bytes(expected_byte(extent.file_index, extent.file_offset + step) for step in range(extent.length))
        for extent in layout_of(block_index).extents
    )


def footprint(blocks: Sequence[int]) -> int:
    return sum(layout_of(block).footprint_bytes for block in blocks)


def streamed_of(resident: Sequence[bool]) -> list[int]:
    return [block for block, stays in enumerate(resident) if not stays]


def read_order(resident: Sequence[bool], chunk_bytes: int, passes: int) -> list[tuple[int, tuple[int, int, int]]]:
    """(block, read) of a run, in order: written anew from the description of the stream."""
    order = []
    for pass_index in range(passes):
        for block, stays in enumerate(resident):
            if stays and pass_index > 0:
                continue
            for extent in layout_of(block).extents:
                for done in range(0, extent.length, chunk_bytes):
                    length = min(chunk_bytes, extent.length - done)
                    order.append((block, (extent.file_index, extent.file_offset + done, length)))
    return order


# -- watching ------------------------------------------------------------------------------------------------------


@dataclass
class GuardedSource(FakeSource):
    """A fake source that notices every write into memory that somebody may still read."""

    guarded: dict[int, tuple[int, int]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    _tokens: int = 0

    def lend(self, piece: Piece) -> int:
        """From now on nobody may write into this memory."""
        with self._lock:
            self._tokens += 1
            self.guarded[self._tokens] = (address_of(piece.buffer), len(piece.buffer))
            return self._tokens

    def give_back(self, token: int) -> None:
        with self._lock:
            del self.guarded[token]

    def read_into(self, file_index: int, offset: int, buffer: memoryview) -> int:
        self._check(buffer, f"a read of file {file_index} at {offset} began in lent memory")
        size_bytes = super().read_into(file_index, offset, buffer)
        self._check(buffer, f"a read of file {file_index} at {offset} ended in lent memory")
        return size_bytes

    def _check(self, buffer: memoryview, what: str) -> None:
        start = address_of(buffer)
        with self._lock:
            if any(start < first + length and first < start + len(buffer) for first, length in self.guarded.values()):
                self.violations.append(what)


def address_of(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def assert_content(piece: Piece, block_index: int, when: str) -> None:
    expected = content_of(block_index)
    assert bytes(piece.buffer[: len(expected)]) == expected, f"block {block_index} {when}"
    assert bytes(piece.tensor[: len(expected)].numpy()) == expected, f"block {block_index} {when}, as a tensor"


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the readers have come so far; fails after PATIENCE_S."""
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.0005)


def held_by(gate: threading.Event) -> Callable[[int], None]:
    """Return an `on_read` at which readers wait until the test opens the gate."""

    def hold(number: int) -> None:
        gate.wait(PATIENCE_S)

    return hold


def settle() -> None:
    """Give the readers time for what they must not do."""
    time.sleep(0.05)


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(READER_NAME)]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    assert reader_threads() == []
    yield
    assert reader_threads() == []


@contextmanager
def streaming(
    source: FakeSource,
    resident: Sequence[bool],
    *,
    slots: int = 2,
    device: Device | None = None,
    overlap: bool = True,
    threads: int = 1,
    chunk_bytes: int = PAGE_BYTES,
    limit: float | None = None,
    poison: bool = False,
) -> Iterator[Stream]:
    layouts = [layout_of(block) for block in range(len(resident))]
    stream = Stream(
        layouts=layouts,
        places=[Placement.DEVICE if stays else Placement.DISK for stays in resident],
        source=source,
        device=device if device is not None else CpuDevice(),
        settings=StreamSettings(
            slots=slots,
            slot_bytes=max((layout.footprint_bytes for layout in layouts), default=0),
            overlap=overlap,
            reader_threads=threads,
            chunk_bytes=chunk_bytes,
            read_limit_bytes_per_s=limit,
            poison=poison,
            block_names=tuple(f"layer {block}" for block in range(len(resident))),
        ),
    )
    try:
        yield stream
    finally:
        stream.close()
    assert reader_threads() == []
    assert source.closed


def use(stream: Stream, source: GuardedSource, block_index: int) -> None:
    """Wait for a block, look at it twice, give it back; the books must balance throughout."""
    piece = stream.wait(block_index)
    token = source.lend(piece)
    stream.check_integrity()
    assert_content(piece, block_index, "when it was handed out")
    time.sleep(0)
    assert_content(piece, block_index, "just before release")
    source.give_back(token)
    stream.release(block_index)
    stream.check_integrity()


residencies = st.lists(st.booleans(), min_size=1, max_size=MOST_BLOCKS)
chunk_sizes = st.sampled_from([PAGE_BYTES, 2 * PAGE_BYTES, 1 << 20])


# -- right bytes, at the right time ----------------------------------------------------------------------------------


@given(
    resident=residencies,
    slots=st.integers(1, 4),
    threads=st.integers(1, 4),
    chunk_bytes=chunk_sizes,
    passes=st.integers(1, 4),
    overlap=st.booleans(),
    poison=st.booleans(),
)
@example([False] * 5, 2, 1, PAGE_BYTES, 4, True, False)  # a ring that does not divide the number of blocks
@example([False] * 7, 3, 4, PAGE_BYTES, 3, True, True)
@example([False] * 2, 4, 2, PAGE_BYTES, 3, True, False)  # more slots than blocks
@example([True] * 4, 1, 2, PAGE_BYTES, 3, False, False)
@example([False], 1, 1, PAGE_BYTES, 4, True, False)
@property_settings
def test_every_byte_is_right_from_wait_to_release(
    resident: list[bool], slots: int, threads: int, chunk_bytes: int, passes: int, overlap: bool, poison: bool
) -> None:
    source = GuardedSource()
    with streaming(
        source,
        resident,
        slots=slots,
        threads=threads,
        chunk_bytes=chunk_bytes,
        overlap=overlap,
        poison=poison,
    ) as stream:
        for _ in range(passes):
            for block in range(len(resident)):
                use(stream, source, block)
        stream.check_integrity()
    assert source.violations == []
    streamed = streamed_of(resident)
    stays = [block for block, flag in enumerate(resident) if flag]
    reads_of_residents = [read for block, read in read_order(resident, chunk_bytes, 1) if block in stays]
    for read in reads_of_residents:
        assert source.reads.count(read) == 1, "a resident block is read exactly once"
    read_bytes = sum(length for _, _, length in source.reads)
    assert stream.counters.bytes_read == read_bytes
    needed_bytes = footprint(stays) + passes * footprint(streamed)
    ahead_bytes = read_bytes - needed_bytes
    assert ahead_bytes >= 0
    if not overlap:
        assert ahead_bytes == 0, "the sequential stream reads what is asked for and nothing else"
    else:
        assert ahead_bytes <= slots * max((footprint([block]) for block in streamed), default=0)
    if threads == 1:
        expected = [read for _, read in read_order(resident, chunk_bytes, passes + slots + 1)]
        assert source.reads == expected[: len(source.reads)], "reads go round and round in the order of the blocks"


@given(
    resident=residencies,
    slots=st.integers(2, 4),
    threads=st.integers(1, 3),
    passes=st.integers(1, 3),
    held=st.integers(1, 3),
)
@property_settings
def test_several_blocks_can_be_held_at_once(
    resident: list[bool], slots: int, threads: int, passes: int, held: int
) -> None:
    held = min(held, slots - 1, len(resident) - 1)
    source = GuardedSource()
    with streaming(source, resident, slots=slots, threads=threads) as stream:
        lent: list[tuple[int, Piece, int]] = []
        for step in range(passes * len(resident)):
            block = step % len(resident)
            piece = stream.wait(block)
            lent.append((block, piece, source.lend(piece)))
            stream.check_integrity()
            for other, memory, _ in lent:
                assert_content(memory, other, "while others are handed out")
            if len(lent) > held:
                other, _, token = lent.pop(0)
                source.give_back(token)
                stream.release(other)
                stream.check_integrity()
    assert source.violations == []


@given(
    resident=residencies,
    slots=st.integers(1, 3),
    threads=st.integers(1, 3),
    overlap=st.booleans(),
    starts=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 18)), min_size=1, max_size=5),
    delay_s=st.sampled_from([0.0, 0.0005]),
)
@example([False, True, False, True], 2, 2, True, [(0, 2), (0, 3), (3, 1), (1, 5)], 0.0005)
@property_settings
def test_a_pass_that_is_broken_off_can_start_again_anywhere(
    resident: list[bool],
    slots: int,
    threads: int,
    overlap: bool,
    starts: list[tuple[int, int]],
    delay_s: float,
) -> None:
    source = GuardedSource(delay_s=delay_s)
    count = len(resident)
    with streaming(source, resident, slots=slots, threads=threads, overlap=overlap) as stream:
        for first, steps in starts:
            for step in range(steps):
                use(stream, source, (first + step) % count)
    assert source.violations == []


def test_the_first_block_asked_for_may_be_any() -> None:
    source = GuardedSource()
    with streaming(source, [False, True, False, False]) as stream:
        for block in (2, 3, 0, 1, 2):
            use(stream, source, block)
        passes = {event.pass_index for event in stream.timeline().events if event.lane is Lane.COMPUTE}
    assert source.violations == []
    assert passes == {0, 1}


def test_starting_over_waits_for_reads_that_are_under_way() -> None:
    """Otherwise a late read would write into a slot that already holds another block."""
    gate = threading.Event()
    late = threading.Event()

    def hold_the_first(number: int) -> None:
        if number == 0:
            gate.wait(PATIENCE_S)
            late.set()

    source = GuardedSource(on_read=hold_the_first)
    with streaming(source, [False] * 4, slots=1, threads=2) as stream:
        eventually(lambda: len(source.reads) == 1)
        threading.Timer(0.05, gate.set).start()
        piece = stream.wait(2)
        token = source.lend(piece)
        assert late.wait(PATIENCE_S)
        settle()
        assert_content(piece, 2, "after the late read")
        source.give_back(token)
        stream.release(2)
    assert source.violations == []


def test_a_resident_block_that_was_broken_off_midway_is_read_again() -> None:
    resident = [False, False, True, False]
    order = read_order(resident, PAGE_BYTES, 1)
    midway = [block for block, _ in order].index(2) + 1  # the second of the resident block's three pages
    gate = threading.Event()

    def hold(number: int) -> None:
        if number == midway:
            gate.wait(PATIENCE_S)

    source = GuardedSource(on_read=hold)
    with streaming(source, resident, slots=2) as stream:
        eventually(lambda: len(source.reads) == midway + 1)
        threading.Timer(0.02, gate.set).start()
        for block in (1, 2, 3, 0, 1, 2):
            use(stream, source, block)
    pages = [read for block, read in order if block == 2]
    assert [source.reads.count(page) for page in pages] == [2, 2, 1]
    assert source.violations == []


# -- reading ahead, and not -------------------------------------------------------------------------------------------


def test_prefetch_goes_on_over_the_end_of_a_pass() -> None:
    resident = [False, False, False]
    order = [read for _, read in read_order(resident, PAGE_BYTES, 2)]
    pass_reads = len(order) // 2
    source = GuardedSource()
    with streaming(source, resident, slots=2) as stream:
        use(stream, source, 0)
        use(stream, source, 1)
        stream.wait(2)
        # The consumer computes the last block and has not asked for anything of the next pass.
        eventually(lambda: len(source.reads) > pass_reads)
        assert source.reads[pass_reads] == order[0] == source.reads[0]
        stream.release(2)
        eventually(lambda: len(source.reads) == len(order) - len(layout_of(2).extents) * 3)
        use(stream, source, 0)


@pytest.mark.alone
def test_a_block_is_handed_out_as_soon_as_it_is_there_whatever_else_is_being_read() -> None:
    gate = threading.Event()

    def hold(number: int) -> None:
        if number:
            gate.wait(2.0)
        else:
            eventually(lambda: len(source.reads) > 1)
            settle()

    source = GuardedSource(on_read=hold)
    with streaming(source, [False, False], threads=2) as stream:
        started = time.monotonic()
        use(stream, source, 0)
        assert time.monotonic() - started < 1.5, "block 0 had to wait for block 1"
        gate.set()


def test_readers_stop_when_every_slot_is_full() -> None:
    resident = [False] * 5
    source = GuardedSource()
    with streaming(source, resident, slots=3, threads=3) as stream:
        eventually(lambda: stream.counters.bytes_read == footprint([0, 1, 2]))
        settle()
        assert stream.counters.bytes_read == footprint([0, 1, 2])
        stream.check_integrity()


def test_residents_do_not_wait_for_slots() -> None:
    resident = [False, True, True, False]
    source = GuardedSource()
    with streaming(source, resident, slots=1) as stream:
        eventually(lambda: stream.counters.bytes_read == footprint([0, 1, 2]))
        assert stream.peek(0) is None, "only resident blocks can be peeked at"
        piece = stream.peek(2)
        assert piece is not None
        assert_content(piece, 2, "when peeked at")


def test_peek_never_waits() -> None:
    gate = threading.Event()
    source = FakeSource(on_read=held_by(gate))
    with streaming(source, [True]) as stream:
        assert stream.peek(0) is None
        gate.set()
        eventually(lambda: stream.peek(0) is not None)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("slots", [1, 3])
def test_the_sequential_stream_never_reads_ahead(threads: int, slots: int) -> None:
    resident = [False, True, False, False, True]
    source = GuardedSource()
    asked_bytes = 0
    with streaming(source, resident, slots=slots, threads=threads, overlap=False) as stream:
        settle()
        assert source.reads == []
        for pass_index in range(3):
            for block, stays in enumerate(resident):
                use(stream, source, block)
                asked_bytes += 0 if stays and pass_index else footprint([block])
                time.sleep(0.005)
                assert sum(length for _, _, length in source.reads) == asked_bytes
    assert source.violations == []


# -- misuse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [[False, False], [True, False]])
def test_asking_twice_is_refused(resident: list[bool]) -> None:
    source = GuardedSource()
    with streaming(source, resident) as stream:
        stream.wait(0)
        with pytest.raises(StreamError, match="layer 0 was asked for twice"):
            stream.wait(0)
        stream.check_integrity()
        stream.release(0)
        use(stream, source, 1)
        use(stream, source, 0)


@pytest.mark.parametrize("overlap", [True, False])
def test_asking_with_all_slots_lent_is_refused_instead_of_waiting_for_ever(overlap: bool) -> None:
    source = GuardedSource()
    with streaming(source, [False] * 4, slots=2, overlap=overlap) as stream:
        for block in (0, 1):
            assert_content(stream.wait(block), block, "when it was handed out")
        with pytest.raises(StreamError, match="layer 2 cannot be loaded"):
            stream.wait(2)
        stream.check_integrity()
        stream.release(0)
        use(stream, source, 2)
        stream.release(1)
        for block in (3, 0, 1, 2, 3):
            use(stream, source, block)


def test_settings_that_cannot_work_are_refused() -> None:
    def build(layouts: list[Layout], resident: list[bool], *, slots: int = 1, slot_bytes: int = 1 << 20) -> Stream:
        return Stream(
            layouts=layouts,
            places=[Placement.DEVICE if stays else Placement.DISK for stays in resident],
            source=FakeSource(),
            device=CpuDevice(),
            settings=StreamSettings(slots=slots, slot_bytes=slot_bytes),
        )

    with pytest.raises(ValueError, match="1 layouts for 2 blocks"):
        build([layout_of(0)], [True, False])
    with pytest.raises(ValueError, match="at least one slot"):
        build([layout_of(0)], [False], slots=0)
    with pytest.raises(ValueError, match="cannot hold a block"):
        build([layout_of(2)], [False], slot_bytes=PAGE_BYTES)
    with pytest.raises(ValueError, match="without bytes"):
        build([lay_out([ByteRange("empty", 0, 0, 0)])], [False])


def test_memory_is_what_was_promised() -> None:
    with streaming(FakeSource(), [True, False, True, False], slots=3) as stream:
        slot_bytes = max(layout_of(block).footprint_bytes for block in range(4))
        assert stream.held_bytes == footprint([0, 2]) + 3 * slot_bytes
    with streaming(FakeSource(), [True, True], slots=3) as stream:
        assert stream.held_bytes == footprint([0, 1])
        stream.check_integrity()


def test_check_integrity_notices_a_lost_slot() -> None:
    gate = threading.Event()
    source = FakeSource(on_read=held_by(gate))
    with streaming(source, [False, False, False], slots=2, overlap=False) as stream:
        stream.check_integrity()
        stream._memory.free_slots.pop()
        with pytest.raises(AssertionError, match="1 slots accounted for, 2 exist"):
            stream.check_integrity()
        gate.set()


def test_chunks_that_are_no_pages_are_rounded_to_them() -> None:
    source = GuardedSource()
    with streaming(source, [False, False, False], chunk_bytes=2 * PAGE_BYTES - 1) as stream:
        for block in range(3):
            use(stream, source, block)
    assert {offset % PAGE_BYTES for _, offset, _ in source.reads} == {0}
    assert {length for _, _, length in source.reads} == {PAGE_BYTES}


# -- poison ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
def test_released_memory_is_poisoned_until_it_is_refilled(overlap: bool) -> None:
    gate = threading.Event()
    first = len(read_order([False] * 3, PAGE_BYTES, 1)) - len(content_of(2)) // PAGE_BYTES  # reads of blocks 0 and 1

    def hold(number: int) -> None:
        if number >= first:
            gate.wait(PATIENCE_S)

    source = GuardedSource(on_read=hold)
    with streaming(source, [False] * 3, slots=2, overlap=overlap, poison=True) as stream:
        pieces = []
        for block in (0, 1):
            pieces.append(stream.wait(block))
            assert_content(pieces[block], block, "when it was handed out")
            stream.release(block)
            assert set(bytes(pieces[block].buffer)) == {POISON}
        settle()
        for piece in pieces:
            assert set(bytes(piece.buffer)) == {POISON}
        gate.set()
        use(stream, source, 2)
        use(stream, source, 0)


def test_resident_blocks_are_never_poisoned() -> None:
    source = GuardedSource()
    with streaming(source, [True, False], poison=True) as stream:
        piece = stream.wait(0)
        stream.release(0)
        assert_content(piece, 0, "after release")
        use(stream, source, 1)
        assert_content(piece, 0, "later")


# -- errors ----------------------------------------------------------------------------------------------------------

FAILING_RESIDENT = [False, True, False, False, True]
FAILING_ORDER = read_order(FAILING_RESIDENT, PAGE_BYTES, 2)


def run_until_error(stream: Stream, count: int) -> StreamError:
    try:
        for step in range(10 * count):
            piece = stream.wait(step % count)
            assert_content(piece, step % count, "before the failure")
            stream.release(step % count)
    except StreamError as error:
        return error
    raise AssertionError("the failure was not told")


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "sequential"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("position", range(len(FAILING_ORDER)))
def test_a_failing_read_reaches_the_consumer_whichever_it_is(position: int, threads: int, overlap: bool) -> None:
    source = FakeSource(fail_at_read=position)
    count = len(FAILING_RESIDENT)
    with streaming(source, FAILING_RESIDENT, threads=threads, overlap=overlap) as stream:
        started = time.monotonic()
        error = run_until_error(stream, count)
        assert time.monotonic() - started < PATIENCE_S
        file_index, offset, _ = source.reads[position]
        assert f"fake file {file_index} at byte {offset}" in str(error)
        block = next(block for block, (file, at, _) in FAILING_ORDER if (file, at) == (file_index, offset))
        assert f"while reading layer {block} from" in str(error)
        assert isinstance(error.__cause__, OSError)
        eventually(lambda: reader_threads() == [])  # even before close
        with pytest.raises(StreamError, match="while reading layer"):
            stream.wait(0)


def test_the_consumer_hears_of_an_error_while_it_waits() -> None:
    gate = threading.Event()

    def fail(number: int) -> None:
        gate.wait(PATIENCE_S)
        raise OSError(5, "Input/output error")

    with streaming(FakeSource(on_read=fail), [False, False]) as stream:
        threading.Timer(0.05, gate.set).start()
        with pytest.raises(StreamError, match="layer 0 from fake file 0"):
            stream.wait(0)


def test_the_first_of_several_errors_counts() -> None:
    both = threading.Barrier(2)
    second_may_fail = threading.Event()

    def fail(number: int) -> None:
        both.wait(PATIENCE_S)
        if number == 1:
            second_may_fail.wait(PATIENCE_S)
        raise OSError(5, f"failure {number}")

    with streaming(FakeSource(on_read=fail), [False, False], threads=2) as stream:
        with pytest.raises(StreamError, match="failure 0"):
            stream.wait(0)
        second_may_fail.set()
        eventually(lambda: reader_threads() == [])
        with pytest.raises(StreamError, match="failure 0"):
            stream.wait(1)


def test_an_error_of_ours_keeps_its_kind() -> None:
    def fail(number: int) -> None:
        raise CheckpointChangedError("the file changed")

    with (
        streaming(FakeSource(on_read=fail), [False, False]) as stream,
        pytest.raises(CheckpointChangedError, match="layer 0 from fake file 0 at byte 0: the file changed"),
    ):
        stream.wait(0)


def test_any_exception_of_a_reader_is_told() -> None:
    def fail(number: int) -> None:
        raise MemoryError("no more")

    with streaming(FakeSource(on_read=fail), [True]) as stream, pytest.raises(StreamError, match="no more"):
        stream.wait(0)


# -- closing ---------------------------------------------------------------------------------------------------------


def test_closing_while_a_read_is_blocked() -> None:
    gate = threading.Event()
    source = FakeSource(on_read=held_by(gate))
    outcomes: list[str] = []

    def consume(stream: Stream) -> None:
        try:
            stream.wait(0)
        except StreamError as error:
            outcomes.append(str(error))

    with streaming(source, [False, False, False], threads=2) as stream:
        consumer = threading.Thread(target=consume, args=(stream,))
        consumer.start()
        eventually(lambda: len(source.reads) == 2)
        closer = threading.Thread(target=stream.close)
        closer.start()
        consumer.join(PATIENCE_S)
        assert not consumer.is_alive(), "the consumer is told at once, although the read still hangs"
        assert outcomes == ["the stream is closed"]
        assert closer.is_alive()
        assert not source.closed, "files stay open while a reader may use them"
        gate.set()
        closer.join(PATIENCE_S)
        assert not closer.is_alive()
        assert reader_threads() == []


@given(resident=residencies, slots=st.integers(1, 3), threads=st.integers(1, 3), steps=st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_closing_at_any_moment_ends_all_threads(resident: list[bool], slots: int, threads: int, steps: int) -> None:
    source = GuardedSource()
    with streaming(source, resident, slots=slots, threads=threads) as stream:
        for step in range(steps):
            use(stream, source, step % len(resident))
    stream.close()  # a second time: nothing happens
    with pytest.raises(StreamError, match="closed"):
        stream.wait(0)


def test_closing_does_not_wait_for_a_slow_link() -> None:
    source = GuardedSource()
    with streaming(source, [False, False], threads=2, limit=1.0) as stream:
        eventually(lambda: len(source.reads) == 2)
        started = time.monotonic()
        stream.close()
        assert time.monotonic() - started < PATIENCE_S / 2


# -- a device that lags behind ---------------------------------------------------------------------------------------


def test_a_slot_is_not_refilled_before_the_device_is_done_with_it() -> None:
    device, source = FakeDevice(), GuardedSource()
    blocks = [False] * 5
    with streaming(source, blocks, slots=2, device=device, threads=2) as stream:
        pieces = []
        for block in (0, 1):
            pieces.append(stream.wait(block))
            stream.release(block)
        assert len(device.events) == 2
        settle()
        assert sum(length for _, _, length in source.reads) == footprint([0, 1]), "both slots are still being read"
        for block in (0, 1):
            assert_content(pieces[block], block, "while the device computes with it")
        device.events[0].complete()
        eventually(lambda: stream.counters.bytes_read == footprint([0, 1, 2]))
        settle()
        assert sum(length for _, _, length in source.reads) == footprint([0, 1, 2]), "the second slot is still busy"
        assert_content(pieces[1], 1, "while the device computes with it")
        assert_content(stream.wait(2), 2, "when it was handed out")
        device.events[1].complete()
        eventually(lambda: stream.counters.bytes_read == footprint([0, 1, 2, 3]))
        stream.release(2)
        for event in device.events:
            event.complete()


def test_poison_too_waits_for_the_device() -> None:
    device, source = FakeDevice(), GuardedSource()
    with streaming(source, [False, False], slots=1, device=device, overlap=False, poison=True) as stream:
        piece = stream.wait(0)
        releaser = threading.Thread(target=stream.release, args=(0,))
        releaser.start()
        eventually(lambda: len(device.events) == 1)
        settle()
        assert_content(piece, 0, "while the device computes with it")
        device.events[0].complete()
        releaser.join(PATIENCE_S)
        assert set(bytes(piece.buffer)) == {POISON}


@given(
    count=st.integers(1, 6),
    slots=st.integers(1, 4),
    threads=st.integers(1, 3),
    lag_s=st.sampled_from([0.0, 0.0005, 0.002]),
    starts=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 8)), min_size=1, max_size=3),
    overlap=st.booleans(),
)
@example(3, 1, 2, 0.002, [(0, 7), (1, 4)], True)
@example(5, 3, 2, 0.002, [(0, 9), (0, 4)], True)
@settings(max_examples=40, deadline=None)
def test_memory_is_left_alone_until_its_event_has_passed(
    count: int, slots: int, threads: int, lag_s: float, starts: list[tuple[int, int]], overlap: bool
) -> None:
    """The device lags, so that slots wait for it in every state: free, about to be refilled, dropped by a new start."""
    device, source = FakeDevice(), GuardedSource()
    enqueued: SimpleQueue[tuple[int, FakeEvent] | None] = SimpleQueue()

    def compute() -> None:
        while (work := enqueued.get()) is not None:
            time.sleep(lag_s)
            token, event = work
            source.give_back(token)
            event.complete()

    worker = threading.Thread(target=compute)
    worker.start()
    try:
        with streaming(source, [False] * count, slots=slots, device=device, threads=threads, overlap=overlap) as stream:
            for first, steps in starts:
                for step in range(steps):
                    block = (first + step) % count
                    piece = stream.wait(block)
                    assert_content(piece, block, "when it was handed out")
                    token = source.lend(piece)
                    stream.release(block)
                    enqueued.put((token, device.events[-1]))
    finally:
        enqueued.put(None)
        worker.join(PATIENCE_S)
    assert source.violations == []


# -- pace, books -----------------------------------------------------------------------------------------------------


def test_the_read_limit_is_kept_by_all_threads_together() -> None:
    rate = 1e6
    source = GuardedSource()
    started = time.perf_counter()
    with streaming(source, [False] * 6, slots=3, threads=3, limit=rate) as stream:
        for _ in range(3):
            for block in range(6):
                use(stream, source, block)
        seconds = time.perf_counter() - started
    assert seconds >= (3 * footprint(range(6)) - PAGE_BYTES) / rate


@pytest.mark.alone
def test_the_link_is_not_reserved_while_a_slot_waits_for_the_device() -> None:
    device, source = FakeDevice(), FakeSource()
    size_bytes = footprint([0])
    rate = size_bytes / 0.2
    with streaming(source, [False], slots=1, device=device, limit=rate, chunk_bytes=1 << 20) as stream:
        stream.wait(0)
        stream.release(0)
        time.sleep(0.25)
        device.events[0].complete()
        started = time.perf_counter()
        stream.wait(0)
        assert time.perf_counter() - started > 0.15, "the bytes took no time: the link had been reserved for the wait"
        stream.release(0)
        device.events[1].complete()


def test_the_timeline_tells_what_happened() -> None:
    resident = [False, True, False, False]
    source = GuardedSource(delay_s=0.001)
    with streaming(source, resident, slots=2) as stream:
        for _ in range(3):
            for block in range(4):
                use(stream, source, block)
        timeline, counters = stream.timeline(), stream.counters
    assert timeline.block_names == ("layer 0", "layer 1", "layer 2", "layer 3")
    computes = [(event.pass_index, event.block_index) for event in timeline.events if event.lane is Lane.COMPUTE]
    assert computes == [(pass_index, block) for pass_index in range(3) for block in range(4)]
    reads = {(e.pass_index, e.block_index): e for e in timeline.events if e.lane is Lane.READ}
    for event in timeline.events:
        assert 0 <= event.start_s <= event.end_s
        if event.lane is Lane.COMPUTE and not resident[event.block_index]:
            read = reads[event.pass_index, event.block_index]
            assert read.end_s <= event.start_s, "a block is used only once it has arrived"
    assert [key for key in reads if key[1] == 1] == [(0, 1)]
    assert counters.stall_s == pytest.approx(timeline.busy_s(Lane.STALL))
    assert counters.stall_s > 0
    assert counters.read_busy_s >= 0.001 * len(source.reads) * 0.9
    with streaming(FakeSource(), [True], slots=0) as unnamed:
        unnamed.wait(0)
        unnamed.release(0)
