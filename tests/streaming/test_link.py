"""The probe of accelerators: figures that follow from what a device does, on devices whose clocks a test knows.

`ClockedAccelerator` says how long everything took, to the digit; `FakeAccelerator` moves its queues in bad orders.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from headrace.errors import BudgetError
from headrace.machine.machine import Copies, Processor
from headrace.machine.machine_file import machine_from_toml, machine_to_toml
from headrace.model.layout import PAGE_BYTES
from headrace.streaming.arena import TensorMemory
from headrace.streaming.device import Copied, CopyPart, CpuDevice, DeviceEvent
from headrace.streaming.fakes.accelerator import Drive, FakeAccelerator
from headrace.streaming.probe import link
from headrace.streaming.probe.link import probe_accelerator
from headrace.streaming.probe.progress import part_of
from headrace.streaming.probe.sizes import ProbeSizes
from measured_machines import computer

SMALL = ProbeSizes(
    size_bytes=4 * PAGE_BYTES,
    shape=(130, 50),
    tokens=(1, 3, 16, 17),
    rotated_bytes=100_000,
    repetitions=3,
    batch_s=0.0002,
    launches=10,
    warm_up_s=0.0,
)
ELEMENTS = 130 * 50


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Threads that spin for tiny products would only slow each other."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


def copies_of(probed: Processor) -> Copies:
    assert probed.copies is not None
    return probed.copies


class BothWays(FakeAccelerator):
    """The fake, stricter: a copy has one side here and one on the host, which must be page-locked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.own: list[torch.Tensor] = []

    def allocate(self, size_bytes: int) -> TensorMemory:
        memory = super().allocate(size_bytes)
        assert memory._tensor is not None
        self.own.append(memory._tensor)
        return memory

    def lies_here(self, tensor: torch.Tensor) -> bool:
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.numel()
        return any(own.data_ptr() <= first and last <= own.data_ptr() + own.numel() for own in self.own)

    def copy(self, parts: Sequence[CopyPart], *, after: Sequence[DeviceEvent] = (), lane: int = 0) -> Copied:
        for part in parts:
            on_host = [tensor for tensor in part if not self.lies_here(tensor)]
            assert len(on_host) == 1
            assert self._is_pinned(on_host[0])
        return super().copy(parts, after=after, lane=lane)


# -- what it costs and leaves behind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("drive", [drive for drive in Drive if drive is not Drive.MANUAL])
def test_a_probe_on_queues_in_any_order(drive: Drive) -> None:
    device = BothWays(memory_bytes=1 << 30, drive=drive)
    held = device.allocate(1 << 20)
    shares: list[tuple[str, float]] = []
    probed = probe_accelerator(device, name="NVIDIA H200", sizes=SMALL, progress=lambda *said: shares.append(said))
    assert (probed.name, probed.device) == ("NVIDIA H200", "fake:0")
    assert (probed.memory_bytes, probed.free_bytes) == (1 << 30, (1 << 30) - (1 << 20))
    assert [(curve.compute_dtype, curve.stored_dtype) for curve in probed.arithmetic.curves] == [
        ("bfloat16", "BF16"),
        ("float16", "F16"),
        ("float32", "F32"),
    ]
    assert all(tuple(point.tokens for point in curve.points) == SMALL.tokens for curve in probed.arithmetic.curves)
    assert copies_of(probed).latency_s.expected > 0
    assert 0 < probed.arithmetic.block_overhead_s.expected < link.KERNELS_PER_LAYER
    machine = computer(probed.arithmetic.curves, probed)
    assert machine_from_toml(machine_to_toml(machine), origin="x") == machine
    told = [share for _, share in shares]
    assert told == sorted(told)
    assert 0 == told[0] <= told[-1] < 1
    assert all(what.startswith("fake:0: ") for what, _ in shares)
    # Nothing stays behind, nothing was given back in use.
    assert device.held_bytes() == held.size_bytes
    assert device._pinned == []
    assert device.violations == []
    assert device.peak_bytes() == held.size_bytes + SMALL.device_bytes


def test_where_nothing_can_be_page_locked_ordinary_memory_stands_in() -> None:
    device = BothWays(pinnable_bytes=0, drive=Drive.EAGER)
    probed = probe_accelerator(device, name="x", sizes=SMALL)
    assert device.copies == 0
    copies = copies_of(probed)
    assert not copies.page_locked
    assert copies.bytes_per_s == copies.pageable_bytes_per_s
    assert copies.while_computing_bytes_per_s.expected == copies.pageable_bytes_per_s.expected
    assert "locks no pages" in copies.bytes_per_s.source


@pytest.mark.parametrize("number", [0, 8, 37])
def test_a_driver_that_fails_leaves_nothing_held(number: int) -> None:
    device = BothWays(drive=Drive.LAZY, fail_at_copy=number)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        probe_accelerator(device, name="x", sizes=SMALL)
    assert (device.held_bytes(), device._pinned, device.violations) == (0, [], [])


