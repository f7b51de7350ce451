"""The stream: brings block i into memory, hands it out, takes it back; the next blocks load while this one computes.

Readers go through the blocks in cyclic order, over the end of a pass into the next one, and stop only when every slot
is full. A block that stays (in the device's memory, or on the host for the CPU to compute) is read once, in its
turn of the first pass, into a place of its own; one that travels from host memory is read once into its store there.

The life of a block's bytes is three lines, all in this file: they are requested in `_request`, waited for in `wait`,
and given back in `release`. With `overlap` off, `_request` holds back until the block is waited for: load, compute,
drop. How bytes come to their place, straight or over a ring and a link, is in `transfer.py`; the memory
that they come to in `stream_memory.py`; the threads that bring them in `readers.py`.

On an accelerator nothing here waits for the device: `wait` blocks only until the copies of a block are *enqueued*, and
lets the device's computation wait for them; `release` records what has been enqueued to compute with the block, and the
next copy into its slot waits for that, on the device too. Freeing a slot sends the next block from page-locked host
memory, so that in the steady state no thread but the consumer's has anything to do.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.errors import HeadraceError, StreamError
from headrace.model.layout import PAGE_BYTES, AlignedLayout, Layout, align_up
from headrace.planning.plan import TRAVELLING, Placement
from headrace.planning.timeline import Lane, Timeline
from headrace.streaming.arena import Piece
from headrace.streaming.device import COMPLETE, Device, DeviceEvent
from headrace.streaming.event_log import EventLog
from headrace.streaming.fetch import Chunk, Fetch, cut, cut_store
from headrace.streaming.readers import ChunkToRead, Readers
from headrace.streaming.ring import Ring
from headrace.streaming.source import ByteSource, RateLimit
from headrace.streaming.stream_memory import StreamMemory
from headrace.streaming.transfer import DirectTransfer, StagedTransfer, Transfer

POISON = 0xFF
"""Bytes of a released slot in debug mode: not-a-number in every floating point format."""


class StreamCounters(NamedTuple):
    """What has happened so far. Bytes include over-reading; stalls are of the computation."""

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
    an accelerator the stores, the ring and the CPU's blocks in host memory. An error in a reader, or of a
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
            raise ValueError("a CPU has one memory: blocks are in it or on the disk")
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
        # Two conditions: a thread woken for nothing would take a core from the computation that then begins.
        self._arrivals = threading.Condition(self._lock)
        """the consumer waits here: for bytes, or for reads in flight to end"""
        self._room = threading.Condition(self._lock)
        """readers wait here: for something to read and a place to put it"""
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        limit = settings.read_limit_bytes_per_s
        pace = None if limit is None else RateLimit(limit, clock=clock, sleep=self._closing.wait)

        # The ring first: stores that cannot be page-locked go through it.
        self._ring = None if device.uses_host_memory else self._open_ring()
        self._transfer: Transfer = DirectTransfer(source, pace)
        if self._ring is not None and aligned is not None:
            self._transfer = StagedTransfer(device, source, pace, aligned=aligned, ring=self._ring)
        try:
            self._memory = StreamMemory(
                device,
                sizes=self._sizes,
                placements=self._where,
                slots=settings.slots,
                slot_bytes=settings.slot_bytes,
            )
        except BaseException:
            if self._ring is not None:
                self._ring.close()
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
        self._readers = Readers(self, self._transfer.read, count=settings.reader_threads)

    def _open_ring(self) -> Ring:
        chunk_bytes = max(PAGE_BYTES, align_up(self._settings.chunk_bytes))
        return Ring(self._device, chunks=self._settings.ring_chunks, chunk_bytes=chunk_bytes)

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
                self._memory.free_slots.append(fetch.slot)  # <-- released
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
        """Whether the CPU computes this block, so that the host's clock tells when."""
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
            held = len(self._memory.free_slots) + len(self._coming) + lent
            if held != self._memory.slots:
                raise AssertionError(f"{held} slots accounted for, {self._memory.slots} exist")

    @property
    def counters(self) -> StreamCounters:
        """Bytes read and copied, seconds waited so far."""
        with self._lock:
            self._log.settle()
            return StreamCounters(self._bytes_read, self._log.stall_s, self._read_busy_s, self._bytes_copied)

    @property
    def held_bytes(self) -> int:
        """Bytes of the device's memory that this stream holds, whatever is in them."""
        return self._memory.device_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory held for an accelerator: stores, ring, the CPU's blocks."""
        return self._memory.host_bytes + (0 if self._ring is None else self._ring.size_bytes)

    @property
    def stores_pinned(self) -> bool:
        """Whether the system let the host memory that blocks travel from be page-locked."""
        return self._memory.stores_pinned

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
        self._transfer.stop()
        self._readers.join()
        self._source.close()
        if not self._device.uses_host_memory:  # memory goes only when no copy can touch it any more
            with contextlib.suppress(RuntimeError):  # a device that failed is idle
                self._device.synchronize()
        for kept in (self._settled, self._coming, self._lent, self._to_read):
            kept.clear()
        self._memory.close()
        if self._ring is not None:
            self._ring.close()

    # -- the readers' side --------------------------------------------------------------------------------------

    def next_chunk(self) -> ChunkToRead | None:
        """Wait for a chunk to read; None when the readers are to end."""
        with self._lock:
            while not self._to_read and not self._ends():
                self._room.wait()
            if self._ends():
                return None
            fetch, chunk = self._to_read.popleft()
            self._chunks_in_flight += 1
            start = self._clock()
            fetch.started_s = fetch.started_s or start
            return ChunkToRead(fetch, chunk, start)

    def _ends(self) -> bool:
        return self._closing.is_set() or self._failure is not None

    def chunk_read(self, taken: ChunkToRead, size_bytes: int) -> None:
        """Note that a chunk's bytes are there, and let the block go on when all of them are."""
        fetch, end = taken.fetch, self._clock()
        with self._lock:
            self._chunks_in_flight -= 1
            self._bytes_read += size_bytes
            self._read_busy_s += end - taken.start_s
            fetch.chunks_left -= 1
            if fetch.arrived and taken.chunk.file_index is not None:
                self._log.add(Lane.READ, fetch.block_index, fetch.pass_index, fetch.started_s, end)
                self._read_to_its_end(fetch)
            if fetch.arrived or self._chunks_in_flight == 0:
                self._arrivals.notify_all()

    def chunk_failed(self, taken: ChunkToRead, error: BaseException) -> None:
        """Note that a chunk could not be read, unless the stream was closed under the reader."""
        with self._lock:
            self._chunks_in_flight -= 1
            if not (self._closing.is_set() and isinstance(error, StreamError)):
                self._fail(error, f"while reading {self._origin(taken.fetch, taken.chunk)}")
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
        if self._memory.stores_pinned:
            try:
                self._transfer.send(fetch)
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
        place = self._memory.places[block_index]
        slot = None
        if place is None:
            if not self._memory.free_slots:
                return False
            slot = self._memory.free_slots.popleft()
            place = slot.piece
        self._wanted = None  # asked for once, requested once: the same block may be next again
        store = self._memory.stores[block_index]
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
        if self._memory.places[block_index] is not None:
            fetch = self._settled.get(block_index)
            return fetch if fetch is not None and fetch.arrived else None
        if self._coming and self._coming[0].arrived:
            return self._coming[0]
        if not self._coming and not self._memory.free_slots:
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
            self._memory.free_slots.append(fetch.slot)
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
