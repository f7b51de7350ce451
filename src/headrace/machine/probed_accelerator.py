"""One accelerator as `headrace probe` measured it: its memory, its link to the host, its arithmetic, its overheads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.errors import InvalidRequestError, MachineError
from headrace.machine.compute_curve import ComputeCurve, find_curve
from headrace.machine.toml_table import TomlTable


@dataclass(frozen=True, kw_only=True)
class ProbedAccelerator:
    """A GPU in the computer that was probed; bytes, bytes per second, seconds. Raises MachineError for no sense."""

    name: str
    """as its maker calls it: NVIDIA H200"""
    device: str
    """as users write it: cuda:0"""
    memory_bytes: int
    free_bytes: int
    """when it was measured; the rest was in use by its driver and by other processes"""
    pinned_to_device_bytes_per_s: float
    """from page-locked host memory; as from ordinary memory where the system locks none"""
    pageable_to_device_bytes_per_s: float
    """from ordinary host memory"""
    pinned_from_device_bytes_per_s: float
    pageable_from_device_bytes_per_s: float
    pinned_to_device_while_computing_bytes_per_s: float
    """beside matrix products of few tokens, which take as much of the device's memory rate as there is"""
    compute_slowdown_while_copying: float
    """how many times longer such products take while bytes come in from page-locked memory; at least 1"""
    copy_latency_s: float
    """a copy of 4 KiB, from the call until the host knows that it is done"""
    launch_overhead_s: float
    """host time of one small kernel, enqueued from Python"""
    small_kernel_s: float
    """of many small kernels, until the device is done with the last one, divided by their number: the launch, or the
    device where it is slower"""
    memory_bytes_per_s: float
    """copied within the device: bytes read plus bytes written"""
    compute: tuple[ComputeCurve, ...]
    sources: Mapping[str, str] = field(default_factory=dict)
    """for each constant, where it comes from"""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("memory_bytes", self.memory_bytes, 1),
            ("free_bytes", self.free_bytes, 0),
            *((name, value, 1) for name, value in self._rates().items()),
            ("compute_slowdown_while_copying", self.compute_slowdown_while_copying, 1),
            ("copy_latency_s", self.copy_latency_s, 0),
            ("launch_overhead_s", self.launch_overhead_s, 0),
            ("small_kernel_s", self.small_kernel_s, 0),
        ):
            if not least <= value < math.inf:
                raise MachineError(f"{self.name}: {name} is {value}; it must be at least {least} and a finite number")
        if self.free_bytes > self.memory_bytes:
            raise MachineError(
                f"{self.name}: free_bytes is {self.free_bytes}; it must be at most memory_bytes, {self.memory_bytes}"
            )
        if not self.compute:
            raise MachineError(f"{self.name}: curves is empty; it must hold the arithmetic of one dtype at least")

    def _rates(self) -> dict[str, float]:
        return {
            "pinned_to_device_bytes_per_s": self.pinned_to_device_bytes_per_s,
            "pageable_to_device_bytes_per_s": self.pageable_to_device_bytes_per_s,
            "pinned_from_device_bytes_per_s": self.pinned_from_device_bytes_per_s,
            "pageable_from_device_bytes_per_s": self.pageable_from_device_bytes_per_s,
            "pinned_to_device_while_computing_bytes_per_s": self.pinned_to_device_while_computing_bytes_per_s,
            "memory_bytes_per_s": self.memory_bytes_per_s,
        }

    @property
    def locks_memory(self) -> bool:
        """Whether its system page-locked memory; where not, ordinary memory stood in for it, both ways exactly."""
        return (self.pinned_to_device_bytes_per_s, self.pinned_from_device_bytes_per_s) != (
            self.pageable_to_device_bytes_per_s,
            self.pageable_from_device_bytes_per_s,
        )

    def curve(self, *, compute_dtype: str, stored_dtype: str) -> ComputeCurve:
        """The curve for this pair of dtypes; raises MachineError when the accelerator was not measured with it."""
        return find_curve(self.compute, compute_dtype=compute_dtype, stored_dtype=stored_dtype, measured_on=self.name)

    def to_raw(self) -> dict[str, Any]:
        """Return the description as a table of a TOML file; `from_raw` is its inverse."""
        return {
            "name": self.name,
            "device": self.device,
            "memory_bytes": self.memory_bytes,
            "free_bytes": self.free_bytes,
            **self._rates(),
            "compute_slowdown_while_copying": self.compute_slowdown_while_copying,
            "copy_latency_s": self.copy_latency_s,
            "launch_overhead_s": self.launch_overhead_s,
            "small_kernel_s": self.small_kernel_s,
            "curves": [curve.to_raw() for curve in self.compute],
            "sources": dict(self.sources),
        }

    @classmethod
    def from_raw(cls, table: TomlTable) -> ProbedAccelerator:
        """Read a description; raises MachineError that names the field."""
        return cls(
            name=table.text("name"),
            device=table.text("device"),
            memory_bytes=table.whole("memory_bytes"),
            free_bytes=table.whole("free_bytes"),
            pinned_to_device_bytes_per_s=table.number("pinned_to_device_bytes_per_s"),
            pageable_to_device_bytes_per_s=table.number("pageable_to_device_bytes_per_s"),
            pinned_from_device_bytes_per_s=table.number("pinned_from_device_bytes_per_s"),
            pageable_from_device_bytes_per_s=table.number("pageable_from_device_bytes_per_s"),
            pinned_to_device_while_computing_bytes_per_s=table.number("pinned_to_device_while_computing_bytes_per_s"),
            memory_bytes_per_s=table.number("memory_bytes_per_s"),
            compute_slowdown_while_copying=table.number("compute_slowdown_while_copying"),
            copy_latency_s=table.number("copy_latency_s"),
            launch_overhead_s=table.number("launch_overhead_s"),
            small_kernel_s=table.number("small_kernel_s"),
            compute=tuple(ComputeCurve.from_raw(curve) for curve in table.tables("curves")),
            sources=table.texts("sources"),
        )


def find_accelerator(
    accelerators: Sequence[ProbedAccelerator], device: str, *, origin: str
) -> ProbedAccelerator | None:
    """Return the one that `device` means: auto is the first, cuda the first of that kind; None for the processor.

    The processor is meant by cpu, and by auto where `origin` describes nothing else. Raises InvalidRequestError, with
    what it does describe, for any other name.
    """
    if device == "cpu" or (device == "auto" and not accelerators):
        return None
    for own in accelerators:
        if device in ("auto", own.device) or (device == "cuda" and own.device.startswith("cuda:")):
            return own
    described = ", ".join(["cpu", *(f"{own.device} ({own.name})" for own in accelerators)])
    raise InvalidRequestError(
        f"--device {device}: {origin} describes no such device, only {described}; take one of these, or a file from "
        "`headrace probe --device cuda:N` on a computer that has it"
    )
