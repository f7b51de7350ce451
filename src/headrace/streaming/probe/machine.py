"""Measure this machine: how fast its disk reads past the page cache, how fast it computes with which dtypes.

An accelerator beside it is measured by `accelerator_probe.py`, called from here.

Every figure is the median of a few repetitions; none is taken from a data sheet.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch.nn import functional

from headrace.errors import MachineError
from headrace.machine.compute_curve import Arithmetic, ComputeCurve, CurvePoint
from headrace.machine.machine import Disk, Machine, Processor
from headrace.machine.measured import measured_computer
from headrace.machine.quantity import Quantity
from headrace.model.layout import HOST_ALIGNMENT_BYTES, PAGE_BYTES, ByteRange, align_down, lay_out
from headrace.model.safetensors_index import ShardFile
from headrace.planning.plan import Placement
from headrace.streaming.arena import Arena
from headrace.streaming.device import CpuDevice, Device
from headrace.streaming.devices import maker_name, open_device
from headrace.streaming.pressure import PressureGauge
from headrace.streaming.probe.link import probe_accelerator
from headrace.streaming.probe.progress import Progress, part_of, unheard
from headrace.streaming.source import ByteSource, DirectFiles
from headrace.streaming.stream import Stream, StreamSettings
from headrace.streaming.torch_dtypes import TORCH_DTYPES, described

CURVE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LONG_S = 0.1
PROBE_FILE_BYTES = 512 << 20
COPIED_BYTES = 32 << 20


class ReadSettings(NamedTuple):
    """How to read: the chunk of one read call, the number of threads, and the rate that this gave."""

    chunk_bytes: int
    threads: int
    bytes_per_s: float


def compute_curve(
    stored: torch.dtype,
    compute: torch.dtype,
    *,
    shape: tuple[int, int],
    tokens: Sequence[int] = CURVE_TOKENS,
    repetitions: int = 3,
) -> ComputeCurve:
    """Time `x @ w.T` with weights of `shape` (out, in), widened first where the dtypes differ.

    Two matrices of the shape are used in turn, so that small ones are not simply found in the cache. All numbers of
    tokens have their turn in each round, after one to warm up: what others take for a moment then spoils one
    repetition of several, not all of one. A product that takes LONG_S and more is a mean already, and is timed once.
    Seconds per element of the weights.
    """
    weights = itertools.cycle([torch.randn(shape).to(stored) for _ in range(2)])
    widened = torch.empty(shape, dtype=compute)
    seconds: dict[int, list[float]] = {count: [] for count in tokens}
    with torch.inference_mode():
        rows = {count: torch.randn(count, shape[1]).to(compute) for count in tokens}
        for _ in range(1 + repetitions):
            for count in tokens:
                if len(seconds[count]) > 1 and min(seconds[count]) >= LONG_S:
                    continue
                weight = next(weights)
                start = time.perf_counter()
                functional.linear(rows[count], widened.copy_(weight) if stored is not compute else weight)
                seconds[count].append(time.perf_counter() - start)
    points = [
        CurvePoint(count, statistics.median(timed[1:]) / (shape[0] * shape[1])) for count, timed in seconds.items()
    ]
    return ComputeCurve(
        compute_dtype=described(compute).name, stored_dtype=described(stored).stored_name, points=tuple(points)
    )


def products_need_alignment(dtype: torch.dtype) -> bool:
    """Whether this processor's matrix products change a bit when the weights do not begin at a multiple of 64 bytes.

    Tensors of a checkpoint seldom do. Tried on a few shapes and numbers of tokens; where it shows, weights are copied
    to an aligned place before they are used.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for out_features, in_features in ((64, 64), (192, 576), (512, 320)):
            weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
            memory = torch.empty(weight.numel() * dtype.itemsize + 256, dtype=torch.uint8)
            base = -memory.data_ptr() % HOST_ALIGNMENT_BYTES
            for offset in (8, 24, 40):
                moved = memory[base + offset : base + offset + weight.numel() * dtype.itemsize]
                moved = moved.view(dtype).view(weight.shape).copy_(weight)
                for tokens in (1, 3, 33):
                    rows = torch.randn(tokens, in_features, generator=generator).to(dtype)
                    if not torch.equal(functional.linear(rows, weight), functional.linear(rows, moved)):
                        return True
    return False


