"""Speeds for the made-up accelerator, so that loading on it measures little; they mean nothing."""

from __future__ import annotations

from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.machine.probed_accelerator import ProbedAccelerator
from headrace.machine.probed_machine import ProbedMachine
from headrace.streaming.device import Device

POINTS = (CurvePoint(1, 1e-9), CurvePoint(1024, 2e-9))
FORMATS = (("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32"))


def made_up_machine(device: Device) -> ProbedMachine:
    """A machine file's worth of constants."""
    memory = device.memory()
    assert memory is not None
    accelerator = ProbedAccelerator(
        name="made up",
        device=device.name,
        memory_bytes=memory.total_bytes,
        free_bytes=memory.free_bytes,
        pinned_to_device_bytes_per_s=2e10,
        pageable_to_device_bytes_per_s=1e10,
        pinned_from_device_bytes_per_s=2e10,
        pageable_from_device_bytes_per_s=1e10,
        pinned_to_device_while_computing_bytes_per_s=2e10,
        compute_slowdown_while_copying=1.0,
        copy_latency_s=1e-6,
        launch_overhead_s=1e-6,
        small_kernel_s=1e-6,
        memory_bytes_per_s=1e12,
        compute=tuple(
            ComputeCurve(compute_dtype=compute, stored_dtype=stored, points=POINTS) for compute, stored in FORMATS
        ),
    )
    return ProbedMachine(
        name="made up", memory_bytes=1 << 33, read_bytes_per_s=1e9, compute=(), accelerators=(accelerator,)
    )
