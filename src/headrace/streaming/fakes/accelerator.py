"""An accelerator made of host memory, whose queues move in the order that hurts.

It has memory of its own, queues for computing and copying, events, and a driver of them that a test chooses: what a
GPU may do in any order, this one does in the worst. Every call only puts work into a queue. How far the queues get is
up to the `Drive`:
  LAZY             nothing moves before somebody waits for it
  EAGER            everything moves as soon as its queue's order and its events allow
  COPIES_FIRST     copies are eager, computing is lazy: a copy that does not wait for computing overwrites what it reads
  COMPUTING_FIRST  computing is eager, copies are lazy: computing that does not wait for a copy finds old bytes
  RANDOM           a seeded draw of steps at every call: hypothesis looks for the interleaving that breaks
  MANUAL           only `step` and `run` move the queues: a test holds any copy exactly where it wants it

Torch computes on this device's memory at once, when a model calls it, so `computes_at_once` is what models run with:
there `compute_after` brings about exactly what it waits for. Tests of the stream enqueue computations (`compute`)
instead, which then lag behind like kernels do.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from headrace.errors import BudgetError
from headrace.streaming.arena import Arena, TensorMemory
from headrace.streaming.device import COPY_LANES, Copied, CopyPart, DeviceEvent, DeviceMemory
from headrace.units import format_bytes

GARBAGE = 0xA5
"""what fresh memory of the fake holds"""
COMPUTING = "computing"
PATIENCE_S = 30.0


class Drive(StrEnum):
    """Who moves the queues."""

    LAZY = "lazy"
    EAGER = "eager"
    COPIES_FIRST = "copies first"
    COMPUTING_FIRST = "computing first"
    RANDOM = "random"
    MANUAL = "manual"


class QueueEvent:
    """A point in one of the fake's queues."""

    def __init__(self, device: FakeAccelerator, queue: str) -> None:
        self.queue = queue
        self._device = device
        self._passed_s: float | None = None

    def wait(self) -> None:
        """Move the queues until this point is passed (with MANUAL: wait until the test moved them)."""
        self._device.run_until(self)

    def passed(self) -> bool:
        """Whether the queue has come past this point."""
        return self._passed_s is not None

    def moment_s(self) -> float:
        """When it did."""
        assert self._passed_s is not None, "the event has not passed"
        return self._passed_s

    def mark(self) -> None:
        """The queue is here."""
        self._passed_s = time.perf_counter()


class _Bytes(bytearray):
    """What lies behind a tensor of the device's memory, and dies with the last view of it."""


@dataclass
class _Wait:
    """The queue stands until the event has passed."""

    event: DeviceEvent


_Item = _Wait | QueueEvent | Callable[[], None]


