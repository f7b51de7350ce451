"""The stream on an accelerator: right bytes whatever the device's queues do, and every ordering line is needed.

The device is made of host memory (`FakeAccelerator`); computations are enqueued like kernels and look at the memory
only when the drive lets them, which is as late or as early as hurts.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.errors import BudgetError, StreamError
from headrace.model.layout import (
    DEVICE_ALIGNMENT_BYTES,
    PAGE_BYTES,
    AlignedLayout,
    ByteRange,
    Layout,
    align_layout,
    align_up,
    lay_out,
)
from headrace.planning.plan import TRAVELLING, Placement
from headrace.planning.timeline import Lane
from headrace.streaming import transfer
from headrace.streaming.arena import Piece
from headrace.streaming.device import COMPLETE, DISK_LANE, Copied, CopyPart, DeviceEvent
from headrace.streaming.fakes.accelerator import Drive, FakeAccelerator, QueueEvent
from headrace.streaming.fakes.source import FakeSource, expected_byte
from headrace.streaming.fetch import Chunk, Fetch
from headrace.streaming.ring import Ring, RingChunk
from headrace.streaming.stream import POISON, Stream, StreamSettings
from headrace.streaming.transfer import StagedTransfer

pytestmark = pytest.mark.timeout(120)

DEVICE, HOST, DISK, PROCESSOR = Placement.DEVICE, Placement.HOST, Placement.DISK, Placement.CPU
DRIVES = [Drive.LAZY, Drive.EAGER, Drive.COPIES_FIRST, Drive.COMPUTING_FIRST, Drive.RANDOM]
PATIENCE_S = 10.0


# -- made-up blocks --------------------------------------------------------------------------------------------------


@lru_cache
def ranges_of(block_index: int) -> tuple[ByteRange, ...]:
    """A matrix at an odd place, a norm right behind it, and in every third block something far off in another file."""
    start = block_index * 0x20000 + 8
    pages = 1 + block_index % 3
    ranges = [
        ByteRange("matrix", 0, start, pages * PAGE_BYTES - 512),
        ByteRange("norm", 0, start + pages * PAGE_BYTES - 512, 72),
        ByteRange("bias", 0, start + pages * PAGE_BYTES - 512 + 72, 120),
    ]
    if block_index % 3 == 1:
        ranges.append(ByteRange("far", 1, block_index * 0x50000 + 4000, 300))
    return tuple(ranges)


@lru_cache
def layout_of(block_index: int) -> Layout:
    return lay_out(ranges_of(block_index))


@lru_cache
def aligned_of(block_index: int) -> AlignedLayout:
    return align_layout(layout_of(block_index), {item.key: item.size_bytes for item in ranges_of(block_index)})


@lru_cache
def expected_of(block_index: int) -> tuple[tuple[int, bytes], ...]:
    """(position in the aligned block, bytes) of every tensor."""
    return tuple(
        (
            aligned_of(block_index).positions[item.key],
            bytes(expected_byte(item.file_index, item.offset + step) for step in range(item.size_bytes)),
        )
        for item in ranges_of(block_index)
    )


def device_bytes(blocks: Sequence[int]) -> int:
    return sum(aligned_of(block).size_bytes for block in blocks)


def is_right(piece: Piece, block_index: int) -> bool:
    return all(
        piece.tensor[position : position + len(content)].numpy().tobytes() == content
        for position, content in expected_of(block_index)
    )


@dataclass
class Watch:
    """Enqueues computations that look at a block's bytes, and remembers which found something else."""

    device: FakeAccelerator
    looked: int = 0
    wrong: list[int] = field(default_factory=list)

    def look(self, piece: Piece, block_index: int) -> Callable[[], None]:
        def look() -> None:
            self.looked += 1
            if not is_right(piece, block_index):
                self.wrong.append(block_index)

        return look


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("headrace-reader")]


def eventually(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.0005)


