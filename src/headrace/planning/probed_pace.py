"""The pace of a measured accelerator, from the constants of its machine file alone: no layer was rehearsed."""

from __future__ import annotations

from headrace.dtypes import DTYPES
from headrace.errors import MachineError
from headrace.machine.machine import Copies, Machine
from headrace.model.stored_model import StoredModel
from headrace.planning.accelerator_pace import AcceleratorPace
from headrace.planning.estimate import LayerTimes, Pace
from headrace.planning.plan import Workload


def pace_from_probe(
    machine: Machine,
    model: StoredModel,
    *,
    compute_dtype: str,
    read_limit_bytes_per_s: float | None = None,
    processor_layer: LayerTimes | None = None,
) -> AcceleratorPace:
    """Take the constants of a machine that computes on an accelerator, the disk's bounded by the reader's own limit.

    Raises MachineError where the accelerator was not measured in `compute_dtype`.
    """
    copies, host = machine.processor.copies, machine.host
    if copies is None or host is None:
        raise MachineError(f"{machine.name} has no measurement of copies to a device; run `headrace probe` there")
    link_bytes_per_s = copies.while_computing_bytes_per_s.expected
    memory_copy_bytes_per_s = host.memory_bytes_per_s.expected / 2  # of bytes read plus bytes written
    hidden_bytes = model.hidden_size * DTYPES[compute_dtype].size_bytes
    return AcceleratorPace(
        device=Pace.of(
            machine,
            compute_dtype=compute_dtype,
            stored_dtype=model.stored_dtype,
            read_limit_bytes_per_s=read_limit_bytes_per_s,
        ),
        link_bytes_per_s=link_bytes_per_s,
        staged_bytes_per_s=min(memory_copy_bytes_per_s, link_bytes_per_s),
        processor_layer=processor_layer,
        processor_handover_s=2 * copies.latency_s.expected,
        processor_handover_s_per_token=handover_s_per_token(copies, hidden_bytes),
        host_row_s=hidden_bytes / copies.pageable_bytes_per_s.expected + hidden_bytes / memory_copy_bytes_per_s,
        memory_copy_bytes_per_s=memory_copy_bytes_per_s,
    )


def handover_s_per_token(copies: Copies, hidden_bytes: int) -> float:
    """Seconds that a token's activations take from the device to the CPU and back."""
    return (
        hidden_bytes / copies.pageable_back_bytes_per_s.expected + hidden_bytes / copies.pageable_bytes_per_s.expected
    )


def processor_layer_from_probe(
    machine: Machine, model: StoredModel, work: Workload, *, compute_dtype: str
) -> LayerTimes:
    """What a layer of mean size takes the computer's CPU; MachineError where it was not measured with it."""
    cpu = machine.on("cpu", origin=machine.name).processor
    curve = cpu.curve(compute_dtype=compute_dtype, stored_dtype=model.stored_dtype)
    sizes = [block.active_parameters for block in model.blocks if block.head_rows is None]
    prefill_s, decode_s = (
        cpu.arithmetic.block_overhead_s.expected + sum(sizes) / len(sizes) * curve.seconds_per_parameter(tokens)
        for tokens in (work.sequences * work.prompt_tokens, work.sequences)
    )
    return LayerTimes(prefill_s=prefill_s, decode_s=decode_s)