def test_the_processor_itself_has_no_link() -> None:
    with pytest.raises(ValueError, match="cpu has no memory of its own"):
        probe_accelerator(CpuDevice(), name="x", sizes=SMALL)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_the_sizes_of_a_gpu() -> None:
    sizes = ProbeSizes()
    assert sizes.tokens[0] == 1
    assert sizes.tokens[-1] == 16384
    assert sizes.device_bytes < 2.5e9
    assert sizes.matrices(2) * 14336 * 4096 * 2 >= sizes.rotated_bytes


LEAST_BYTES = 120e6
"""with so much free an accelerator can be measured"""


@given(st.integers(int(LEAST_BYTES), 1 << 36))
def test_no_more_than_half_of_what_is_free_is_taken(free_bytes: int) -> None:
    sizes = ProbeSizes().within(free_bytes)
    assert sizes.device_bytes * 2 <= free_bytes
    assert sizes.device_bytes * 10 >= min(free_bytes, 5e9)
    assert sizes.size_bytes % PAGE_BYTES == 0


@given(st.integers(0, 1 << 36))
def test_too_little_memory_is_refused_with_what_would_do(free_bytes: int) -> None:
    try:
        ProbeSizes().within(free_bytes)
    except BudgetError as error:
        required_bytes = error.required_bytes or 0
    else:
        return
    assert free_bytes < required_bytes <= LEAST_BYTES
    assert ProbeSizes().within(required_bytes).device_bytes * 2 <= required_bytes


def test_little_free_memory_means_smaller_sizes_and_too_little_a_refusal() -> None:
    sizes = ProbeSizes(size_bytes=64 * PAGE_BYTES, shape=(512, 256), tokens=(1,), rotated_bytes=1 << 20, repetitions=1)
    device = BothWays(memory_bytes=sizes.device_bytes, drive=Drive.EAGER)
    probed = probe_accelerator(device, name="x", sizes=sizes)
    assert 0 < device.peak_bytes() <= sizes.device_bytes // 2
    assert "256 x 128 weights" in probed.arithmetic.source
    with pytest.raises(BudgetError, match="are free; measuring it needs"):
        probe_accelerator(BothWays(memory_bytes=100_000), name="x", sizes=sizes)


def test_the_progress_of_a_part() -> None:
    told: list[tuple[str, float]] = []
    part = part_of(lambda *said: told.append(said), 0.25, 0.75)
    for share in (0.0, 0.5, 1.0):
        part("x", share)
    assert told == [("x", 0.25), ("x", 0.5), ("x", 0.75)]


# -- figures, by a clock that is known ---------------------------------------------------------------------------------

UP, WITHIN = 1e6, 5e8  # bytes per second
COPYING_BESIDE, COMPUTING_BESIDE = 0.8, 0.5  # of the speed alone
START_S = 1000.0


class Moment:
    """A point in a queue of the clocked device."""

    def __init__(self, device: ClockedAccelerator) -> None:
        self._device = device
        self.at_s: float | None = None

    def wait(self) -> None:
        self._device.play(self)

    def passed(self) -> bool:
        return self.at_s is not None

    def moment_s(self) -> float:
        assert self.at_s is not None, "the time of an event that has not passed"
        return self.at_s


@dataclass
class Work:
    """Seconds that something takes alone; what is left of them."""

    left_s: float


Queue = deque[Moment | Work | tuple[Moment]]  # the tuple waits