@contextmanager
def streaming(
    device: FakeAccelerator,
    places: Sequence[Placement],
    *,
    source: FakeSource | None = None,
    slots: int = 2,
    overlap: bool = True,
    threads: int = 1,
    chunk_bytes: int = PAGE_BYTES,
    ring_chunks: int = 2,
    poison: bool = False,
) -> Iterator[Stream]:
    count = range(len(places))
    slot_bytes = max((aligned_of(block).size_bytes for block in count if places[block] in TRAVELLING), default=0)
    stream = Stream(
        layouts=[layout_of(block) for block in count],
        aligned=[aligned_of(block) for block in count],
        places=places,
        source=source if source is not None else FakeSource(),
        device=device,
        settings=StreamSettings(
            slots=slots,
            slot_bytes=slot_bytes,
            overlap=overlap,
            reader_threads=threads,
            chunk_bytes=chunk_bytes,
            ring_chunks=ring_chunks,
            poison=poison,
            block_names=tuple(f"layer {block}" for block in count),
        ),
    )
    try:
        yield stream
    finally:
        stream.close()
    assert reader_threads() == []


def use(stream: Stream, watch: Watch, block_index: int) -> None:
    """Compute with a block: on the device when its queue gets there, on the host at once."""
    piece = stream.wait(block_index)
    look = watch.look(piece, block_index)
    if stream._where[block_index] is PROCESSOR:
        look()
    else:
        watch.device.compute(look)
    stream.check_integrity()
    stream.release(block_index)
    stream.check_integrity()


def go_on(stream: Stream, watch: Watch, count: int) -> None:
    """Pass after pass, until something is wrong."""
    for step in range(100):
        use(stream, watch, step % count)


def lagging(drive: Drive, seed: int = 0, **options: Any) -> FakeAccelerator:
    """A device whose computations lag behind their calls."""
    return FakeAccelerator(drive=drive, seed=seed, computes_at_once=False, **options)


# -- right bytes, whatever the device does ---------------------------------------------------------------------------


def play(
    device: FakeAccelerator,
    places: Sequence[Placement],
    starts: Sequence[tuple[int, int]],
    *,
    settle: bool = True,
    **options: Any,
) -> list[str]:
    """Run passes and broken passes; return everything that went wrong."""
    watch = Watch(device)
    steps = 0
    with streaming(device, places, **options) as stream:
        for first, count in starts:
            for step in range(count):
                use(stream, watch, (first + step) % len(places))
                steps += 1
        if settle:
            device.synchronize()
    problems = [f"block {block} was wrong" for block in watch.wrong] + device.violations
    if settle and watch.looked != steps:
        problems.append("a computation never ran")
    return problems


@given(
    places=st.lists(st.sampled_from([DEVICE, HOST, DISK, PROCESSOR]), min_size=1, max_size=8),
    slots=st.integers(1, 4),
    threads=st.integers(1, 3),
    chunk_bytes=st.sampled_from([PAGE_BYTES, 2 * PAGE_BYTES, 1 << 18]),
    ring_chunks=st.integers(1, 4),
    passes=st.integers(1, 4),
    drive=st.sampled_from(DRIVES),
    seed=st.integers(0, 1000),
    overlap=st.booleans(),
    poison=st.booleans(),
    pinned=st.booleans(),
)
@example([DISK] * 5, 2, 2, PAGE_BYTES, 1, 3, Drive.COPIES_FIRST, 0, True, False, True)
@example([HOST] * 5, 2, 1, PAGE_BYTES, 2, 4, Drive.COPIES_FIRST, 0, True, False, True)
@example([HOST, DISK, HOST, DISK, DEVICE], 3, 2, PAGE_BYTES, 2, 4, Drive.RANDOM, 5, True, True, True)
@example([HOST, HOST, DISK], 2, 2, PAGE_BYTES, 2, 4, Drive.COPIES_FIRST, 5, True, False, False)
@settings(max_examples=250, deadline=None)
def test_every_computation_sees_the_right_bytes(
    places: list[Placement],
    slots: int,
    threads: int,
    chunk_bytes: int,
    ring_chunks: int,
    passes: int,
    drive: Drive,
    seed: int,
    overlap: bool,
    poison: bool,
    pinned: bool,
) -> None:
    ring_bytes = ring_chunks * chunk_bytes
    store_bytes = sum(align_up(aligned_of(block).size_bytes) for block, place in enumerate(places) if place is HOST)
    device = lagging(drive, seed, pinnable_bytes=ring_bytes + max(0, store_bytes - (not pinned)))
    problems = play(
        device,
        places,
        [(0, passes * len(places))],
        slots=slots,
        threads=threads,
        chunk_bytes=chunk_bytes,
        ring_chunks=ring_chunks,
        overlap=overlap,
        poison=poison,
    )
    assert problems == []


