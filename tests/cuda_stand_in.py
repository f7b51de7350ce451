"""A stand-in for `torch.cuda` where there is no GPU: streams are queues of the host that run at once, events remember.

It lets `cuda_device.py` run line by line on any machine. What a driver does is for tests/test_gpu.py.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch


class Event:
    """Passed as soon as it is recorded."""

    def __init__(self, *, enable_timing: bool = False, blocking: bool = False) -> None:
        assert enable_timing, "events are made with timing, since moments are read off them"
        assert blocking, "whoever waits sleeps"
        self.recorded_in: Any = None
        self.moment_s = 0.0

    def record(self, stream: Any) -> None:
        self.recorded_in, self.moment_s = stream, time.perf_counter()

    def synchronize(self) -> None:
        assert self.recorded_in is not None

    def query(self) -> bool:
        return self.recorded_in is not None

    def elapsed_time(self, other: Event) -> float:
        return (other.moment_s - self.moment_s) * 1e3


@dataclass(eq=False)
class Stream:
    """Remembers what it was told to wait for."""

    device: torch.device
    waited_for: list[Event] = field(default_factory=list)

    def wait_event(self, event: Event) -> None:
        self.waited_for.append(event)


@dataclass
class Runtime:
    """cudaHostRegister and its inverse."""

    refuses: bool = False
    registered: dict[int, int] = field(default_factory=dict)

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 1
        if self.refuses:
            return 2
        self.registered[address] = size_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


@dataclass
class StandIn:
    """One made-up GPU."""

    runtime: Runtime = field(default_factory=Runtime)
    main: Stream = field(default_factory=lambda: Stream(torch.device("cpu")))
    current: list[Any] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    synchronized: int = 0
    free_bytes: int = 60 << 30
    emptied: int = 0

    def new_stream(self, device: torch.device) -> Stream:
        self.streams.append(Stream(device))
        return self.streams[-1]

    @contextlib.contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()

    def current_stream(self, device: torch.device) -> Stream:
        del device
        return self.current[-1] if self.current else self.main

    def synchronize(self, device: torch.device) -> None:
        del device
        self.synchronized += 1


@dataclass
class Properties:
    """As the driver describes a GPU."""

    name: str = "Made-up 100"
    total_memory: int = 80 << 30
    major: int = 9
    minor: int = 0
    multi_processor_count: int = 132


def install(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Put the stand-in in the place of torch.cuda; tensors stay on the host."""
    made = StandIn()
    cuda = torch.cuda
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda _index: Properties(),
        "mem_get_info": lambda _device=None: (made.free_bytes, 80 << 30),
        "device": lambda _device: contextlib.nullcontext(),
        "Event": Event,
        "Stream": made.new_stream,
        "stream": made.on_stream,
        "current_stream": made.current_stream,
        "synchronize": made.synchronize,
        "cudart": lambda: made.runtime,
        "memory_reserved": lambda _device: 7,
        "max_memory_reserved": lambda _device: 9,
        "reset_peak_memory_stats": lambda _device: None,
        "empty_cache": lambda: setattr(made, "emptied", made.emptied + 1),
    }.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return made
