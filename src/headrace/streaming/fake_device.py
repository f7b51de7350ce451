"""A device with events that complete only when the test says so, for provoking ordering errors without a GPU."""

from __future__ import annotations

import threading

import torch

from headrace.streaming.arena import Arena
from headrace.streaming.device import DeviceEvent


class FakeEvent:
    """An event that a test completes; `wait` blocks until then (and fails after `patience_s`, so no test hangs)."""

    patience_s = 30.0

    def __init__(self) -> None:
        self._done = threading.Event()

    def complete(self) -> None:
        """Let everybody pass who waits."""
        self._done.set()

    def wait(self) -> None:
        """Block until completed."""
        if not self._done.wait(self.patience_s):
            raise TimeoutError("a fake event was never completed")


class FakeDevice:
    """Host memory that behaves like a device whose computation lags behind its calls."""

    name = "fake"
    lands_in_place = True

    def __init__(self) -> None:
        self.events: list[FakeEvent] = []
        """one per `computed` call, in order"""

    def allocate(self, size_bytes: int) -> Arena:
        """Take ordinary memory."""
        return Arena(size_bytes)

    def copy_in(self, host: torch.Tensor, slot: torch.Tensor) -> DeviceEvent:
        """Copy at once, but report completion only when the test completes the event."""
        slot.copy_(host)
        return self.computed()

    def compute_after(self, event: DeviceEvent) -> None:
        """Nothing to enqueue: the fake has no queue of its own."""

    def computed(self) -> DeviceEvent:
        """A new event, not complete yet."""
        event = FakeEvent()
        self.events.append(event)
        return event
