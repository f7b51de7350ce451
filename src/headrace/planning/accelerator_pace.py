"""How fast an accelerator's plan goes: the constants of disk, link, device and processor, and the times they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from headrace.errors import MachineError
from headrace.model.stored_model import StoredModel
from headrace.planning.accelerator_memory import CHUNK_BYTES, cache_bytes, offloads_cache
from headrace.planning.block_times import BlockTimes
from headrace.planning.estimate import (
    DECODE_PASSES_SIMULATED,
    LayerTimes,
    Pace,
    PassOverheads,
    Prediction,
    block_times,
    break_even_tokens,
)
from headrace.planning.plan import TRAVELLING, EmbeddingPlacement, Placement, Plan, Strategy, Workload
from headrace.planning.simulation.one_copy import PassSchedule, simulate


@dataclass(frozen=True, kw_only=True)
class AcceleratorPace:
    """The constants of one run on an accelerator; seconds, bytes per second."""

    device: Pace
    """the disk's rate and hand-over, the device's own arithmetic and overheads. Its slowdowns do not count: disk and
    device share no memory"""
    link_bytes_per_s: float
    """out of page-locked host memory, while the device computes"""
    staged_bytes_per_s: float
    """out of host memory that could not be page-locked into the ring, by the readers"""
    copy_latency_s: float = 0.0
    """per copied block"""
    processor_layer: LayerTimes | None = None
    """one layer computed by the processor; None where it computes none"""
    processor_handover_s: float = 0.0
    """from the device to the processor and back, per layer and pass"""
    processor_handover_s_per_token: float = 0.0
    """beside that for each token whose activations go there and back"""
    host_row_s: float = 0.0
    """per distinct row of an embedding table in host memory: gathered there, and copied to the device"""
    memory_copy_bytes_per_s: float = math.inf
    """from the ring into a store in host memory, by the readers, in the first pass"""

    def activation_transfer_s(self, tokens: int) -> float:
        """Seconds by which one layer of the processor takes longer, since the device computes what comes before."""
        return self.processor_handover_s + tokens * self.processor_handover_s_per_token


def tiered_times(
    model: StoredModel,
    work: Workload,
    pace: AcceleratorPace,
    places: Sequence[Placement],
    *,
    pinned: bool,
    chunk_bytes: int = CHUNK_BYTES,
    cache_on_host: bool = False,
) -> tuple[BlockTimes, ...]:
    """Seconds of each block where `places` puts it; `pinned`: its store in host memory is page-locked.

    With `cache_on_host` a layer's keys and values visit the device for its turn, those of a context of middle length:
    with the block over the link, or, where that stays, before it is computed. Raises MachineError where a block is the
    processor's, and how fast that is was not measured.
    """
    parameters = [block.active_parameters for block in model.blocks if block.head_rows is None]
    mean_parameters = sum(parameters) / len(parameters)
    middle = work.prompt_tokens + work.generate_tokens // 2
    caches = cache_bytes(model, work, pace.device.curve.compute_dtype, tokens=middle) if cache_on_host else ()
    found = []
    for index, (block, own) in enumerate(zip(model.blocks, block_times(model, work, pace.device), strict=True)):
        place, size_bytes = places[index], block.held_bytes
        stays_on_host = place in (Placement.HOST, Placement.CPU)
        times = BlockTimes(
            read_s=own.read_s,
            copy_s=size_bytes / pace.link_bytes_per_s + pace.copy_latency_s,
            prefill_s=own.prefill_s,
            decode_s=own.decode_s,
            store_s=size_bytes / pace.memory_copy_bytes_per_s if stays_on_host else 0.0,
            stage_s=size_bytes / pace.staged_bytes_per_s if place is Placement.HOST and not pinned else 0.0,
            pieces=max(1, -(-block.read_bytes // chunk_bytes)),
        )
        if place is Placement.CPU:
            if pace.processor_layer is None or block.head_rows is not None:
                raise MachineError(f"how long the processor takes for {block.name} of {model.name} was not measured")
            share = block.active_parameters / mean_parameters
            times = times._replace(
                copy_s=0.0,
                prefill_s=pace.processor_layer.prefill_s * share
                + pace.activation_transfer_s(work.sequences * work.prompt_tokens),
                decode_s=pace.processor_layer.decode_s * share + pace.activation_transfer_s(work.sequences),
            )
        elif cache_on_host and offloads_cache(block):
            visit_s = caches[index] / pace.link_bytes_per_s + pace.copy_latency_s
            if place in TRAVELLING:
                times = times._replace(copy_s=times.copy_s + visit_s)
            else:
                times = times._replace(decode_s=times.decode_s + visit_s)
        found.append(times)
    return tuple(found)


def predict_on_accelerator(
    model: StoredModel,
    plan: Plan,
    pace: AcceleratorPace,
    *,
    pinned: bool = True,
    decode_passes: int = DECODE_PASSES_SIMULATED,
) -> Prediction:
    """Simulate the plan's workload and say what binds: disk, link, compute (the device's), processor, or both.

    `load_s_per_pass` is the longer of the disk's and the link's seconds, and no schedule is faster than
    `possible_decode_s`. Raises ValueError for a plan in which no accelerator computes.
    """
    on_device = plan.accelerator
    if on_device is None:
        raise ValueError("the plan is one of a processor that computes from its own memory")
    work = plan.workload
    times = tiered_times(
        model,
        work,
        pace,
        on_device.places,
        pinned=pinned,
        chunk_bytes=on_device.chunk_bytes,
        cache_on_host=on_device.cache_on_host,
    )
    from_host = plan.embedding is EmbeddingPlacement.HOST
    rows = replace(pace.device, row_s=pace.host_row_s) if from_host else pace.device
    one_by_one = plan.embedding in (EmbeddingPlacement.ROWS, EmbeddingPlacement.HOST)
    beside = PassOverheads.of(model, work, rows, rows_from_disk=one_by_one)
    schedule = PassSchedule(
        blocks=times,
        placements=on_device.places,
        slots=plan.slots,
        overlap=plan.strategy is not Strategy.SEQUENTIAL,
        ring_pieces=on_device.ring_chunks,
        decode_passes=decode_passes,
        pass_overhead_s=beside.further_pass_s,
        first_pass_overhead_s=beside.first_pass_s,
        read_latency_s=pace.device.read_latency_s,
        stall_penalty_s=pace.device.stall_penalty_s,
    )
    simulated = simulate(schedule, [block.name for block in model.blocks])
    demand = schedule.demand
    load_s = max(demand.read_s, demand.copy_s)
    decode_s = simulated.decode_s_per_pass
    return Prediction(
        prefill_s=simulated.prefill_s,
        decode_s_per_pass=decode_s,
        tokens_per_s=work.sequences / decode_s,
        total_s=simulated.prefill_s + (work.generate_tokens - 1) * decode_s,
        binds=_binds(schedule),
        load_s_per_pass=load_s,
        compute_s_per_pass=demand.compute_s,
        break_even_tokens_per_pass=break_even_tokens(
            model, plan, pace.device, load_s=load_s, compute_s=demand.compute_s
        ),
        possible_decode_s=max(demand),
        timeline=simulated.timeline,
    )


def _binds(schedule: PassSchedule) -> str:
    read_s, copy_s, compute_s = schedule.demand
    if max(read_s, copy_s) > 0 and not schedule.overlap:
        return "both"
    placed = list(zip(schedule.blocks, schedule.placements, strict=True))
    if max(read_s, copy_s) > compute_s:
        disk_s = sum(times.read_s for times, place in placed if place is Placement.DISK)
        return "disk" if disk_s > max(copy_s, read_s - disk_s) else "link"
    processor_s = sum(times.decode_s for times, place in placed if place is Placement.CPU)
    return "cpu" if processor_s > compute_s - processor_s else "compute"