@given(
    places=st.lists(st.sampled_from([DEVICE, HOST, DISK, PROCESSOR]), min_size=1, max_size=7),
    starts=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 12)), min_size=1, max_size=5),
    slots=st.integers(1, 3),
    threads=st.integers(1, 3),
    drive=st.sampled_from(DRIVES),
    seed=st.integers(0, 1000),
    overlap=st.booleans(),
    pinned=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_a_pass_that_is_broken_off_can_start_again_anywhere(
    places: list[Placement],
    starts: list[tuple[int, int]],
    slots: int,
    threads: int,
    drive: Drive,
    seed: int,
    overlap: bool,
    pinned: bool,
) -> None:
    device = lagging(drive, seed, pinnable_bytes=1 << 40 if pinned else 2 * PAGE_BYTES)
    starts = [(first % len(places), count) for first, count in starts]
    assert play(device, places, starts, slots=slots, threads=threads, overlap=overlap) == []


# -- every ordering line is needed: take one out, and it shows -------------------------------------------------------


class CopiesDoNotWait(FakeAccelerator):
    """A slot is refilled before the computation that reads it is done."""

    def copy(self, parts: Sequence[CopyPart], *, after: Sequence[DeviceEvent] = (), lane: int = 0) -> Copied:
        return super().copy(parts, lane=lane)


class ComputingDoesNotWait(FakeAccelerator):
    """A computation begins before its block was copied."""

    def compute_after(self, event: DeviceEvent) -> None:
        return


class EventOfTheWrongQueue(FakeAccelerator):
    """What stands for the computation is recorded where copies go."""

    def computed(self) -> QueueEvent:
        with self._moved:
            event = QueueEvent(self, "copies 0")
            self._add("copies 0", event)
            self._drift()
            return event


class CopyEventOfTheWrongQueue(FakeAccelerator):
    """What stands for a copy is recorded where computations go."""

    def copy(self, parts: Sequence[CopyPart], *, after: Sequence[DeviceEvent] = (), lane: int = 0) -> Copied:
        copied = super().copy(parts, after=after, lane=lane)
        return Copied(copied.begin, self.computed())


