"""The stream: brings block i into memory, hands it out, takes it back; the next blocks load while this one computes.

Readers go through the blocks in cyclic order, over the end of a pass into the next one, and stop only when every slot
is full. A block that stays (in the device's memory, or on the host for the processor to compute) is read once, in its
turn of the first pass, into a place of its own; one that travels from host memory is read once into its store there.

The life of a block's bytes is three lines, all in this file: they are requested in `_request`, waited for in `wait`,
and given back in `release`. With `overlap` off, `_request` holds back until the block is waited for: load, compute,
drop. How bytes come to their place, straight or over a ring and a link, is `landing.py`'s.

On an accelerator nothing here waits for the device: `wait` blocks only until the copies of a block are *enqueued*, and
lets the device's computation wait for them; `release` records what has been enqueued to compute with the block, and the
next copy into its slot waits for that, on the device too. Blocks from page-locked host memory are sent by whoever frees
a slot, so that in the steady state no thread but the consumer's has anything to do.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from headrace.errors import HeadraceError, StreamError
from headrace.model.layout import PAGE_BYTES, AlignedLayout, Layout, align_up
from headrace.planning.plan import TRAVELLING, Placement
from headrace.planning.timeline import Lane, Timeline
from headrace.streaming.arena import Arena, Memory, Piece
from headrace.streaming.device import COMPLETE, Device, DeviceEvent
from headrace.streaming.event_log import EventLog
from headrace.streaming.fetch import Chunk, Fetch, Slot, cut, cut_store
from headrace.streaming.ring import Ring
from headrace.streaming.source import ByteSource, RateLimit
from headrace.streaming.transfer import DirectTransfer, StagedTransfer, Transfer

POISON = 0xFF
"""Bytes of a released slot in debug mode: not-a-number in every floating point format."""


class StreamCounters(NamedTuple):
    """What has happened so far. Bytes include over-reading; stalls are of whoever computes."""

    bytes_read: int
    stall_s: float
    read_busy_s: float
    bytes_copied: int = 0
    """to an accelerator"""


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How to read. `poison` overwrites released slots, so that a use after release shows."""

    slots: int
    slot_bytes: int
    overlap: bool = True
    reader_threads: int = 2
    chunk_bytes: int = 8 << 20
    ring_chunks: int = 4
    """page-locked chunks between disk and accelerator; readers wait where all are on their way"""
    read_limit_bytes_per_s: float | None = None
    poison: bool = False
    block_names: tuple[str, ...] = field(default=())


