"""The CUDA device's own lines, run on a stand-in for torch.cuda: what waits for what, and in which stream."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from cuda_stand_in import Event, StandIn, install
from headrace.errors import BudgetError, InvalidRequestError
from headrace.streaming import cuda_device
from headrace.streaming.cuda_device import CudaDevice, list_gpus, open_cuda
from headrace.streaming.device import CACHE_LANE, COMPLETE, COPY_LANES, DISK_LANE, STORE_LANE, CopyPart


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return install(monkeypatch)


@pytest.fixture
def device(made: StandIn) -> CudaDevice:
    opened = open_cuda(0)
    assert (opened.name, opened.torch_device) == ("cuda:0", torch.device("cuda", 0))
    opened.torch_device = torch.device("cpu")  # where the stand-in's tensors are
    return opened


def part(value: int = 7, length: int = 8) -> CopyPart:
    return CopyPart(torch.full((length,), value, dtype=torch.uint8), torch.zeros(length, dtype=torch.uint8))


def test_without_cuda_nothing_is_listed_and_opening_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list_gpus() == []
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InvalidRequestError, match="was built without CUDA"):
        open_cuda(None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(InvalidRequestError, match="sees no GPU here"):
        open_cuda(None)


def test_gpus_are_listed_and_numbers_checked(made: StandIn) -> None:
    (gpu,) = list_gpus()
    assert gpu == (0, "Made-up 100", 80 << 30, 60 << 30, "9.0", 132)
    assert open_cuda(None).name == "cuda:0"
    with pytest.raises(
        InvalidRequestError, match=r"--device cuda:3: there is no such GPU; found: cuda:0 \(Made-up 100\)"
    ):
        open_cuda(3)


def test_a_gpu_that_cannot_be_used_is_refused_by_its_own_words(made: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_device: Any) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(
        InvalidRequestError, match=r"cuda:0 cannot be used: .*busy or unavailable; look with nvidia-smi"
    ):
        open_cuda(0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert list_gpus()[0].free_bytes == 0


@pytest.mark.parametrize("lane", [STORE_LANE, DISK_LANE, CACHE_LANE])
def test_a_copy_waits_in_its_own_lane_and_nowhere_else(made: StandIn, device: CudaDevice, lane: int) -> None:
    assert len(made.streams) == COPY_LANES
    before = device.computed()
    assert before.event.recorded_in is made.main
    moved = part()
    copied = device.copy([moved], after=[before, COMPLETE], lane=lane)
    own = made.streams[lane]
    assert own.waited_for == [before.event]
    assert all(stream.waited_for == [] for stream in (*made.streams, made.main) if stream is not own)
    assert copied.begin.event.recorded_in is own  # type: ignore[attr-defined]
    assert copied.end.event.recorded_in is own  # type: ignore[attr-defined]
    assert torch.equal(moved.source, moved.target)
    assert copied.end.passed()
    assert made.synchronized == 1, "only opening the device waited for it"


def test_computing_waits_in_the_current_stream(made: StandIn, device: CudaDevice) -> None:
    copied = device.copy([part()])
    device.compute_after(copied.end)
    assert made.main.waited_for == [copied.end.event]  # type: ignore[attr-defined]
    other = made.new_stream(device.torch_device)
    with made.on_stream(other):
        device.compute_after(copied.end)
        assert device.computed().event.recorded_in is other
    assert len(other.waited_for) == 1
    device.compute_after(COMPLETE)
    assert len(made.main.waited_for) == 1


def test_filling_is_ordered_as_a_copy_is(made: StandIn, device: CudaDevice) -> None:
    target = torch.zeros(4, dtype=torch.uint8)
    before = device.computed()
    filled = device.fill(target, 255, after=[before])
    assert set(target.tolist()) == {255}
    assert made.streams[STORE_LANE].waited_for == [before.event]
    filled.wait()


def test_memory_made_in_inference_mode_can_be_written_to_outside_of_it(made: StandIn, device: CudaDevice) -> None:
    synchronized = made.synchronized
    with torch.inference_mode():
        memory = device.allocate(512)
    assert made.synchronized == synchronized + 1, "kernels enqueued before may still read what the allocator gives"
    piece = memory.take(256)
    device.copy([CopyPart(torch.ones(256, dtype=torch.uint8), piece.tensor)])
    device.fill(piece.tensor, 3)
    assert set(piece.tensor.tolist()) == {3}
    with pytest.raises(TypeError, match="no buffer on the host"):
        _ = piece.buffer
    with pytest.raises(BudgetError, match="512 bytes has 256 left, not 512"):
        memory.take(512)
    with pytest.raises(ValueError, match="multiples of 256"):
        memory.take(100)
    memory.close()
    with pytest.raises(BudgetError):
        memory.take(256)


def test_host_memory_is_registered_and_let_go_of(made: StandIn, device: CudaDevice) -> None:
    arena = device.allocate_host(1 << 20)
    assert arena.pinned
    assert made.runtime.registered == {arena.address: 1 << 20}
    arena.take(4096)
    synchronized = made.synchronized
    arena.close()
    assert made.runtime.registered == {}
    assert made.synchronized == synchronized + 1, "no copy may be under way when pages are let go of"
    arena.close()


def test_host_memory_that_cannot_be_locked_is_ordinary(
    made: StandIn, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.runtime.refuses = True
    arena = device.allocate_host(1 << 20)
    assert not arena.pinned
    arena.close()
    made.runtime.refuses = False
    monkeypatch.setattr(cuda_device, "REGISTERED_MAX_BYTES", 1 << 19)
    assert not device.allocate_host(1 << 20).pinned
    assert device.allocate_host(0).pinned is False


def test_memory_that_the_driver_refuses_is_told_with_what_is_free(
    made: StandIn, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(BudgetError, match=r"cuda:0 refuses 107 GB: 64\.4 GB of 85\.9 GB are free now"):
        device.allocate(100 << 30)


def test_moments_are_on_the_hosts_clock_however_long_ago_the_device_was_opened(
    made: StandIn, device: CudaDevice
) -> None:
    now = time.perf_counter()
    event = device.computed()
    assert abs(event.moment_s() - now) < 5.0
    late = Event(enable_timing=True, blocking=True)
    late.record(made.main)
    late.moment_s += 1000.0
    moment = device._clock.moment_s(late)
    assert abs(moment - (late.moment_s)) < 1.0
    assert device._clock._origin is late, "differences stay short, since the driver gives them as float32"
    assert abs(event.moment_s() - now) < 5.0


def test_the_allocators_figures_are_passed_on(made: StandIn, device: CudaDevice) -> None:
    assert (device.held_bytes(), device.peak_bytes()) == (7, 9)
    assert device.memory() == (60 << 30, 80 << 30)
    device.reset_peak()
    device.release_cached()
    assert made.emptied == 1
    device.reserve(4096)
    device.synchronize()
