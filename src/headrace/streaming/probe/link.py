"""Measure an accelerator through the device seam: its link to the host, its memory, its arithmetic, its overheads.

Nothing is timed by when a call returns: copies by their own begin and end, products by events of the computation around
them, and what the host's clock times (small copies, ordinary memory, launches) ends with a wait for the device.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import NamedTuple

import torch

from headrace.dtypes import DTYPES, Dtype
from headrace.machine.compute_curve import Arithmetic, ComputeCurve, CurvePoint
from headrace.machine.machine import Copies, Processor
from headrace.machine.measured import measured_accelerator
from headrace.machine.quantity import Quantity
from headrace.model.layout import align_device
from headrace.streaming.arena import Arena
from headrace.streaming.device import Copied, CopyPart, Device, DeviceMemory
from headrace.streaming.probe.progress import Progress, unheard
from headrace.streaming.probe.sizes import ProbeSizes
from headrace.streaming.torch_dtypes import TORCH_DTYPES

SMALL_COPY_BYTES = 4096
SMALL_KERNEL_BYTES = 256
TOKENS_BESIDE = 16
"""of the products that go on beside a copy: few enough that weights come at the memory's rate"""
SLOWEST_PRODUCT_S = 0.1
"""a curve ends with the first product that takes longer; beyond it time is proportional to tokens anyway"""
KERNELS_PER_LAYER = 40
"""A decoder layer enqueues about so many where none are fused: seven products, and around them norms, rotary positions,
keys and values joining the others, attention, the activation, sums. The curves of arithmetic hold the products alone; a
small kernel lasts about as long as the host takes to launch it, so all launches together are added to the products."""
CALLS_MAX = 20_000
"""products enqueued in one go"""
_SHORTEST_S = 1e-9

Multiply = Callable[[], None]
"""Enqueue one product with the weight matrix whose turn it is."""


ARITHMETIC = sorted(DTYPES.values(), key=lambda dtype: dtype.size_bytes)


class _Rates(NamedTuple):
    """What copies between host and device were seen to do."""

    to_device_bytes_per_s: float
    pageable_bytes_per_s: float
    pageable_back_bytes_per_s: float
    latency_s: float


def probe_accelerator(
    device: Device,
    *,
    name: str,
    sizes: ProbeSizes | None = None,
    compute_dtypes: Collection[str] = tuple(DTYPES),
    progress: Progress = unheard,
) -> Processor:
    """Measure one accelerator, in some seconds; every figure is a median after a warm-up.

    `name` is its maker's; `compute_dtypes` are those whose arithmetic is timed. Takes `ProbeSizes.device_bytes` there
    and twice `size_bytes` of host memory meanwhile, half of it page-locked; less where little is free. Raises
    BudgetError where too little is, ValueError for a device whose memory is the host's.
    """
    memory = device.memory()
    if memory is None or device.uses_host_memory:
        raise ValueError(f"{device.name} has no memory of its own, nor a link to it")
    sizes = (sizes or ProbeSizes()).within(memory.free_bytes)
    try:
        with torch.inference_mode():
            return _measure(device, name, memory, sizes, compute_dtypes, progress)
    finally:
        torch.cuda.empty_cache()  # else torch keeps what was taken; does nothing where CUDA is not in use


def _measure(
    device: Device,
    name: str,
    memory: DeviceMemory,
    sizes: ProbeSizes,
    compute_dtypes: Collection[str],
    progress: Progress,
) -> Processor:
    with ExitStack() as held:
        taken = device.allocate(sizes.device_bytes)
        held.callback(taken.close)
        locked = device.allocate_host(sizes.size_bytes)
        held.callback(locked.close)
        ordinary = Arena(sizes.size_bytes)
        held.callback(ordinary.close)
        held.callback(device.synchronize)  # first of all, should anything below fail with a copy on its way
        ordinary.touch()
        space = taken.take(sizes.device_bytes).tensor
        target, rest = space[: sizes.size_bytes], space[align_device(sizes.size_bytes) :]
        source = locked.take(sizes.size_bytes).tensor

        progress(f"{device.name}: clocks", 0.0)
        few = _Products(rest, ARITHMETIC[0], sizes).of(_tokens_beside(sizes))
        _warm_up(device, few, sizes)
        progress(f"{device.name}: copies", 0.1)
        link = _link(device, target, source if locked.pinned else None, ordinary.take(sizes.size_bytes).tensor, sizes)
        progress(f"{device.name}: copies and arithmetic at once", 0.3)
        while_computing = link.to_device_bytes_per_s
        if locked.pinned:
            copy_s = sizes.size_bytes / link.to_device_bytes_per_s
            while_computing = _while_computing(device, CopyPart(source, target), few, sizes, copy_s=copy_s)
        progress(f"{device.name}: memory and launches", 0.4)
        memory_bytes_per_s = _memory_rate(device, target, rest[: sizes.size_bytes], sizes)
        launch_s = _launch_s(device, space[:SMALL_KERNEL_BYTES], sizes)
        curves = []
        timed = [dtype for dtype in ARITHMETIC if dtype.name in compute_dtypes]
        for number, dtype in enumerate(timed):
            progress(f"{device.name}: arithmetic in {dtype.name}", 0.5 + 0.5 * number / len(timed))
            curves.append(_curve(device, rest, dtype, sizes))
    rows, columns = sizes.shape
    median = f"median of {sizes.repetitions}"
    products = (
        f"measured: torch {torch.__version__}, {rows} x {columns} weights, several in turn, {median}; "
        f"precision of float32: {torch.get_float32_matmul_precision()}"
    )
    measured = Arithmetic(
        curves=tuple(curves),
        block_overhead_s=Quantity.about(
            KERNELS_PER_LAYER * launch_s,
            f"{KERNELS_PER_LAYER} small kernels; measured: {sizes.launches} additions to {SMALL_KERNEL_BYTES} bytes",
            share=0.5,
        ),
        source=products,
    )
    return measured_accelerator(
        name=name,
        device=device.name,
        memory_bytes=memory.total_bytes,
        free_bytes=memory.free_bytes,
        copied_bytes_per_s=memory_bytes_per_s,
        arithmetic=measured,
        copies=_copies(link, while_computing, sizes, page_locked=locked.pinned),
    )