class Stream:
    """Moves the blocks of one model; single consumer.

    Holds `places of resident blocks + slots x slot_bytes` of the device's memory from construction to `close`, and for
    an accelerator the stores, the ring and the blocks of the processor in host memory. An error in a reader, or of a
    copy, is raised by the consumer's next (or present) call and names the block and where its bytes came from.

    `aligned`: for an accelerator, the form in which it holds each block.
    """

    def __init__(
        self,
        *,
        layouts: Sequence[Layout],
        places: Sequence[Placement],
        source: ByteSource,
        device: Device,
        settings: StreamSettings,
        aligned: Sequence[AlignedLayout] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if len(layouts) != len(places):
            raise ValueError(f"{len(layouts)} layouts for {len(places)} blocks")
        if any(not layout.footprint_bytes for layout in layouts):
            raise ValueError("a block without bytes cannot be streamed")
        travels = any(place in TRAVELLING for place in places)
        if travels and settings.slots < 1:
            raise ValueError("streamed blocks need at least one slot")
        if not device.uses_host_memory and (aligned is None or len(aligned) != len(layouts)):
            raise ValueError(f"{device.name} needs the aligned form of every block")
        if device.uses_host_memory and any(place in (Placement.HOST, Placement.CPU) for place in places):
            raise ValueError("the processor has one memory: blocks are in it or on the disk")
        self._layouts = tuple(layouts)
        self._where = tuple(places)
        self._settings = settings
        self._source = source
        self._device = device
        self._clock = clock
        self._sizes = tuple(
            layout.footprint_bytes if device.uses_host_memory else form.size_bytes
            for layout, form in zip(layouts, aligned or [AlignedLayout((), {}, 0)] * len(layouts), strict=True)
        )
        self._lock = threading.Lock()
        # Apart, since whoever is woken for nothing takes a processor from the computation that then begins.
        self._arrivals = threading.Condition(self._lock)
        """the consumer waits here: for bytes, or for reads in flight to end"""
        self._room = threading.Condition(self._lock)
        """readers wait here: for something to read and a place to put it"""
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        limit = settings.read_limit_bytes_per_s
        pace = None if limit is None else RateLimit(limit, clock=clock, sleep=self._closing.wait)

        self._held: list[Memory | Ring] = []
        self._host_bytes = 0
        try:
            # The ring first: whatever else cannot be page-locked goes through it.
            self._landing: Transfer = self._land(source, pace, aligned)
            self._take_memory(travels=travels)
        except BaseException:
            for memory in self._held:
                memory.close()
            raise
        self._settled: dict[int, Fetch] = {}  # blocks that stay: requested or arrived, never dropped
        self._stored: set[int] = set()  # blocks from host memory whose store is full
        self._storing: set[int] = set()  # those whose store is being filled
        self._coming: deque[Fetch] = deque()  # travelling blocks: requested or arrived, in order, not handed out
        self._lent: dict[int, Fetch] = {}  # handed out, not given back
        self._to_read: deque[tuple[Fetch, Chunk]] = deque()  # requested, not yet with a reader
        self._chunks_in_flight = 0
        self._cursor = 0  # the block whose turn to be requested is next
        self._cursor_pass = 0
        self._wanted: int | None = None  # the block that the consumer is waiting for
        self._consumer_pass = -1
        self._due = 0  # the block that the consumer asks for next if it goes on in order

        self._bytes_read = 0
        self._bytes_copied = 0
        self._read_busy_s = 0.0
        self._log = EventLog(clock())
        with self._lock:
            self._request_all()
        self._threads = [
            threading.Thread(target=self._work, name=f"headrace-reader-{number}", daemon=True)
            for number in range(settings.reader_threads)
        ]
        for thread in self._threads:
            thread.start()

    def _take_memory(self, *, travels: bool) -> None:
        """Take all memory that blocks may ever lie in: on the device, and in stores on the host."""
        sizes, where, settings = self._sizes, self._where, self._settings
        largest = max((size for size, place in zip(sizes, where, strict=True) if place in TRAVELLING), default=0)
        if largest > settings.slot_bytes:
            raise ValueError(f"a slot of {settings.slot_bytes} bytes cannot hold a block of {largest}")
        slots = settings.slots if travels else 0
        resident_bytes = sum(size for size, place in zip(sizes, where, strict=True) if place is Placement.DEVICE)
        self._device_bytes = resident_bytes + slots * settings.slot_bytes
        memory = self._device.allocate(self._device_bytes)
        self._held.append(memory)
        stores = self._allocate_host(Placement.HOST)
        own = self._allocate_host(Placement.CPU)
        self._stores_pinned = stores is None or stores.pinned
        self._places: list[Piece | None] = []
        self._stores: list[Piece | None] = []
        for size, place in zip(sizes, where, strict=True):
            stays = place is Placement.DEVICE
            self._places.append(memory.take(size) if stays else _take(own, size) if place is Placement.CPU else None)
            self._stores.append(_take(stores, size) if place is Placement.HOST else None)
        self._free_slots = deque(Slot(memory.take(settings.slot_bytes)) for _ in range(slots))

    def _allocate_host(self, place: Placement) -> Arena | None:
        total = sum(align_up(size) for size, own in zip(self._sizes, self._where, strict=True) if own is place)
        if not total:
            return None
        arena = self._device.allocate_host(total) if place is Placement.HOST else Arena(total)
        self._held.append(arena)
        self._host_bytes += total
        return arena

    def _land(self, source: ByteSource, pace: RateLimit | None, aligned: Sequence[AlignedLayout] | None) -> Transfer:
        if self._device.uses_host_memory:
            return DirectTransfer(source, pace)
        ring = Ring(
            self._device,
            chunks=self._settings.ring_chunks,
            chunk_bytes=max(PAGE_BYTES, align_up(self._settings.chunk_bytes)),
        )
        self._held.append(ring)
        self._host_bytes += ring.size_bytes
        assert aligned is not None
        return StagedTransfer(self._device, source, pace, aligned=aligned, ring=ring)

    # -- the consumer's side ------------------------------------------------------------------------------------

    def wait(self, block_index: int) -> Piece:
        """Return the memory of a block, once all its bytes are there; it stays valid until `release`.

        On an accelerator they are there for whatever is enqueued from now on to compute. Blocks are asked for in order,
        round and round. Asking for another one than is due (a pass was broken off) drops what was prefetched and starts
        over from there. Raises StreamError when a reader or a copy failed.
        """
        start = self._clock()
        with self._lock:
            self._raise_failure()
            if block_index in self._lent:
                raise StreamError(f"{self._name(block_index)} was asked for twice without being given back")
            if self._due == 0 or block_index < self._due:
                self._consumer_pass += 1
                self._log.settle()
            if block_index != self._due:
                self._start_over(block_index)
            self._due = (block_index + 1) % len(self._layouts)
            self._wanted = block_index
            self._request_all()
            fetch = self._arrived(block_index)
            while fetch is None:  # <-- waited for
                self._arrivals.wait()
                self._raise_failure()
                fetch = self._arrived(block_index)
            self._wanted = None
            if fetch.slot is not None:
                self._coming.popleft()
            self._lent[block_index] = fetch
            fetch.handed_out_s = self._clock()
            if self._by_host(block_index):
                self._log.add(Lane.STALL, block_index, self._consumer_pass, start, fetch.handed_out_s)
        if not self._by_host(block_index):
            self._compute_with(fetch)
        return fetch.piece

    def _compute_with(self, fetch: Fetch) -> None:
        """Let the device's computation wait for a block's copies."""
        index = fetch.block_index
        try:
            if fetch.copied is None:
                fetch.began = self._device.computed()
                return
            asked = self._device.computed()
            self._device.compute_after(fetch.copied.end)
            fetch.began = self._device.computed()
        except Exception as error:
            with self._lock:
                raise self._fail(error, f"while {self._name(index)} was copied to {self._device.name}") from error
        with self._lock:
            self._log.add_pending(Lane.STALL, index, self._consumer_pass, asked, fetch.began)
            if fetch.copy_begin is not None:
                self._log.add_pending(Lane.COPY, index, fetch.pass_index, fetch.copy_begin, fetch.copied.end)
                fetch.copy_begin = None
                self._bytes_copied += self._sizes[index]
            if fetch.slot is None and fetch.copied.end.passed():
                fetch.copied = None  # it is there for good

    def release(self, block_index: int) -> None:
        """Give a block back: nothing reads its memory any more, except device work enqueued before this call."""
        with self._lock:
            fetch = self._lent.pop(block_index)
            if self._by_host(block_index):
                self._log.add(Lane.COMPUTE, block_index, self._consumer_pass, fetch.handed_out_s, self._clock())
            try:
                computed = self._computed(fetch)
                if fetch.slot is not None:
                    if self._settings.poison:
                        computed = self._device.fill(fetch.slot.piece.tensor, POISON, after=[computed])
                    fetch.slot.reusable = computed
            except Exception as error:
                raise self._fail(error, f"while {self._name(block_index)} was computed") from error
            if fetch.slot is not None:
                self._free_slots.append(fetch.slot)  # <-- released
                self._request_all()

    def _computed(self, fetch: Fetch) -> DeviceEvent:
        """The event of what was enqueued to compute with a block; noted, where the device keeps the time."""
        if self._where[fetch.block_index] is Placement.CPU or (self._device.uses_host_memory and fetch.slot is None):
            return COMPLETE
        computed = self._device.computed()
        if fetch.began is not None:
            self._log.add_pending(Lane.COMPUTE, fetch.block_index, self._consumer_pass, fetch.began, computed)
            fetch.began = None
        return computed

    def _by_host(self, block_index: int) -> bool:
        """Whether the processor computes this block, so that its clock tells when."""
        return self._device.uses_host_memory or self._where[block_index] is Placement.CPU

    def peek(self, block_index: int) -> Piece | None:
        """The memory of a block that stays, if all its bytes are there, else None. Never waits for a read.

        On an accelerator, as with `wait`, they are there for whatever is enqueued from now on.
        """
        with self._lock:
            fetch = self._settled.get(block_index)
            if fetch is None or not fetch.arrived:
                return None
            copied = fetch.copied
        if copied is not None:
            self._device.compute_after(copied.end)
        return fetch.piece

    def check_integrity(self) -> None:
        """Raise AssertionError unless free, coming and lent slots add up to all slots."""
        with self._lock:
            lent = sum(fetch.slot is not None for fetch in self._lent.values())
            held = len(self._free_slots) + len(self._coming) + lent
            total = self._settings.slots if any(place in TRAVELLING for place in self._where) else 0
            if held != total:
                raise AssertionError(f"{held} slots accounted for, {total} exist")

    @property
    def counters(self) -> StreamCounters:
        """Bytes read and copied, seconds waited so far."""
        with self._lock:
            self._log.settle()
            return StreamCounters(self._bytes_read, self._log.stall_s, self._read_busy_s, self._bytes_copied)

    @property
    def held_bytes(self) -> int:
        """Bytes of the device's memory that this stream holds, whatever is in them."""
        return self._device_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that it holds beside an accelerator: stores, ring, blocks of the processor."""
        return self._host_bytes

    @property
    def stores_pinned(self) -> bool:
        """Whether the system let the host memory that blocks travel from be page-locked."""
        return self._stores_pinned

    def timeline(self) -> Timeline:
        """What was read, copied, computed and waited for, in seconds since construction (the latest events)."""
        with self._lock:
            return self._log.timeline(tuple(self._name(index) for index in range(len(self._layouts))))

    def close(self) -> None:
        """Stop the readers, wait for them and for the device, give the memory back. A second call does nothing."""
        self._closing.set()
        with self._lock:
            self._arrivals.notify_all()
            self._room.notify_all()
        self._landing.stop()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._source.close()
        if not self._device.uses_host_memory:  # memory goes only when no copy can touch it any more
            with contextlib.suppress(RuntimeError):  # a device that failed is idle
                self._device.synchronize()
        for memory in self._held:
            memory.close()
        # A device's memory goes with the last view of it.
        for kept in (self._settled, self._coming, self._lent, self._to_read, self._free_slots):
            kept.clear()
        self._places = [None] * len(self._places)
        self._stores = [None] * len(self._stores)

    # -- the readers' side --------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Read chunk after chunk until closed. Runs in every reader thread."""
        with torch.inference_mode():  # allowed to write to any tensor, however it was made
            self._read_on()

    def _read_on(self) -> None:
        while True:
            with self._lock:
                while not self._to_read:
                    if self._closing.is_set() or self._failure is not None:
                        return
                    self._room.wait()
                if self._closing.is_set() or self._failure is not None:
                    return
                fetch, chunk = self._to_read.popleft()
                self._chunks_in_flight += 1
                start = self._clock()
                fetch.started_s = fetch.started_s or start
            try:
                size_bytes = self._landing.read(fetch, chunk)
            except BaseException as error:
                with self._lock:
                    self._chunks_in_flight -= 1
                    if not (self._closing.is_set() and isinstance(error, StreamError)):
                        self._fail(error, f"while reading {self._origin(fetch, chunk)}")
                    self._arrivals.notify_all()
                return
            end = self._clock()
            with self._lock:
                self._chunks_in_flight -= 1
                self._bytes_read += size_bytes
                self._read_busy_s += end - start
                fetch.chunks_left -= 1
                if fetch.arrived and chunk.file_index is not None:
                    self._log.add(Lane.READ, fetch.block_index, fetch.pass_index, fetch.started_s, end)
                    self._read_to_its_end(fetch)
                if fetch.arrived or self._chunks_in_flight == 0:
                    self._arrivals.notify_all()

    def _read_to_its_end(self, fetch: Fetch) -> None:
        """All chunks are there. What filled a store now travels from it. Called with the lock held."""
        index = fetch.block_index
        if self._where[index] is not Placement.HOST or index in self._stored:
            return
        self._stored.add(index)
        self._storing.discard(index)
        self._travel_from_store(fetch)
        self._request_all()

    def _travel_from_store(self, fetch: Fetch) -> None:
        """Send a block from host memory: in one copy, or piece by piece where it is not page-locked."""
        if self._stores_pinned:
            try:
                self._landing.send(fetch)
            except Exception as error:
                self._fail(error, f"while {self._name(fetch.block_index)} was copied to {self._device.name}")
            return
        chunks = cut_store(self._sizes[fetch.block_index], max(PAGE_BYTES, align_up(self._settings.chunk_bytes)))
        fetch.chunks_left = len(chunks)
        self._to_read.extend((fetch, chunk) for chunk in chunks)
        self._room.notify_all()

    def _request_all(self) -> None:
        """Request blocks for as long as there is room. Called with the lock held."""
        while self._failure is None and self._request():
            pass

    def _request(self) -> bool:
        """Begin to fetch the block whose turn it is, if there is room for it. Called with the lock held."""
        for _ in range(len(self._layouts)):  # step over blocks that are settled
            if self._cursor not in self._settled:
                break
            self._advance_cursor()
        else:
            return False  # everything stays and is read
        block_index = self._cursor
        if not self._settings.overlap and self._wanted != block_index:
            return False  # the plain variant: nothing is requested before it is needed
        if block_index in self._storing:
            return False  # fewer blocks than slots: its first visit still fills the store that the next comes from
        place = self._places[block_index]
        slot = None
        if place is None:
            if not self._free_slots:
                return False
            slot = self._free_slots.popleft()
            place = slot.piece
        self._wanted = None  # asked for once, requested once: the same block may be next again
        store = self._stores[block_index]
        if self._where[block_index] is Placement.CPU:
            store = place
        fetch = Fetch(block_index, self._cursor_pass, place, slot, 0, store)
        if slot is None:
            self._settled[block_index] = fetch
        else:
            self._coming.append(fetch)  # <-- requested
        self._advance_cursor()
        if block_index in self._stored:
            self._travel_from_store(fetch)
            return True
        if self._where[block_index] is Placement.HOST:
            self._storing.add(block_index)
        chunks = cut(self._layouts[block_index], self._settings.chunk_bytes)
        fetch.chunks_left = len(chunks)
        self._to_read.extend((fetch, chunk) for chunk in chunks)
        self._room.notify_all()
        return True

    def _advance_cursor(self) -> None:
        self._cursor += 1
        if self._cursor == len(self._layouts):
            self._cursor, self._cursor_pass = 0, self._cursor_pass + 1

    # -- small things, all called with the lock held ------------------------------------------------------------

    def _arrived(self, block_index: int) -> Fetch | None:
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
        self._to_read.clear()
        while self._chunks_in_flight:
            self._arrivals.wait()
            self._raise_failure()
        self._to_read.clear()  # a store that was filled meanwhile may have wanted to travel on
        for fetch in self._coming:
            assert fetch.slot is not None
            if fetch.copied is not None:
                fetch.slot.reusable = fetch.copied.end  # copies on their way still write there
            self._free_slots.append(fetch.slot)
        self._coming.clear()
        self._storing.clear()
        for index in [index for index, fetch in self._settled.items() if not fetch.arrived]:
            del self._settled[index]  # a block that stays, broken off midway, is read again
        self._cursor, self._cursor_pass = block_index, self._consumer_pass

    def _name(self, block_index: int) -> str:
        names = self._settings.block_names
        return names[block_index] if names else f"block {block_index}"

    def _origin(self, fetch: Fetch, chunk: Chunk) -> str:
        name = self._name(fetch.block_index)
        if chunk.file_index is None:
            return f"{name} from host memory"
        return f"{name} from {self._source.describe(chunk.file_index)} at byte {chunk.offset}"

    def _fail(self, error: BaseException, what: str) -> BaseException:
        """Explain an error, end the readers, and let every call from now on raise it; the first one counts."""
        kind = type(error) if isinstance(error, HeadraceError) else StreamError
        explained = kind(f"{what}: {error}")
        explained.__cause__ = error
        self._failure = self._failure or explained
        self._arrivals.notify_all()
        self._room.notify_all()
        return self._failure

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closing.is_set():
            raise StreamError("the stream is closed")


def _take(arena: Arena | None, size_bytes: int) -> Piece:
    """A place for a block in host memory, seen without the page's rest."""
    assert arena is not None
    piece = arena.take(align_up(size_bytes))
    return Piece(piece.tensor[:size_bytes], piece.buffer[:size_bytes])