class PoisonDoesNotWait(FakeAccelerator):
    """A slot is overwritten at release, while the computation may still read it."""

    def fill(self, target: Any, value: int, *, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        return super().fill(target, value)


def give_back_at_once(self: Ring, chunk: RingChunk, emptied: DeviceEvent) -> None:
    """A chunk of the ring is read into before the copy from it is done."""
    original_give_back(self, chunk, COMPLETE)


original_give_back = Ring.give_back


def send_before_reading(self: StagedTransfer, fetch: Fetch, chunk: Chunk) -> int:
    """A copy begins before the read that fills its chunk."""
    if chunk.file_index is None or fetch.store is not None:
        return original_read(self, fetch, chunk)
    place = self._ring.take()
    parts = [
        CopyPart(
            place.piece.tensor[move.start - chunk.start : move.start - chunk.start + move.length],
            fetch.piece.tensor[move.target : move.target + move.length],
        )
        for move in self._aligned[fetch.block_index].moves_within(chunk.start, chunk.length)
    ]
    emptied = self._send(fetch, parts, DISK_LANE).end if parts else COMPLETE
    size_bytes = transfer.read_chunk(self._source, None, chunk, place.piece.buffer[: chunk.length])
    self._ring.give_back(place, emptied)
    return size_bytes


original_read = StagedTransfer.read


def note_the_first_copy(self: StagedTransfer, fetch: Fetch, parts: Sequence[CopyPart], lane: int) -> Copied:
    """Computing waits for a block's first copy instead of its last."""
    first = fetch.copied
    copied = original_send(self, fetch, parts, lane)
    if first is not None:
        fetch.copied = first
    return copied


original_send = StagedTransfer._send


def start_over_forgetting_copies(self: Stream, block_index: int) -> None:
    """Copies into dropped slots are forgotten, and others into the same slots may overtake them."""
    for fetch in self._coming:
        fetch.copied = None
    original_start_over(self, block_index)


original_start_over = Stream._start_over


def send_without_the_slot(self: StagedTransfer, fetch: Fetch) -> None:
    """Blocks from host memory do not wait for their slot."""
    slot, fetch.slot = fetch.slot, None
    original_send_store(self, fetch)
    fetch.slot = slot


original_send_store = StagedTransfer.send

MIXED = [HOST, DISK, HOST, DISK, DEVICE, HOST, DISK]
BROKEN = [(0, 2), (4, 2), (1, 1), (5, 9), (0, 3), (3, 5), (0, 14)]
"""passes that are broken off while copies of all kinds are on their way"""


def scenarios(make: Callable[..., FakeAccelerator]) -> Iterator[list[str]]:
    """Play a few plans under every drive."""
    for places in ([DISK] * 4, [HOST] * 5, MIXED):
        for drive in DRIVES:
            for seed in range(4 if drive is Drive.RANDOM else 1):
                for starts in ([(0, 3 * len(places))], [(first % len(places), count) for first, count in BROKEN]):
                    for slots in (1, 2, 3):
                        device = make(drive=drive, seed=seed, computes_at_once=False)
                        poison = slots == 2
                        try:
                            yield play(device, places, starts, slots=slots, threads=2, poison=poison)
                        except (StreamError, AssertionError) as error:
                            yield [str(error)]


def test_the_scenarios_go_well_while_nothing_is_taken_out() -> None:
    assert [problems for problems in scenarios(FakeAccelerator) if problems] == []


@pytest.mark.parametrize(
    "broken",
    [CopiesDoNotWait, ComputingDoesNotWait, EventOfTheWrongQueue, CopyEventOfTheWrongQueue, PoisonDoesNotWait],
)
def test_a_device_whose_orders_are_lost_is_caught(broken: type[FakeAccelerator]) -> None:
    assert any(scenarios(broken))


@pytest.mark.parametrize(
    ("owner", "name", "mutant"),
    [
        (Ring, "give_back", give_back_at_once),
        (StagedTransfer, "read", send_before_reading),
        (StagedTransfer, "_send", note_the_first_copy),
        (StagedTransfer, "send", send_without_the_slot),
        (Stream, "_start_over", start_over_forgetting_copies),
        (FakeAccelerator, "synchronize", lambda self: None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_order_that_is_taken_out_is_caught(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, mutant: Callable[..., Any]
) -> None:
    monkeypatch.setattr(owner, name, mutant)
    assert any(scenarios(FakeAccelerator))


# -- the host never waits for the device -----------------------------------------------------------------------------


def loaded(device: FakeAccelerator, stream: Stream, count: int) -> None:
    """Run the first pass, which fills stores and places, with the test moving the queues."""
    for block in range(count):
        waiter = threading.Thread(target=stream.wait, args=(block,))
        waiter.start()
        while waiter.is_alive():
            device.run()
            time.sleep(0.0005)
        stream.release(block)
    device.run()


def test_passes_from_host_memory_are_enqueued_without_the_device_moving() -> None:
    device = lagging(Drive.MANUAL)
    places = [HOST, DEVICE, HOST, HOST, DEVICE, HOST]
    watch = Watch(device)
    with streaming(device, places, slots=2) as stream:
        loaded(device, stream, len(places))
        copies = device.copies
        for _ in range(3):
            for block in range(len(places)):
                use(stream, watch, block)  # returns although nothing on the device moves
        assert watch.looked == 0
        assert device.synchronized == 0
        assert device.copies == copies + 3 * places.count(HOST), "one copy for each block and pass"
        device.run()
        assert watch.looked == 3 * len(places)
        assert watch.wrong == []
        device.run()


def test_prefetch_goes_on_over_the_end_of_a_pass() -> None:
    device = lagging(Drive.MANUAL)
    places = [HOST] * 4
    with streaming(device, places, slots=2) as stream:
        loaded(device, stream, 4)
        copies = device.copies  # blocks 0 and 1 of the second pass are among them
        assert copies - 4 * len(layout_of(0).extents) >= 2
        assert is_right(stream._coming[0].piece, 0)
        assert is_right(stream._coming[1].piece, 1)


def test_copying_begins_before_a_block_is_read_to_its_end() -> None:
    gate = threading.Event()
    before = sum(layout_of(block).footprint_bytes for block in (0, 1)) // PAGE_BYTES

    def hold(number: int) -> None:
        if number == before + 1:
            gate.wait(PATIENCE_S)

    device = lagging(Drive.EAGER)
    with streaming(device, [DEVICE, DEVICE, DISK], source=FakeSource(on_read=hold), threads=1) as stream:
        eventually(lambda: device.copies == before + 1)
        assert not stream._coming[0].arrived
        first = expected_of(2)[0][1][: PAGE_BYTES - 8]
        assert stream._coming[0].piece.tensor[: len(first)].numpy().tobytes() == first
        gate.set()


def test_host_blocks_travel_while_a_block_is_being_read() -> None:
    """The link does not stand idle while the disk is at work on the block before."""
    gate = threading.Event()
    held = threading.Event()
    reads_of_the_first_pass = (
        sum(extent.length for block in range(3) for extent in layout_of(block).extents) // PAGE_BYTES
    )

    def hold(number: int) -> None:
        if number >= reads_of_the_first_pass:
            held.set()
            gate.wait(PATIENCE_S)

    device = lagging(Drive.EAGER)
    watch = Watch(device)
    source = FakeSource(on_read=hold)
    with streaming(device, [DISK, HOST, DEVICE], source=source, slots=2) as stream:
        for block in range(3):
            use(stream, watch, block)
        assert held.wait(PATIENCE_S)  # the disk is at the first block of the second pass
        eventually(lambda: len(stream._coming) == 2)
        assert stream._coming[1].block_index == 1
        assert is_right(stream._coming[1].piece, 1), "it came over the link meanwhile"
        gate.set()
    assert watch.wrong == []


# -- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_what_was_promised_on_the_device_and_on_the_host() -> None:
    device = FakeAccelerator(drive=Drive.EAGER)
    places = [DEVICE, HOST, DISK, PROCESSOR, HOST]
    with streaming(device, places, slots=3, ring_chunks=4, chunk_bytes=2 * PAGE_BYTES) as stream:
        slot_bytes = max(aligned_of(block).size_bytes for block in (1, 2, 4))
        assert stream.held_bytes == device_bytes([0]) + 3 * slot_bytes
        assert device.held_bytes() == stream.held_bytes
        pages = sum(align_up(aligned_of(block).size_bytes) for block in (1, 3, 4))
        assert stream.host_bytes == pages + 4 * 2 * PAGE_BYTES
        for _ in range(2):
            for block in range(5):
                stream.wait(block)
                stream.release(block)
        assert device.peak_bytes() == stream.held_bytes, "nothing is allocated in a pass"
    assert device.held_bytes() == 0
    assert device.violations == []


def test_device_memory_that_is_not_there_is_refused_and_nothing_is_left() -> None:
    device = FakeAccelerator(memory_bytes=10_000)
    with pytest.raises(BudgetError, match="fake:0 has no"), streaming(device, [DEVICE] * 3):
        pass
    assert device.held_bytes() == 0
    assert reader_threads() == []


@pytest.mark.parametrize("pinned", [True, False])
def test_stores_that_cannot_be_page_locked_travel_through_the_ring(pinned: bool) -> None:
    device = lagging(Drive.COPIES_FIRST, pinnable_bytes=1 << 30 if pinned else 2 * PAGE_BYTES)
    with streaming(device, [HOST] * 4, slots=2) as stream:
        watch = Watch(device)
        for _ in range(3):
            for block in range(4):
                use(stream, watch, block)
        device.synchronize()
        assert stream.stores_pinned is pinned
        once = sum(layout_of(block).footprint_bytes for block in range(4))
        assert stream.counters.bytes_read == once, "the disk is read once either way"
    assert watch.wrong == []


def test_the_aligned_form_is_checked() -> None:
    device = FakeAccelerator()
    options: Any = {"source": FakeSource(), "settings": StreamSettings(slots=1, slot_bytes=1 << 20)}
    with pytest.raises(ValueError, match="aligned form of every block"):
        Stream(layouts=[layout_of(0)], places=[DISK], device=device, **options)
    with pytest.raises(ValueError, match="cannot hold a block"):
        Stream(
            layouts=[layout_of(0)],
            places=[HOST],
            device=device,
            aligned=[aligned_of(0)],
            source=FakeSource(),
            settings=StreamSettings(slots=1, slot_bytes=256),
        )


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", range(14))
@pytest.mark.parametrize("places", [[HOST, DISK, DEVICE], [HOST, HOST, HOST], [DISK, DISK]], ids=str)
def test_a_copy_that_fails_reaches_the_consumer_with_the_blocks_name(places: list[Placement], position: int) -> None:
    device = lagging(Drive.EAGER, fail_at_copy=position)
    watch = Watch(device)
    with streaming(device, places, threads=2) as stream:
        with pytest.raises(StreamError, match=r"while (reading )?layer \d") as told:
            go_on(stream, watch, len(places))
        assert "illegal memory access" in str(told.value)
        eventually(lambda: reader_threads() == [])
        with pytest.raises(StreamError, match="illegal memory access"):
            stream.wait(0)
    assert watch.wrong == []


@pytest.mark.parametrize("position", range(8))
def test_a_read_that_fails_reaches_the_consumer(position: int) -> None:
    device = lagging(Drive.EAGER)
    watch = Watch(device)
    source = FakeSource(fail_at_read=position)
    with streaming(device, [HOST, DISK, PROCESSOR], source=source) as stream:
        with pytest.raises(StreamError, match=r"while reading layer \d from fake file \d at byte \d+: "):
            go_on(stream, watch, 3)
        eventually(lambda: reader_threads() == [])


class Dead(FakeAccelerator):
    """Everything fails from some moment on, as after a fault on a real device."""

    dead = False

    def computed(self) -> QueueEvent:
        if self.dead:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return super().computed()

    def synchronize(self) -> None:
        if self.dead:
            raise RuntimeError("CUDA error: unspecified launch failure")
        super().synchronize()


def test_a_device_that_dies_is_told_with_the_block_and_can_be_closed() -> None:
    device = Dead(drive=Drive.EAGER, computes_at_once=False)
    with streaming(device, [HOST, DEVICE]) as stream:
        piece = stream.wait(0)
        assert piece.size_bytes
        device.dead = True
        with pytest.raises(StreamError, match="while layer 0 was computed: CUDA error: unspecified launch failure"):
            stream.release(0)
        with pytest.raises(StreamError, match="layer 0"):
            stream.wait(1)


def test_closing_while_the_device_is_busy_leaves_nothing_behind() -> None:
    device = lagging(Drive.LAZY)
    watch = Watch(device)
    with streaming(device, [HOST, DISK, HOST], slots=2, threads=2) as stream:
        for step in range(4):
            use(stream, watch, step % 3)
    assert device.violations == []
    assert watch.wrong == []
    assert watch.looked == 4, "what was enqueued is waited for before the memory goes"


# -- poison, peek, books ---------------------------------------------------------------------------------------------


def test_released_slots_are_poisoned_on_the_device() -> None:
    device = lagging(Drive.EAGER)
    with streaming(device, [HOST] * 3, slots=2, overlap=False, poison=True) as stream:
        piece = stream.wait(0)
        assert is_right(piece, 0)
        stream.release(0)
        device.run()
        assert set(piece.tensor.tolist()) == {POISON}


def test_peek_gives_blocks_that_stay_and_orders_the_computation_behind_their_copies() -> None:
    device = lagging(Drive.LAZY)
    watch = Watch(device)
    with streaming(device, [DEVICE, HOST]) as stream:
        eventually(lambda: stream.peek(0) is not None)
        piece = stream.peek(0)
        assert piece is not None
        device.compute(watch.look(piece, 0))
        device.synchronize()
        assert watch.wrong == []
        assert stream.peek(1) is None


def test_the_timeline_tells_what_the_device_did() -> None:
    device = lagging(Drive.EAGER)
    watch = Watch(device)
    places = [HOST, DISK, DEVICE, PROCESSOR]
    with streaming(device, places) as stream:
        for _ in range(3):
            for block in range(4):
                use(stream, watch, block)
        device.synchronize()
        timeline, counters = stream.timeline(), stream.counters
    computes = {(event.pass_index, event.block_index): event for event in timeline.events if event.lane is Lane.COMPUTE}
    assert sorted(computes) == [(number, block) for number in range(3) for block in range(4)]
    copies = {(event.pass_index, event.block_index): event for event in timeline.events if event.lane is Lane.COPY}
    assert {key for key in copies if key[1] == 2} == {(0, 2)}, "a block that stays is copied once"
    for key, event in copies.items():
        if key in computes:
            assert event.start_s <= event.end_s <= computes[key].end_s
    assert {(number, block) for number in range(3) for block in (0, 1)} <= set(copies)
    assert counters.bytes_copied == device_bytes([2]) + 3 * device_bytes([0, 1])
    reads = [event.block_index for event in timeline.events if event.lane is Lane.READ]
    assert reads.count(0) == reads.count(2) == reads.count(3) == 1
    assert reads.count(1) >= 3


# -- the aligned form ------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 3000)), min_size=1, max_size=8), st.integers(0, 4095))
def test_aligned_blocks_hold_every_tensor_once_at_an_aligned_place(parts: list[tuple[int, int]], start: int) -> None:
    ranges, end = [], start
    for number, (gap, length) in enumerate(parts):
        ranges.append(ByteRange(str(number), 0, end + gap, length))
        end += gap + length
    layout = lay_out(ranges)
    sizes = {item.key: item.size_bytes for item in ranges}
    form = align_layout(layout, sizes)
    taken = sorted((form.positions[key], form.positions[key] + size) for key, size in sizes.items() if size)
    assert all(first % DEVICE_ALIGNMENT_BYTES == 0 for first, _ in taken)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
    assert form.size_bytes % DEVICE_ALIGNMENT_BYTES == 0
    assert all(last <= form.size_bytes for _, last in taken)
    memory = bytearray(form.size_bytes)
    read = bytes(step % 251 for step in range(layout.footprint_bytes))
    for first in range(0, layout.footprint_bytes, PAGE_BYTES):
        for move in form.moves_within(first, PAGE_BYTES):
            assert first <= move.start
            assert move.start + move.length <= first + PAGE_BYTES
            memory[move.target : move.target + move.length] = read[move.start : move.start + move.length]
    for key, size in sizes.items():
        place, origin = form.positions[key], layout.positions[key]
        assert memory[place : place + size] == read[origin : origin + size]


def test_tensors_that_keep_their_distance_are_moved_as_one() -> None:
    ranges = [ByteRange("a", 0, 8, 4096), ByteRange("b", 0, 8 + 4096, 512), ByteRange("c", 0, 8 + 4608, 100)]
    form = align_layout(lay_out(ranges), {item.key: item.size_bytes for item in ranges})
    assert form.moves == ((8, 0, 4708),)
    assert form.size_bytes == 4864