@dataclass(eq=False)
class FakeAccelerator:
    """A device with `memory_bytes` of its own, and host memory of which `pinnable_bytes` can be page-locked.

    `fail_at_copy` counts copies from 0 and raises RuntimeError there, as a driver does when one is enqueued.
    """

    memory_bytes: int = 1 << 40
    pinnable_bytes: int = 1 << 40
    drive: Drive = Drive.LAZY
    computes_at_once: bool = True
    seed: int = 0
    fail_at_copy: int | None = None
    name: str = "fake:0"
    uses_host_memory: bool = False
    torch_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    copies: int = 0
    """enqueued so far"""
    bytes_copied: int = 0
    """of copies that were carried out"""
    reserved_bytes: int = 0
    """kept for what models allocate in passes, which torch takes of the host here"""
    synchronized: int = 0
    """calls of `synchronize` so far"""
    violations: list[str] = field(default_factory=list)
    """what a real device would have crashed at: memory that was given back while work on it was enqueued"""
    _queues: dict[str, deque[_Item]] = field(default_factory=dict)
    _behind: list[weakref.ref[_Bytes]] = field(default_factory=list)
    _held: int = 0
    _peak: int = 0
    _pinned: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._moved = threading.Condition(threading.RLock())
        self._random = random.Random(self.seed)
        for queue in (COMPUTING, *map(_lane, range(COPY_LANES))):
            self._queues[queue] = deque()

    # -- memory -----------------------------------------------------------------------------------------------------

    def allocate(self, size_bytes: int) -> TensorMemory:
        """Take memory full of garbage; raises BudgetError beyond `memory_bytes`."""
        with self._moved:
            if self._held + size_bytes > self.memory_bytes:
                raise BudgetError(f"{self.name} has no {format_bytes(size_bytes)} left")
            self._held += size_bytes
            self._peak = max(self._peak, self._held)
        if not size_bytes:
            return _FakeMemory(self, torch.empty(0, dtype=torch.uint8))
        behind = _Bytes(bytes([GARBAGE]) * size_bytes)
        self._behind.append(weakref.ref(behind))
        return _FakeMemory(self, torch.frombuffer(behind, dtype=torch.uint8))

    def memories_alive(self) -> int:
        """How many of the memories that were taken are still seen by some tensor."""
        return sum(behind() is not None for behind in self._behind)

    def give_back(self, size_bytes: int) -> None:
        """Memory was closed."""
        with self._moved:
            self._check_idle("device memory")
            self._held -= size_bytes

    def _unlock(self, address: int, size_bytes: int) -> None:
        with self._moved:
            self._check_idle("page-locked memory")
            self._pinned.remove((address, size_bytes))

    def _check_idle(self, what: str) -> None:
        if any(self._queues[_lane(number)] for number in range(COPY_LANES)):
            self.violations.append(f"{what} was given back while copies were enqueued")

    def allocate_host(self, size_bytes: int) -> Arena:
        """Take ordinary memory, and remember it as page-locked while `pinnable_bytes` lasts."""
        arena = Arena(size_bytes)
        with self._moved:
            if sum(length for _, length in self._pinned) + size_bytes <= self.pinnable_bytes:
                arena.pinned = True
                self._pinned.append((arena.address, size_bytes))
                arena.on_close = lambda: self._unlock(arena.address, size_bytes)
        return arena

    def memory(self) -> DeviceMemory:
        """Of the made-up device."""
        return DeviceMemory(self.memory_bytes - self._held, self.memory_bytes)

    def held_bytes(self) -> int:
        """Allocated now."""
        return self._held

    def peak_bytes(self) -> int:
        """The most that was."""
        return self._peak

    def reset_peak(self) -> None:
        """Start again from what is held."""
        self._peak = self._held

    def release_cached(self) -> None:
        """Let go of what was reserved."""
        self.reserved_bytes = 0

    def reserve(self, size_bytes: int) -> None:
        """Remember it; raises BudgetError beyond `memory_bytes`."""
        if self._held + size_bytes > self.memory_bytes:
            raise BudgetError(f"{self.name} has no {format_bytes(size_bytes)} left")
        self.reserved_bytes = size_bytes

    # -- work -------------------------------------------------------------------------------------------------------

    def copy(self, parts: Sequence[CopyPart], *, after: Sequence[DeviceEvent] = (), lane: int = 0) -> Copied:
        """Enqueue; the bytes move when the queue gets there."""
        with self._moved:
            number, self.copies = self.copies, self.copies + 1
            if number == self.fail_at_copy:
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
            for part in parts:
                assert part.source.numel() == part.target.numel(), "a copy between different lengths"
                pinned = self._is_pinned(part.source) or self._is_pinned(part.target)
                assert pinned, "an asynchronous copy between the device and memory that is not page-locked"
            queue = _lane(lane)
            begin, end = QueueEvent(self, queue), QueueEvent(self, queue)
            self._add(queue, *map(_Wait, after), begin, lambda: self._move(parts), end)
            self._drift()
            return Copied(begin, end)

    def fill(self, target: torch.Tensor, value: int, *, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        """Enqueue."""
        with self._moved:
            end = QueueEvent(self, _lane(0))
            self._add(_lane(0), *map(_Wait, after), lambda: _fill(target, value), end)
            self._drift()
            return end

    def compute(self, work: Callable[[], None]) -> None:
        """Enqueue a computation (for tests; torch itself computes at once)."""
        with self._moved:
            self._add(COMPUTING, work)
            self._drift()

    def compute_after(self, event: DeviceEvent) -> None:
        """Computation enqueued from now on waits; where torch computes at once, bring about what it waits for."""
        if self.computes_at_once:
            event.wait()
            return
        with self._moved:
            self._add(COMPUTING, _Wait(event))
            self._drift()

    def computed(self) -> QueueEvent:
        """A point behind everything enqueued for computation."""
        with self._moved:
            event = QueueEvent(self, COMPUTING)
            self._add(COMPUTING, event)
            if self.computes_at_once:
                self._run_queue(COMPUTING)
            self._drift()
            return event

    def synchronize(self) -> None:
        """Empty all queues."""
        with self._moved:
            self.synchronized += 1
            while any(self._queues.values()):
                if not any(self._run_queue(queue) for queue in self._queues):
                    raise AssertionError("the fake's queues wait for one another for ever")
            self._moved.notify_all()

    # -- the drive --------------------------------------------------------------------------------------------------

    def step(self, queue: str = COMPUTING) -> bool:
        """Do the next thing in a queue, if its events allow; returns whether anything was done."""
        with self._moved:
            items = self._queues[queue]
            if not items:
                return False
            item = items[0]
            if isinstance(item, _Wait):
                if not item.event.passed():
                    return False
                items.popleft()
            else:
                items.popleft()
                if isinstance(item, QueueEvent):
                    item.mark()
                else:
                    item()
            self._moved.notify_all()
            return True

    def step_lane(self, lane: int = 0) -> bool:
        """`step` for a lane of copies."""
        return self.step(_lane(lane))

    def run(self) -> None:
        """Move everything that can move."""
        with self._moved:
            while sum(self._run_queue(queue) for queue in self._queues):
                pass

    def run_until(self, event: QueueEvent) -> None:
        """Move as little as lets the event pass; fails where that cannot be."""
        with self._moved:
            if self.drive is Drive.MANUAL:
                if not self._moved.wait_for(event.passed, PATIENCE_S):
                    raise TimeoutError("nobody moved the fake's queues")
                return
            while not event.passed():
                self._advance(event, set())

    def _advance(self, event: DeviceEvent, seen: set[int]) -> None:
        """One step towards an event: in its own queue, or in the queue of what that one waits for."""
        if not isinstance(event, QueueEvent):
            event.wait()
            return
        if id(event) in seen:
            raise AssertionError("the fake's queues wait for one another for ever")
        items = self._queues[event.queue]
        if not items:
            raise AssertionError("an event is waited for that was never enqueued")
        if not self.step(event.queue):
            head = items[0]
            assert isinstance(head, _Wait)
            self._advance(head.event, seen | {id(event)})

    def _drift(self) -> None:
        if self.drive is Drive.EAGER:
            self.run()
        elif self.drive is Drive.COPIES_FIRST:
            while sum(self._run_queue(queue) for queue in self._queues if queue != COMPUTING):
                pass
        elif self.drive is Drive.COMPUTING_FIRST:
            self._run_queue(COMPUTING)
        elif self.drive is Drive.RANDOM:
            for _ in range(self._random.randrange(4)):
                self.step(self._random.choice(list(self._queues)))

    def _run_queue(self, queue: str) -> bool:
        moved = False
        while self.step(queue):
            moved = True
        return moved

    def _add(self, queue: str, *items: _Item) -> None:
        self._queues[queue].extend(items)

    def _move(self, parts: Sequence[CopyPart]) -> None:
        with torch.inference_mode():
            for part in parts:
                part.target.copy_(part.source)
                self.bytes_copied += part.source.numel()

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.numel()
        return any(start <= first and last <= start + length for start, length in self._pinned)


class _FakeMemory(TensorMemory):
    """Tells the device when it is closed."""

    def __init__(self, device: FakeAccelerator, tensor: torch.Tensor) -> None:
        super().__init__(tensor)
        self._device = device
        self._closed = False

    def close(self) -> None:
        """Give back; a second call does nothing."""
        super().close()
        if not self._closed:
            self._closed = True
            self._device.give_back(self.size_bytes)


def _lane(number: int) -> str:
    return f"copies {number}"


def _fill(target: torch.Tensor, value: int) -> None:
    with torch.inference_mode():
        target.fill_(value)
