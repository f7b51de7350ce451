"""Speeds for the made-up accelerator, so that loading on it measures little; they mean nothing."""

from __future__ import annotations

from headrace.machine.compute_curve import Arithmetic, ComputeCurve, CurvePoint
from headrace.machine.machine import Copies, Disk, Machine
from headrace.machine.measured import measured_accelerator, measured_computer
from headrace.machine.quantity import Quantity
from headrace.streaming.device import Device

POINTS = (CurvePoint(1, 1e-9), CurvePoint(1024, 2e-9))
FORMATS = (("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32"))


def made_up_machine(device: Device) -> Machine:
    """A machine file's worth of constants."""
    memory = device.memory()
    assert memory is not None
    arithmetic = Arithmetic(
        curves=tuple(
            ComputeCurve(compute_dtype=compute, stored_dtype=stored, points=POINTS) for compute, stored in FORMATS
        ),
        source="made up",
    )
    accelerator = measured_accelerator(
        name="made up",
        device=device.name,
        memory_bytes=memory.total_bytes,
        free_bytes=memory.free_bytes,
        copied_bytes_per_s=1e12,
        arithmetic=arithmetic,
        copies=Copies(
            bytes_per_s=_exact(2e10),
            while_computing_bytes_per_s=_exact(2e10),
            pageable_bytes_per_s=_exact(1e10),
            pageable_back_bytes_per_s=_exact(1e10),
            latency_s=_exact(1e-6),
            page_locked=True,
        ),
    )
    return measured_computer(
        name="made up",
        memory_bytes=1 << 33,
        copied_bytes_per_s=1e10,
        arithmetic=arithmetic,
        disk=Disk(bytes_per_s=_exact(1e9), latency_s=_exact(0.0)),
        accelerators=(accelerator,),
    )


def _exact(value: float) -> Quantity:
    return Quantity.of(value, "made up")