class ClockedAccelerator(BothWays):
    """One queue that computes, one that copies, each slower while the other works; bytes are not moved at all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.now_s = START_S
        self.computing: Queue = deque()
        self.copying: Queue = deque()
        self.weights: list[torch.Tensor] = []

    def copy(self, parts: Sequence[CopyPart], *, after: Sequence[DeviceEvent] = (), lane: int = 0) -> Copied:
        (part,) = parts
        begin, end = Moment(self), Moment(self)
        assert self.lies_here(part.target)
        for event in after:
            assert isinstance(event, Moment)
            self.copying.append((event,))
        self.copying += [begin, Work(part.source.numel() / UP), end]
        return Copied(begin, end)

    def multiply(self, rows: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """Stand in for torch.mm: takes `product_s`."""
        assert (rows.shape[0], weight.shape[1]) == out.shape
        self.weights.append(weight)
        self.computing.append(Work(product_s(rows.shape[0], rows.dtype.itemsize)))
        return out

    def compute_after(self, event: DeviceEvent) -> None:
        assert isinstance(event, Moment)
        self.computing.append((event,))

    def computed(self) -> Any:
        self.computing.append(Moment(self))
        return self.computing[-1]

    def synchronize(self) -> None:
        self.play()

    def play(self, until: Moment | None = None) -> None:
        """Let both queues go on until a point is passed, or run out."""
        while self.computing or self.copying:
            while self._pass(self.computing) | self._pass(self.copying):
                pass
            if until is not None and until.passed():
                return
            both = [queue[0] if queue else None for queue in (self.computing, self.copying)]
            speeds = (COMPUTING_BESIDE, COPYING_BESIDE) if all(isinstance(head, Work) for head in both) else (1.0, 1.0)
            busy = [(head, speed) for head, speed in zip(both, speeds, strict=True) if isinstance(head, Work)]
            if not busy:
                assert not self.computing
                assert not self.copying
                return
            step_s = min(work.left_s / speed for work, speed in busy)
            self.now_s += step_s
            for work, speed in busy:
                work.left_s -= step_s * speed

    def _pass(self, queue: Queue) -> bool:
        head = queue[0] if queue else None
        if isinstance(head, Moment):
            head.at_s = self.now_s
        elif not (isinstance(head, Work) and head.left_s < 1e-12) and not (
            isinstance(head, tuple) and head[0].passed()
        ):
            return False
        queue.popleft()
        return True


def product_s(tokens: int, element_bytes: int) -> float:
    """Seconds of a product of the clocked device: the same up to 4 tokens, then in proportion."""
    return element_bytes * 1e-4 * max(1.0, tokens / 4)


class OnTheClock(TorchFunctionMode):
    """What torch is asked to compute on the clocked device takes that device's time, and is not done."""

    def __init__(self, device: ClockedAccelerator) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.mm:
            return self._device.multiply(*args, **kwargs)
        if func is torch.Tensor.copy_ and all(map(self._device.lies_here, args)):
            self._device.computing.append(Work(2 * args[0].numel() / WITHIN))
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def clocked() -> Iterator[ClockedAccelerator]:
    device = ClockedAccelerator()
    with OnTheClock(device):
        yield device


def test_every_figure_is_what_the_clock_says(clocked: ClockedAccelerator) -> None:
    probed = probe_accelerator(clocked, name="x", sizes=SMALL)
    assert copies_of(probed).bytes_per_s.expected == pytest.approx(UP)
    assert probed.memory_bytes_per_s.expected == pytest.approx(WITHIN)
    for curve, element_bytes in zip(probed.arithmetic.curves, (2, 2, 4), strict=True):
        for point in curve.points:
            assert point.seconds_per_parameter == pytest.approx(product_s(point.tokens, element_bytes) / ELEMENTS)


def test_copying_and_computing_at_once_are_seen_whole(clocked: ClockedAccelerator) -> None:
    """Both ratios are exact only where the other work lasts from the first byte to the last, the first product on."""
    probed = probe_accelerator(clocked, name="x", sizes=SMALL)
    assert copies_of(probed).while_computing_bytes_per_s.expected == pytest.approx(UP * COPYING_BESIDE)


@pytest.mark.parametrize("tokens", [(1, 3, 16, 17), (64, 256)])
def test_few_tokens_go_on_beside_a_copy(clocked: ClockedAccelerator, tokens: tuple[int, ...]) -> None:
    sizes = ProbeSizes(**{**vars(SMALL), "tokens": tokens})
    source = copies_of(probe_accelerator(clocked, name="x", sizes=sizes)).while_computing_bytes_per_s.source
    assert f"products of {16 if 16 in tokens else 64} tokens" in source


def test_a_curve_ends_with_the_first_slow_product(clocked: ClockedAccelerator) -> None:
    tokens = (1, 512, 1024, 2048, 4096, 8192)
    probed = probe_accelerator(clocked, name="x", sizes=ProbeSizes(**{**vars(SMALL), "tokens": tokens}))
    for curve, element_bytes in zip(probed.arithmetic.curves, (2, 2, 4), strict=True):
        *before, last = [product_s(point.tokens, element_bytes) for point in curve.points]
        assert max(before) <= link.SLOWEST_PRODUCT_S < last
        assert len(curve.points) < len(tokens)


def test_weights_are_random_and_come_in_turn(clocked: ClockedAccelerator) -> None:
    probe_accelerator(clocked, name="x", sizes=SMALL)
    by_dtype = itertools.groupby(clocked.weights, lambda weight: weight.dtype)
    for _, used in by_dtype:
        assert all(one.data_ptr() != following.data_ptr() for one, following in itertools.pairwise(used))
    places = {(weight.dtype, weight.data_ptr()) for weight in clocked.weights}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        bytes_in_turn = sum(ELEMENTS * dtype.itemsize for seen, _ in places if seen is dtype)
        assert bytes_in_turn >= SMALL.rotated_bytes
    last = clocked.weights[-1].float()
    assert 0.015 < float(last.std()) < 0.025
