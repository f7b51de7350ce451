"""The stream: brings block i into memory, hands it out, takes it back; the next blocks load while this one computes.

Readers go through the blocks in cyclic order, over the end of a pass into the next one, and stop only when every slot
is full. A resident block is read once, in its turn of the first pass, into a place of its own.

The life of a block's bytes is three lines, all in this file: they are requested in `_request`, waited for in `wait`,
and given back in `release`. With `overlap` off, `_request` holds back until the block is waited for: load, compute,
drop.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.errors import HeadraceError, StreamError
from headrace.planning.extents import PAGE_BYTES, Layout, align_down
from headrace.planning.timeline import Event, Lane, Timeline
from headrace.streaming.arena import Arena, Piece
from headrace.streaming.device import COMPLETE, Device, DeviceEvent
from headrace.streaming.source import ByteSource, RateLimit

POISON = 0xFF
"""Bytes of a released slot in debug mode: not-a-number in every floating point format."""

EVENTS_KEPT = 24_000
"""the newest ones, some 3 MB: a long run must not grow beyond its budget by remembering it"""


class _Chunk(NamedTuple):
    """One read call."""

    file_index: int
    offset: int
    start: int
    length: int


@dataclass(eq=False)
class _Slot:
    """A place for one streamed block. Refilled only when `reusable`, recorded at release, has passed."""

    piece: Piece
    reusable: DeviceEvent = COMPLETE


@dataclass(eq=False)
class _Fetch:
    """One block on its way, or arrived and not yet given back."""

    block_index: int
    pass_index: int
    piece: Piece
    slot: _Slot | None
    chunks: deque[_Chunk]
    chunks_left: int
    started_s: float = 0.0
    handed_out_s: float = 0.0

    @property
    def arrived(self) -> bool:
        return self.chunks_left == 0


class StreamCounters(NamedTuple):
    """What has happened so far. Bytes include over-reading; stalls are the consumer's."""

    bytes_read: int
    stall_s: float
    read_busy_s: float


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How to read. `poison` overwrites released slots, so that a use after release shows."""

    slots: int
    slot_bytes: int
    overlap: bool = True
    reader_threads: int = 2
    chunk_bytes: int = 8 << 20
    read_limit_bytes_per_s: float | None = None
    poison: bool = False
    block_names: tuple[str, ...] = field(default=())


class Stream:
    """Moves the blocks of one model; single consumer.

    Holds `resident bytes + slots x slot_bytes` of the device's memory from construction to `close`. An error in a
    reader is raised by the consumer's next (or present) `wait` and names file and block.
    """

    def __init__(
        self,
        *,
        layouts: Sequence[Layout],
        resident: Sequence[bool],
        source: ByteSource,
        device: Device,
        settings: StreamSettings,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if len(layouts) != len(resident):
            raise ValueError(f"{len(layouts)} layouts for {len(resident)} blocks")
        if any(not layout.footprint_bytes for layout in layouts):
            raise ValueError("a block without bytes cannot be streamed")
        if not all(resident) and settings.slots < 1:
            raise ValueError("streamed blocks need at least one slot")
        self._layouts = tuple(layouts)
        self._settings = settings
        self._source = source
        self._device = device
        self._clock = clock
        self._lock = threading.Lock()
        # Apart, since whoever is woken for nothing takes a processor from the computation that then begins.
        self._arrivals = threading.Condition(self._lock)
        """the consumer waits here: for bytes, or for reads in flight to end"""
        self._room = threading.Condition(self._lock)
        """readers wait here: for something to read and a place to put it"""
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        limit = settings.read_limit_bytes_per_s
        self._limit = None if limit is None else RateLimit(limit, clock=clock, sleep=self._closing.wait)

        self._arena = self._allocate(resident)
        self._places: list[Piece | None] = [
            self._arena.take(layout.footprint_bytes) if stays else None
            for layout, stays in zip(self._layouts, resident, strict=True)
        ]
        self._free_slots = deque(
            _Slot(self._arena.take(settings.slot_bytes)) for _ in range(settings.slots if not all(resident) else 0)
        )
        self._settled: dict[int, _Fetch] = {}  # resident blocks: requested or arrived, never dropped
        self._coming: deque[_Fetch] = deque()  # streamed blocks: requested or arrived, in order, not handed out
        self._lent: dict[int, _Fetch] = {}  # handed out, not given back
        self._filling: _Fetch | None = None  # the fetch whose chunks are being given to readers
        self._chunks_in_flight = 0
        self._cursor = 0  # the block whose turn to be requested is next
        self._cursor_pass = 0
        self._wanted: int | None = None  # the block that the consumer is waiting for
        self._consumer_pass = -1
        self._due = 0  # the block that the consumer asks for next if it goes on in order
        self._paused = False

        self._bytes_read = 0
        self._stall_s = 0.0
        self._read_busy_s = 0.0
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._origin_s = clock()
        self._threads = [
            threading.Thread(target=self._work, name=f"headrace-reader-{number}", daemon=True)
            for number in range(settings.reader_threads)
        ]
        for thread in self._threads:
            thread.start()

    def _allocate(self, resident: Sequence[bool]) -> Arena:
        places = sum(layout.footprint_bytes for layout, stays in zip(self._layouts, resident, strict=True) if stays)
        slots = 0 if all(resident) else self._settings.slots * self._settings.slot_bytes
        largest = max(
            (layout.footprint_bytes for layout, stays in zip(self._layouts, resident, strict=True) if not stays),
            default=0,
        )
        if largest > self._settings.slot_bytes:
            raise ValueError(f"a slot of {self._settings.slot_bytes} bytes cannot hold a block of {largest}")
        return self._device.allocate(places + slots)

    # -- the consumer's side ------------------------------------------------------------------------------------

    def wait(self, block_index: int) -> Piece:
        """Return the memory of a block, once all its bytes are there; it stays valid until `release`.

        Blocks are asked for in order, round and round. Asking for another one than is due (a pass was broken off)
        drops what was prefetched and starts over from there. Raises StreamError when a reader failed.
        """
        start = self._clock()
        with self._lock:
            self._raise_failure()
            if block_index in self._lent:
                raise StreamError(f"{self._name(block_index)} was asked for twice without being given back")
            if self._due == 0 or block_index < self._due:
                self._consumer_pass += 1
            if block_index != self._due:
                self._start_over(block_index)
            self._due = (block_index + 1) % len(self._layouts)
            self._wanted = block_index
            fetch = self._arrived(block_index)
            if fetch is None:
                self._room.notify_all()
            while fetch is None:  # <-- waited for
                self._arrivals.wait()
                self._raise_failure()
                fetch = self._arrived(block_index)
            self._wanted = None
            if fetch.slot is not None:
                self._coming.popleft()
            self._lent[block_index] = fetch
            fetch.handed_out_s = self._clock()
            if fetch.handed_out_s - start > 20e-6:
                self._stall_s += fetch.handed_out_s - start
                self._record(Lane.STALL, block_index, self._consumer_pass, start, fetch.handed_out_s)
            return fetch.piece

    def release(self, block_index: int) -> None:
        """Give a block back: nothing reads its memory any more, except device work enqueued before this call."""
        with self._lock:
            fetch = self._lent.pop(block_index)
            self._record(Lane.COMPUTE, block_index, self._consumer_pass, fetch.handed_out_s, self._clock())
            if fetch.slot is not None:
                fetch.slot.reusable = self._device.computed()
                if self._settings.poison:
                    fetch.slot.reusable.wait()
                    fetch.slot.piece.tensor.fill_(POISON)
                self._free_slots.append(fetch.slot)  # <-- released
                self._room.notify_all()

    def peek(self, block_index: int) -> Piece | None:
        """The memory of a resident block whose bytes have all arrived, else None. Never waits."""
        with self._lock:
            fetch = self._settled.get(block_index)
            return fetch.piece if fetch is not None and fetch.arrived else None

    def check_integrity(self) -> None:
        """Raise AssertionError unless free, coming and lent slots add up to all slots."""
        with self._lock:
            lent = sum(fetch.slot is not None for fetch in self._lent.values())
            held = len(self._free_slots) + len(self._coming) + lent
            total = 0 if all(place is not None for place in self._places) else self._settings.slots
            if held != total:
                raise AssertionError(f"{held} slots accounted for, {total} exist")

    @property
    def counters(self) -> StreamCounters:
        """Bytes read and seconds waited so far."""
        with self._lock:
            return StreamCounters(self._bytes_read, self._stall_s, self._read_busy_s)

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that this stream holds, whatever is in them."""
        return self._arena.size_bytes

    def timeline(self) -> Timeline:
        """What was read, computed and waited for, in seconds since construction (the latest 200,000 events)."""
        with self._lock:
            names = tuple(self._name(index) for index in range(len(self._layouts)))
            return Timeline(tuple(self._events), names)

    def close(self) -> None:
        """Stop the readers, wait for them, give the memory back. A second call does nothing."""
        self._closing.set()
        with self._lock:
            self._arrivals.notify_all()
            self._room.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._source.close()
        self._arena.close()

    # -- the readers' side --------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Read chunk after chunk until closed. Runs in every reader thread."""
        while True:
            with self._lock:
                task = self._next_chunk()
                while task is None:
                    if self._closing.is_set() or self._failure is not None:
                        return
                    self._room.wait()
                    task = self._next_chunk()
                if self._closing.is_set() or self._failure is not None:
                    return
                fetch, chunk = task
                self._chunks_in_flight += 1
            start = self._clock()
            try:
                size_bytes = self._read(fetch, chunk)
            except BaseException as error:
                with self._lock:
                    self._chunks_in_flight -= 1
                    self._failure = self._failure or self._explain(error, fetch, chunk)  # the first one counts
                    self._arrivals.notify_all()
                    self._room.notify_all()
                return
            end = self._clock()
            with self._lock:
                self._chunks_in_flight -= 1
                self._bytes_read += size_bytes
                self._read_busy_s += end - start
                fetch.chunks_left -= 1
                if fetch.arrived:
                    self._record(Lane.READ, fetch.block_index, fetch.pass_index, fetch.started_s, end)
                if fetch.arrived or self._chunks_in_flight == 0:
                    self._arrivals.notify_all()

    def _next_chunk(self) -> tuple[_Fetch, _Chunk] | None:
        """The next read to do, or None while there is none to do. Called with the lock held."""
        if self._paused:
            return None
        if self._filling is None or not self._filling.chunks:
            self._filling = self._request()
            if self._filling is None:
                return None
        return self._filling, self._filling.chunks.popleft()

    def _request(self) -> _Fetch | None:
        """Begin to fetch the block whose turn it is, if there is room for it. Called with the lock held."""
        for _ in range(len(self._layouts)):  # step over residents that are settled
            if self._places[self._cursor] is None or self._cursor not in self._settled:
                break
            self._advance_cursor()
        else:
            return None  # everything is resident and read
        block_index = self._cursor
        if not self._settings.overlap and self._wanted != block_index:
            return None  # the plain variant: nothing is requested before it is needed
        place = self._places[block_index]
        slot = None
        if place is None:
            if not self._free_slots:
                return None
            slot = self._free_slots.popleft()
            place = slot.piece
        self._wanted = None  # asked for once, requested once: the same block may be next again
        chunks = deque(self._cut(self._layouts[block_index]))
        fetch = _Fetch(block_index, self._cursor_pass, place, slot, chunks, len(chunks), self._clock())
        if slot is None:
            self._settled[block_index] = fetch
        else:
            self._coming.append(fetch)  # <-- requested
        self._advance_cursor()
        return fetch

    def _advance_cursor(self) -> None:
        self._cursor += 1
        if self._cursor == len(self._layouts):
            self._cursor, self._cursor_pass = 0, self._cursor_pass + 1

    def _cut(self, layout: Layout) -> list[_Chunk]:
        """Cut a block's extents into reads of at most chunk_bytes."""
        size = max(PAGE_BYTES, align_down(self._settings.chunk_bytes))
        return [
            _Chunk(
                extent.file_index, extent.file_offset + done, extent.slot_offset + done, min(size, extent.length - done)
            )
            for extent in layout.extents
            for done in range(0, extent.length, size)
        ]

    def _read(self, fetch: _Fetch, chunk: _Chunk) -> int:
        """One read call, paced by the limit. The slot's former computation must be over before a byte is written."""
        if fetch.slot is not None:
            fetch.slot.reusable.wait()
        passed = self._limit.occupy(chunk.length) if self._limit is not None else None
        buffer = fetch.piece.buffer[chunk.start : chunk.start + chunk.length]
        size_bytes = self._source.read_into(chunk.file_index, chunk.offset, buffer)
        if self._limit is not None and passed is not None:
            self._limit.wait_until(passed)
        return size_bytes

    # -- small things, all called with the lock held ------------------------------------------------------------

    def _arrived(self, block_index: int) -> _Fetch | None:
        if self._places[block_index] is not None:
            fetch = self._settled.get(block_index)
            return fetch if fetch is not None and fetch.arrived else None
        if self._coming and self._coming[0].arrived:
            return self._coming[0]
        if not self._coming and not self._free_slots:
            raise StreamError(
                f"{self._name(block_index)} cannot be loaded: all slots are in use by blocks not given back"
            )
        return None

    def _start_over(self, block_index: int) -> None:
        """Drop what was prefetched and let the next request be for `block_index`. Waits for reads in flight."""
        self._paused = True
        while self._chunks_in_flight:
            self._arrivals.wait()
            self._raise_failure()
        self._free_slots.extend(fetch.slot for fetch in self._coming if fetch.slot is not None)
        self._coming.clear()
        self._filling = None
        for index in [index for index, fetch in self._settled.items() if not fetch.arrived]:
            del self._settled[index]  # a resident block broken off midway is read again
        self._cursor, self._cursor_pass = block_index, self._consumer_pass
        self._paused = False

    def _name(self, block_index: int) -> str:
        names = self._settings.block_names
        return names[block_index] if names else f"block {block_index}"

    def _record(self, lane: Lane, block_index: int, pass_index: int, start: float, end: float) -> None:
        self._events.append(Event(lane, block_index, pass_index, start - self._origin_s, end - self._origin_s))

    def _explain(self, error: BaseException, fetch: _Fetch, chunk: _Chunk) -> BaseException:
        place = f"{self._name(fetch.block_index)} from {self._source.describe(chunk.file_index)} at byte {chunk.offset}"
        kind = type(error) if isinstance(error, HeadraceError) else StreamError
        explained = kind(f"while reading {place}: {error}")
        explained.__cause__ = error
        return explained

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closing.is_set():
            raise StreamError("the stream is closed")
