"""Rates from the constants of a machine file alone: no layer of the model was timed."""

from __future__ import annotations

from dataclasses import replace

from headrace.dtypes import DTYPES
from headrace.errors import MachineError
from headrace.machine.compute_curve import ComputeCurve
from headrace.machine.machine import Copies, Machine, Processor
from headrace.model.model import Model
from headrace.planning.rates import LayerTimes, Rates
from headrace.planning.workload import Workload


def cpu_rates(
    machine: Machine, model: Model, compute_dtype: str, *, read_limit_bytes_per_s: float | None = None
) -> Rates:
    """Take the constants of a machine that computes on its CPU, the disk's rate bounded by the reader's own limit.

    Raises MachineError where it was not measured in `compute_dtype`.
    """
    disk, arithmetic = machine.require_disk(), machine.processor.arithmetic
    read_bytes_per_s = disk.bytes_per_s.expected
    return Rates(
        read_bytes_per_s=min(read_bytes_per_s, read_limit_bytes_per_s or read_bytes_per_s),
        curve=_curve(machine.processor, model, compute_dtype),
        block_overhead_s=arithmetic.block_overhead_s.expected,
        pass_overhead_s=arithmetic.pass_overhead_s.expected,
        read_latency_s=disk.latency_s.expected,
        compute_slowdown=arithmetic.slowdown_while_reading.expected,
        read_slowdown=arithmetic.slowdown_of_reading.expected,
    )


def accelerator_rates(
    machine: Machine,
    model: Model,
    compute_dtype: str,
    *,
    read_limit_bytes_per_s: float | None = None,
    cpu_layer: LayerTimes | None = None,
) -> Rates:
    """Take the constants of a machine that computes on an accelerator, which shares no memory with the disk.

    The disk's rate is bounded by the reader's own limit. Raises MachineError where the accelerator was not measured in
    `compute_dtype`.
    """
    copies, host = machine.processor.copies, machine.host
    if copies is None or host is None:
        raise MachineError(f"{machine.name} has no measurement of copies to a device; run `headrace probe` there")
    rates = cpu_rates(machine, model, compute_dtype, read_limit_bytes_per_s=read_limit_bytes_per_s)
    return over_link(
        replace(rates, compute_slowdown=1.0, read_slowdown=1.0),
        copies,
        hidden_bytes=model.hidden_size * DTYPES[compute_dtype].size_bytes,
        memory_copy_bytes_per_s=host.memory_bytes_per_s.expected / 2,  # of bytes read plus bytes written
        cpu_layer=cpu_layer,
    )


def over_link(
    rates: Rates,
    copies: Copies,
    *,
    hidden_bytes: int,
    memory_copy_bytes_per_s: float,
    cpu_layer: LayerTimes | None,
) -> Rates:
    """The rates of an accelerator with its link: blocks out of host memory, and what else goes to the host and back.

    Activations and embedding rows take the driver's copies of ordinary memory: a token's activations go there and back,
    a row is gathered there first.
    """
    link_bytes_per_s = copies.while_computing_bytes_per_s.expected
    row_s = hidden_bytes / copies.pageable_bytes_per_s.expected
    return replace(
        rates,
        link_bytes_per_s=link_bytes_per_s,
        staged_bytes_per_s=min(memory_copy_bytes_per_s, link_bytes_per_s),
        memory_copy_bytes_per_s=memory_copy_bytes_per_s,
        cpu_layer=cpu_layer,
        activation_latency_s=2 * copies.latency_s.expected,
        activation_s_per_token=hidden_bytes / copies.pageable_back_bytes_per_s.expected + row_s,
        host_row_s=row_s + hidden_bytes / memory_copy_bytes_per_s,
    )


def cpu_layer_times(machine: Machine, model: Model, work: Workload, *, compute_dtype: str) -> LayerTimes:
    """Seconds that a layer of mean size takes on the CPU; raises MachineError where it was not measured with it."""
    cpu = machine.on("cpu", origin=machine.name).processor
    curve = _curve(cpu, model, compute_dtype)
    sizes = [block.active_parameters for block in model.blocks if block.head_rows is None]
    prefill_s, decode_s = (
        cpu.arithmetic.block_overhead_s.expected + sum(sizes) / len(sizes) * curve.seconds_per_parameter(tokens)
        for tokens in (work.sequences * work.prompt_tokens, work.sequences)
    )
    return LayerTimes(prefill_s=prefill_s, decode_s=decode_s)


def _curve(processor: Processor, model: Model, compute_dtype: str) -> ComputeCurve:
    """The processor's arithmetic; of packed weights that of weights in the compute dtype: unpacking is not measured."""
    stored = model.stored_dtype
    if stored == model.weight_format:
        stored = DTYPES[compute_dtype].stored_name
    return processor.curve(compute_dtype=compute_dtype, stored_dtype=stored)