def _copies(link: _Rates, while_computing_bytes_per_s: float, sizes: ProbeSizes, *, page_locked: bool) -> Copies:
    median = f"median of {sizes.repetitions}"
    locked = "" if page_locked else "; the system locks no pages, so copies are from pageable memory, none in products"
    source = f"measured: copies of {sizes.size_bytes} bytes, {median}{locked}"
    few = f"products of {_tokens_beside(sizes)} tokens in {ARITHMETIC[0].name}"
    return Copies(
        bytes_per_s=Quantity.about(link.to_device_bytes_per_s, source, share=0.1),
        while_computing_bytes_per_s=Quantity.about(
            while_computing_bytes_per_s, f"measured: during {few}, {median}", share=0.1
        ),
        pageable_bytes_per_s=Quantity.about(link.pageable_bytes_per_s, source, share=0.1),
        pageable_back_bytes_per_s=Quantity.about(link.pageable_back_bytes_per_s, source, share=0.1),
        latency_s=Quantity.about(
            link.latency_s, f"measured: copies of {SMALL_COPY_BYTES} bytes, until the host knows", share=0.5
        ),
        page_locked=page_locked,
    )


# -- products ---------------------------------------------------------------------------------------------------------


class _Products:
    """Matrix products with several weight matrices in turn, so that no cache of the device holds them.

    The numbers are random, since a device draws less power, and so clocks higher, where it multiplies zeros.
    """

    def __init__(self, space: torch.Tensor, dtype: Dtype, sizes: ProbeSizes) -> None:
        self._dtype = TORCH_DTYPES[dtype.name]
        self._space = space
        self._out_features, self._in_features = sizes.shape
        self._taken_bytes = 0
        weights = [self._matrix(*sizes.shape) for _ in range(sizes.matrices(self._dtype.itemsize))]
        for weight in weights:
            weight.normal_(std=0.02)
        self._turns = itertools.cycle([weight.t() for weight in weights])
        self._weights_bytes = self._taken_bytes

    def of(self, tokens: int) -> Multiply:
        """The product with so many tokens; ends the one before, whose place it takes."""
        self._taken_bytes = self._weights_bytes
        rows, results = self._matrix(tokens, self._in_features), self._matrix(tokens, self._out_features)
        rows.normal_()

        def multiply() -> None:
            torch.mm(rows, next(self._turns), out=results)

        return multiply

    def _matrix(self, rows: int, columns: int) -> torch.Tensor:
        start, size_bytes = self._taken_bytes, rows * columns * self._dtype.itemsize
        self._taken_bytes += align_device(size_bytes)
        return self._space[start : start + size_bytes].view(self._dtype).view(rows, columns)


def _tokens_beside(sizes: ProbeSizes) -> int:
    return max((tokens for tokens in sizes.tokens if tokens <= TOKENS_BESIDE), default=sizes.tokens[0])


def _warm_up(device: Device, multiply: Multiply, sizes: ProbeSizes) -> None:
    deadline = time.perf_counter() + sizes.warm_up_s
    while time.perf_counter() < deadline:
        multiply()
        device.synchronize()


def _curve(device: Device, space: torch.Tensor, dtype: Dtype, sizes: ProbeSizes) -> ComputeCurve:
    products, points = _Products(space, dtype, sizes), []
    for tokens in sizes.tokens:
        multiply = products.of(tokens)
        multiply()  # the library chooses a kernel and loads it
        calls = _calls(sizes.batch_s, _computing_s(device, multiply, 1))
        seconds = _median([_computing_s(device, multiply, calls) for _ in range(sizes.repetitions)]) / calls
        points.append(CurvePoint(tokens, seconds / (sizes.shape[0] * sizes.shape[1])))
        if seconds > SLOWEST_PRODUCT_S:
            break
    return ComputeCurve(compute_dtype=dtype.name, stored_dtype=dtype.stored_name, points=tuple(points))


