"""The pace of a probed accelerator, from the constants of its machine file alone: no layer was rehearsed."""

from __future__ import annotations

from headrace.machine.compute_curve import STORED_BYTES, ComputeCurve, CurvePoint
from headrace.machine.probed_accelerator import ProbedAccelerator
from headrace.machine.probed_machine import ProbedMachine
from headrace.model.blocks import StoredModel
from headrace.planning.accelerator_pace import AcceleratorPace
from headrace.planning.estimate import LayerTimes, Pace
from headrace.planning.plan import ELEMENT_BYTES, Workload

KERNELS_PER_LAYER = 40
"""A decoder layer enqueues about so many where none are fused: seven products, and around them norms, rotary positions,
keys and values joining the others, attention, the activation, sums. The curves of arithmetic hold the products alone; a
small kernel lasts about as long as the host takes to launch it, so all launches together are added to the products."""


def pace_from_probe(
    machine: ProbedMachine,
    accelerator: ProbedAccelerator,
    model: StoredModel,
    *,
    compute_dtype: str,
    read_limit_bytes_per_s: float | None = None,
    processor_layer: LayerTimes | None = None,
) -> AcceleratorPace:
    """Take the constants of the file, the disk's bounded by the reader's own limit.

    Raises MachineError where the accelerator was not measured in `compute_dtype`.
    """
    read_bytes_per_s = machine.read_bytes_per_s
    if read_limit_bytes_per_s is not None:
        read_bytes_per_s = min(read_bytes_per_s, read_limit_bytes_per_s)
    link_bytes_per_s = accelerator.pinned_to_device_while_computing_bytes_per_s
    memory_copy_bytes_per_s = _memory_copy_rate(machine, accelerator)
    hidden_bytes = model.config.hidden_size * ELEMENT_BYTES[compute_dtype]
    return AcceleratorPace(
        device=Pace(
            read_bytes_per_s=read_bytes_per_s,
            curve=_curve(accelerator, compute_dtype=compute_dtype, stored_dtype=model.stored_dtype),
            block_overhead_s=KERNELS_PER_LAYER * accelerator.launch_overhead_s,
            pass_overhead_s=machine.pass_overhead_s,
            read_latency_s=machine.read_latency_s,
        ),
        link_bytes_per_s=link_bytes_per_s,
        staged_bytes_per_s=min(memory_copy_bytes_per_s, link_bytes_per_s),
        processor_layer=processor_layer,
        processor_handover_s=2 * accelerator.copy_latency_s,
        processor_handover_s_per_token=hidden_bytes / accelerator.pageable_from_device_bytes_per_s
        + hidden_bytes / accelerator.pageable_to_device_bytes_per_s,
        host_row_s=hidden_bytes / accelerator.pageable_to_device_bytes_per_s + hidden_bytes / memory_copy_bytes_per_s,
        memory_copy_bytes_per_s=memory_copy_bytes_per_s,
    )


def processor_layer_from_probe(
    machine: ProbedMachine, model: StoredModel, work: Workload, *, compute_dtype: str
) -> LayerTimes:
    """What a layer of mean size takes the computer's processor; MachineError where it was not measured with it."""
    curve = machine.curve(compute_dtype=compute_dtype, stored_dtype=model.stored_dtype)
    sizes = [block.active_parameters for block in model.blocks if block.head_rows is None]
    prefill_s, decode_s = (
        machine.block_overhead_s + sum(sizes) / len(sizes) * curve.seconds_per_parameter(tokens)
        for tokens in (work.sequences * work.prompt_tokens, work.sequences)
    )
    return LayerTimes(prefill_s=prefill_s, decode_s=decode_s)


def _memory_copy_rate(machine: ProbedMachine, accelerator: ProbedAccelerator) -> float:
    """Bytes per second of copies within host memory.

    Where that was not measured: what the driver does with ordinary memory, which it copies into locked memory first.
    """
    if machine.memory_bytes_per_s is None:
        return accelerator.pageable_to_device_bytes_per_s
    return machine.memory_bytes_per_s / 2  # of bytes read plus bytes written


def _curve(accelerator: ProbedAccelerator, *, compute_dtype: str, stored_dtype: str) -> ComputeCurve:
    """The device's arithmetic; weights stored in another dtype are widened first, at the rate of its memory."""
    same = [own for own in accelerator.compute if own.compute_dtype == compute_dtype]
    if not same or any(own.stored_dtype == stored_dtype for own in same):
        return accelerator.curve(compute_dtype=compute_dtype, stored_dtype=stored_dtype)
    moved_bytes = STORED_BYTES[stored_dtype] + ELEMENT_BYTES[compute_dtype]
    widening_s = moved_bytes / accelerator.memory_bytes_per_s
    return ComputeCurve(
        compute_dtype=compute_dtype,
        stored_dtype=stored_dtype,
        points=tuple(CurvePoint(p.tokens, p.seconds_per_parameter + widening_s) for p in same[0].points),
    )