def read_rate(
    source: ByteSource,
    files: Sequence[ShardFile],
    *,
    chunk_bytes: int,
    threads: int,
    seconds: float,
    while_doing: Callable[[], None] | None = None,
) -> float:
    """Bytes per second of direct reads spread over the files, for about `seconds`; 0 where there is nothing to read.

    `while_doing` is called again and again in this thread meanwhile.
    """
    chunks = list(_chunks(files, chunk_bytes))
    if not chunks:
        return 0.0
    arena = Arena(threads * chunk_bytes)
    pieces = [arena.take(chunk_bytes) for _ in range(threads)]
    lock = threading.Lock()
    state = {"next": 0, "bytes": 0}
    failures: list[BaseException] = []
    started = time.perf_counter()
    deadline = started + seconds

    def work(number: int) -> None:
        while time.perf_counter() < deadline and not failures:
            with lock:
                file_index, offset, length = chunks[state["next"] % len(chunks)]
                state["next"] += 1
            try:
                count = source.read_into(file_index, offset, pieces[number].buffer[:length])
            except BaseException as error:
                failures.append(error)
                return
            with lock:
                state["bytes"] += count

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(threads)]
    for worker in workers:
        worker.start()
    while while_doing is not None and any(worker.is_alive() for worker in workers):
        while_doing()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - started
    arena.close()
    if failures:
        raise failures[0]
    return state["bytes"] / elapsed


def median_read_rate(
    source: ByteSource, files: Sequence[ShardFile], *, chunk_bytes: int, threads: int, seconds: float
) -> float:
    """The median of three reads of a third of `seconds` each: one that others held up does not count."""
    return statistics.median(
        read_rate(source, files, chunk_bytes=chunk_bytes, threads=threads, seconds=seconds / 3) for _ in range(3)
    )


def _chunks(files: Sequence[ShardFile], chunk_bytes: int) -> Iterator[tuple[int, int, int]]:
    for index, file in enumerate(files):
        whole = align_down(file.size_bytes)
        for offset in range(0, whole, chunk_bytes):
            yield index, offset, min(chunk_bytes, whole - offset)


def best_read_settings(source: ByteSource, files: Sequence[ShardFile], *, seconds: float = 2.0) -> ReadSettings:
    """Try a few chunk sizes and numbers of threads in turn, three rounds, and take the best median."""
    options = [(chunk, threads) for chunk in (2 << 20, 8 << 20) for threads in (1, 2, 4)]
    rates: dict[tuple[int, int], list[float]] = {option: [] for option in options}
    each = seconds / (3 * len(options))
    for _ in range(3):
        for chunk_bytes, threads in options:
            rate = read_rate(source, files, chunk_bytes=chunk_bytes, threads=threads, seconds=each)
            rates[chunk_bytes, threads].append(rate)
    best = max(options, key=lambda option: statistics.median(rates[option]))
    return ReadSettings(best[0], best[1], statistics.median(rates[best]))


