"""A computer as `headrace probe` measured it, made a machine: peaks are what its curves reach."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.errors import MachineError
from headrace.machine.compute_curve import Arithmetic
from headrace.machine.machine import Copies, Disk, Host, Machine, Processor
from headrace.machine.quantity import Quantity

_REACHED = Quantity.of(1.0, "the arithmetic itself was measured")


def measured_accelerator(
    *,
    name: str,
    device: str,
    memory_bytes: float,
    free_bytes: float,
    copied_bytes_per_s: float,
    arithmetic: Arithmetic,
    copies: Copies,
) -> Processor:
    """An accelerator; its memory's rate is that of copies within it, or of products of one token where they reach more.

    Raises MachineError where no 16- or 32-bit arithmetic was measured.
    """
    flops = arithmetic.peaks()
    if not flops:
        raise MachineError(f"{name} has no measurement of 16- or 32-bit arithmetic")
    return Processor(
        name=name,
        kind="gpu",
        memory_bytes=memory_bytes,
        memory_bytes_per_s=_memory_rate(arithmetic, copied_bytes_per_s, share=0.1),
        flops=flops,
        achievable=_REACHED,
        device=device,
        free_bytes=free_bytes,
        arithmetic=arithmetic,
        copies=copies,
    )


def measured_computer(
    *,
    name: str,
    memory_bytes: float,
    copied_bytes_per_s: float,
    arithmetic: Arithmetic,
    disk: Disk,
    accelerators: Sequence[Processor] = (),
) -> Machine:
    """A computer in which the first accelerator computes, or the CPU where there is none."""
    fastest = arithmetic.fastest()
    if fastest is None:
        raise MachineError(f"{name} has no measurement of arithmetic; run `headrace probe` again")
    flops = Quantity.about(fastest.flops, f"{arithmetic.source}, in {fastest.compute_dtype}", share=0.2)
    host = Host(
        memory_bytes=memory_bytes,
        memory_bytes_per_s=_memory_rate(arithmetic, copied_bytes_per_s, share=0.2),
        flops=flops,
        arithmetic=arithmetic,
    )
    if not accelerators:
        return Machine(name=name, processor=host.cpu(name), disk=disk)
    first, *others = accelerators
    assert first.copies is not None
    links = {"host": first.copies.link()}
    return Machine(name=name, processor=first, host=host, disk=disk, links=links, others=tuple(others))


def _memory_rate(arithmetic: Arithmetic, copied_bytes_per_s: float, *, share: float) -> Quantity:
    read_bytes_per_s = max((curve.weight_bytes_per_s for curve in arithmetic.curves), default=0.0)
    if read_bytes_per_s > copied_bytes_per_s:
        return Quantity.about(read_bytes_per_s, f"{arithmetic.source}: weights read for one token", share=share)
    return Quantity.about(copied_bytes_per_s, "measured: copies within memory, bytes read and written", share=share)