def _calls(wanted_s: float, each_s: float) -> int:
    return min(max(1, math.ceil(wanted_s / each_s)), CALLS_MAX)


def _computing_s(device: Device, enqueue: Callable[[], object], calls: int) -> float:
    """Seconds that the device takes for `calls` computations in a row, by events before and after them."""
    began = device.computed()
    for _ in range(calls):
        enqueue()
    ended = device.computed()
    ended.wait()
    return max(_SHORTEST_S, ended.moment_s() - began.moment_s())


# -- copies -----------------------------------------------------------------------------------------------------------


def _link(
    device: Device, target: torch.Tensor, pinned: torch.Tensor | None, pageable: torch.Tensor, sizes: ProbeSizes
) -> _Rates:
    """Time large copies both ways and small ones; where nothing is page-locked, ordinary memory stands in for it."""

    def repeated(seconds: Callable[[], float], repetitions: int = sizes.repetitions) -> float:
        seconds()
        return _median([seconds() for _ in range(repetitions)])

    pageable_to = sizes.size_bytes / repeated(lambda: _blocking_s(device, pageable, target))
    pageable_from = sizes.size_bytes / repeated(lambda: _blocking_s(device, target, pageable))
    small = 10 * sizes.repetitions
    if pinned is None:
        latency_s = repeated(lambda: _blocking_s(device, pageable[:SMALL_COPY_BYTES], target[:SMALL_COPY_BYTES]), small)
        return _Rates(pageable_to, pageable_to, pageable_from, latency_s)
    up, little = CopyPart(pinned, target), CopyPart(pinned[:SMALL_COPY_BYTES], target[:SMALL_COPY_BYTES])
    return _Rates(
        to_device_bytes_per_s=sizes.size_bytes / repeated(lambda: _copying_s(device, up)),
        pageable_bytes_per_s=pageable_to,
        pageable_back_bytes_per_s=pageable_from,
        latency_s=repeated(lambda: _waiting_s(device, little), small),
    )


def _copying_s(device: Device, part: CopyPart) -> float:
    return _seconds_of(device.copy([part]))


def _seconds_of(copied: Copied) -> float:
    """Wait for a copy's end; seconds from its first byte to its last, on the device's clock."""
    copied.end.wait()
    return max(_SHORTEST_S, copied.end.moment_s() - copied.begin.moment_s())


def _waiting_s(device: Device, part: CopyPart) -> float:
    """Seconds from the call that starts a copy until the host knows that it is done."""
    started = time.perf_counter()
    device.copy([part]).end.wait()
    return time.perf_counter() - started


def _blocking_s(device: Device, source: torch.Tensor, target: torch.Tensor) -> float:
    """Seconds of a copy from or to ordinary memory, in the way of torch, until the device is done."""
    device.synchronize()
    started = time.perf_counter()
    target.copy_(source)
    device.synchronize()
    return max(_SHORTEST_S, time.perf_counter() - started)


def _while_computing(device: Device, part: CopyPart, multiply: Multiply, sizes: ProbeSizes, *, copy_s: float) -> float:
    """Bytes per second of a copy within products that last longer."""
    calls = _calls(copy_s, _computing_s(device, multiply, 32) / 32)
    copying = []
    for _ in range(sizes.repetitions + 1):
        copied = device.copy([part])
        for _ in range(calls + calls // 2 + 1):
            multiply()
        copying.append(_seconds_of(copied))
        device.synchronize()
    return sizes.size_bytes / _median(copying[1:])  # the first round warms up


# -- memory and launches ----------------------------------------------------------------------------------------------


def _memory_rate(device: Device, target: torch.Tensor, source: torch.Tensor, sizes: ProbeSizes) -> float:
    """Bytes per second read plus written, copying within the device."""

    def copy() -> None:
        target.copy_(source)

    copy()
    calls = _calls(sizes.batch_s, _computing_s(device, copy, 1))
    seconds = _median([_computing_s(device, copy, calls) for _ in range(sizes.repetitions)]) / calls
    return 2 * sizes.size_bytes / seconds


def _launch_s(device: Device, space: torch.Tensor, sizes: ProbeSizes) -> float:
    """Host seconds of one small kernel, enqueued from Python."""
    small = space.view(torch.float32).zero_()
    enqueue_s = []
    for _ in range(sizes.repetitions + 1):
        device.synchronize()
        started = time.perf_counter()
        for _ in range(sizes.launches):
            small.add_(1.0)
        enqueue_s.append((time.perf_counter() - started) / sizes.launches)
    return _median(enqueue_s[1:])  # the first round warms up


def _median(values: list[float]) -> float:
    return statistics.median(values)