@contextmanager
def _probe_file(directory: Path) -> Iterator[ShardFile]:
    """A file of random bytes on the disk in question, removed afterwards."""
    try:
        handle = tempfile.NamedTemporaryFile(dir=directory, prefix=".headrace-probe-")  # noqa: SIM115
    except OSError as error:
        raise MachineError(f"{directory} cannot be written to, which measuring its disk needs: {error}") from error
    with handle as file:
        block = os.urandom(8 << 20)
        try:
            for _ in range(PROBE_FILE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise MachineError(f"{directory} has no room for a file of {PROBE_FILE_BYTES} bytes: {error}") from error
        status = os.fstat(file.fileno())
        yield ShardFile(Path(file.name), status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


def probe_machine(directory: Path, *, device: str | Device = "auto", progress: Progress = unheard) -> Machine:
    """Measure disk, arithmetic and how much they slow each other, in about twenty seconds.

    Before that an accelerator, where there is one, in some ten more. `device` is what `open_device` takes: auto, cpu,
    cuda or cuda:N. Where other work went on meanwhile, a note says so and the machine is `busy`. Raises
    InvalidRequestError for a device that is not there, before anything is measured; BudgetError where too little of its
    memory is free; MachineError where the directory's disk cannot be written to.
    """
    opened = open_device(device)
    gauge = PressureGauge()
    if opened.uses_host_memory:
        machine = _probe_host(directory, (), progress)
    else:
        accelerator = probe_accelerator(opened, name=maker_name(opened), progress=part_of(progress, 0.0, 0.3))
        machine = _probe_host(directory, (accelerator,), part_of(progress, 0.3, 1.0))
    pressure = gauge.pressure()
    progress("done", 1.0)
    return replace(machine, notes=(*machine.notes, *pressure.notes()), busy=round(pressure.busy, 3))


def _probe_host(directory: Path, accelerators: Sequence[Processor], progress: Progress) -> Machine:
    """Measure the computer around its accelerators, which were measured before."""
    progress(f"writing a file of {PROBE_FILE_BYTES >> 20} MiB to {directory}", 0.0)
    with _probe_file(directory) as file:
        source = DirectFiles([file])
        direct = source.direct[0]
        try:
            progress("disk", 0.15)
            settings = best_read_settings(source, [file], seconds=4.0)
            progress("disk and arithmetic at once", 0.4)
            product = product_of(torch.float32, torch.float32, shape=(4096, 2048), tokens=8)
            slowdowns = contention(source, [file], settings, product)
        finally:
            source.close()
    curves = []
    pairs = [
        (stored, compute)
        for stored in sorted(TORCH_DTYPES.values(), key=lambda dtype: dtype.itemsize)
        for compute in dict.fromkeys((stored, torch.float32))
    ]
    for number, (stored, compute) in enumerate(pairs):
        progress(
            f"arithmetic, {described(stored).name} weights in {described(compute).name}",
            0.5 + 0.5 * number / len(pairs),
        )
        curves.append(compute_curve(stored, compute, shape=(4096, 2048)))
    how = "direct reads" if direct else "buffered reads (the file system refuses direct ones), dropped from the cache"
    beside = "measured: reading and a product at once against each alone"
    return measured_computer(
        name=platform.node() or "this machine",
        memory_bytes=int(psutil.virtual_memory().total),
        copied_bytes_per_s=2 * memory_copy_rate(),
        arithmetic=Arithmetic(
            curves=tuple(curves),
            slowdown_while_reading=Quantity.of(slowdowns.compute, beside),
            slowdown_of_reading=Quantity.of(slowdowns.read, beside),
            source=f"measured: torch {torch.__version__}, {torch.get_num_threads()} threads, 4096 x 2048 weights",
        ),
        disk=Disk(
            bytes_per_s=Quantity.about(
                settings.bytes_per_s,
                f"measured: {how} of a fresh file in {directory}, best of six, median of three",
                share=0.25,
            ),
            latency_s=Quantity.of(0.0, "part of the measured rate"),
            chunk_bytes=settings.chunk_bytes,
            threads=settings.threads,
        ),
        accelerators=accelerators,
    )


def memory_copy_rate() -> float:
    """Bytes per second of copies within host memory, each byte counted once."""
    arena = Arena(2 * COPIED_BYTES)
    arena.touch()
    source, target = arena.take(COPIED_BYTES).tensor, arena.take(COPIED_BYTES).tensor
    seconds = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - start)
    arena.close()
    return COPIED_BYTES / sorted(seconds)[1]


class Slowdowns(NamedTuple):
    """How many times longer computing and reading take while the other goes on; at least 1."""

    compute: float
    read: float
    read_bytes_per_s: float
    """of reading alone, the median of all rounds"""


def contention(
    source: ByteSource,
    files: Sequence[ShardFile],
    settings: ReadSettings,
    product: Callable[[], None],
    *,
    rounds: int = 5,
    seconds: float = 0.1,
) -> Slowdowns:
    """Read and compute at once and compare with each alone, in turn, medians over all calls and all rounds.

    `product` is one computation of a few milliseconds. Takes about 3 x rounds x seconds.
    """
    alone: list[float] = []
    beside: list[float] = []
    rates: list[float] = []
    rates_beside: list[float] = []

    def read(while_doing: Callable[[], None] | None = None) -> float:
        return read_rate(
            source,
            files,
            chunk_bytes=settings.chunk_bytes,
            threads=settings.threads,
            seconds=seconds,
            while_doing=while_doing,
        )

    product()
    for _ in range(rounds):
        deadline = time.perf_counter() + seconds
        while not alone or time.perf_counter() < deadline:
            alone.append(_seconds_of(product))
        rates.append(read())
        rates_beside.append(read(lambda: beside.append(_seconds_of(product))))
    rate_beside = statistics.median(rates_beside)
    return Slowdowns(
        max(1.0, statistics.median(beside) / statistics.median(alone)) if beside else 1.0,
        max(1.0, statistics.median(rates) / rate_beside) if rate_beside else 1.0,
        statistics.median(rates),
    )


def product_of(stored: torch.dtype, compute: torch.dtype, *, shape: tuple[int, int], tokens: int) -> Callable[[], None]:
    """A matrix product to compute again and again: `tokens` rows and `shape` weights, widened where dtypes differ."""
    weight = torch.randn(shape).to(stored)
    widened = torch.empty(shape, dtype=compute)
    rows = torch.randn(tokens, shape[1]).to(compute)

    def product() -> None:
        with torch.inference_mode():
            functional.linear(rows, widened.copy_(weight) if stored is not compute else weight)

    return product


def handover_seconds(source: ByteSource, settings: StreamSettings, *, rounds: int = 24) -> float:
    """Seconds from asking an idle stream for a page until it is handed out: waking, one small read, waking again.

    Closes `source`. The lower quartile, as others on the machine only add to it.
    """
    page = lay_out([ByteRange("page", 0, 0, PAGE_BYTES)])
    stream = Stream(
        layouts=[page, page],
        places=[Placement.DISK, Placement.DISK],
        source=source,
        device=CpuDevice(),
        settings=replace(settings, slots=1, slot_bytes=page.footprint_bytes, overlap=False),
    )
    waits = []
    try:
        for number in range(rounds):
            time.sleep(0.002)
            start = time.perf_counter()
            stream.wait(number % 2)
            waits.append(time.perf_counter() - start)
            stream.release(number % 2)
    finally:
        stream.close()
    return sorted(waits)[rounds // 4]


def _seconds_of(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
