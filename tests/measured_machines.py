"""Computers as `headrace probe` would describe them, made of plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from headrace.machine.compute_curve import UNMEASURED, Arithmetic, ComputeCurve
from headrace.machine.machine import Copies, Disk, Machine, Processor
from headrace.machine.measured import measured_accelerator, measured_computer
from headrace.machine.quantity import Quantity


def exact(value: float) -> Quantity:
    return Quantity.of(value, "a test")


def arithmetic(curves: Sequence[ComputeCurve], **constants: float) -> Arithmetic:
    """`constants`: seconds and factors by the name of their field."""
    quantities: dict[str, Any] = {name: exact(value) for name, value in constants.items()}
    return Arithmetic(curves=tuple(curves), source="a test", **quantities)


def computer(
    curves: Sequence[ComputeCurve],
    *accelerators: Processor,
    name: str = "bench",
    memory_bytes: int = 1 << 33,
    read_bytes_per_s: float = 1.5e9,
    read_latency_s: float = 0.0,
    copied_bytes_per_s: float = 1.0,
    **constants: float,
) -> Machine:
    """Return a computer whose CPU's memory is as fast as its products, or its copies where these are faster."""
    return measured_computer(
        name=name,
        memory_bytes=memory_bytes,
        copied_bytes_per_s=copied_bytes_per_s,
        arithmetic=arithmetic(curves, **constants),
        disk=Disk(bytes_per_s=exact(read_bytes_per_s), latency_s=exact(read_latency_s)),
        accelerators=accelerators,
    )


def with_unmeasured_cpu(machine: Machine) -> Machine:
    assert machine.host is not None
    return replace(machine, host=replace(machine.host, arithmetic=UNMEASURED))


def copies(
    to_device: float, *, while_computing: float, pageable: float, pageable_back: float, latency_s: float
) -> Copies:
    return Copies(
        bytes_per_s=exact(to_device),
        while_computing_bytes_per_s=exact(while_computing),
        pageable_bytes_per_s=exact(pageable),
        pageable_back_bytes_per_s=exact(pageable_back),
        latency_s=exact(latency_s),
        page_locked=True,
    )


def accelerator(
    curves: Sequence[ComputeCurve],
    copied: Copies,
    *,
    name: str,
    device: str,
    memory_bytes: int,
    free_bytes: int,
    copied_bytes_per_s: float,
    **constants: float,
) -> Processor:
    return measured_accelerator(
        name=name,
        device=device,
        memory_bytes=memory_bytes,
        free_bytes=free_bytes,
        copied_bytes_per_s=copied_bytes_per_s,
        arithmetic=arithmetic(curves, **constants),
        copies=copied,
    )


def with_copies(processor: Processor, **rates: float) -> Processor:
    """The same accelerator with other rates, by the name of their field."""
    assert processor.copies is not None
    changes: dict[str, Any] = {name: exact(value) for name, value in rates.items()}
    return replace(processor, copies=replace(processor.copies, **changes))
