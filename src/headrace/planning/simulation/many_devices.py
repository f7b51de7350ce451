"""Every arrangement executed on the event core: one copy, stages with micro-batches, or sharded streaming.

One copy, its width split or not:

    disk lane:    read layer j into the host's ring            (waits for a place in the ring)
    copy lane:    copy layer j to a slot of the device         (waits for its read and for a slot)
    device lane:  compute layer j                              (waits for its copy and for layer j-1); frees the slot

Loading goes on over the end of a pass into the next one. In sequence the three follow one another, layer by layer. Of a
pipeline each stage has devices of its own, micro-batches pass through them, and a token's next pass waits for its own
last one. Sharded, each device pulls its part of a layer over its own link and whatever uplinks it shares, all gather,
and each computes its own batch when all parts have been gathered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.machine.machine import Machine, Tier
from headrace.model.model import Layer, Model
from headrace.planning import collectives
from headrace.planning.closed_form import (
    hop_s,
    host_layer_s,
    layer_seconds,
    load_seconds,
    mean_context_tokens,
    pass_ends_s,
)
from headrace.planning.memory import CACHE_LAYERS_ON_DEVICE
from headrace.planning.plan import TRAVELLING, Arrangement, Placement
from headrace.planning.rates import Rates
from headrace.planning.simulation.event_core import Execution, Mark, Schedule
from headrace.planning.timeline import Lane, Timeline
from headrace.planning.workload import PassTokens, Workload

DECODE_PASSES = 6
RING = 2
"""layers that the host's ring holds between disk and device"""


@dataclass(frozen=True, kw_only=True)
class SimulatedWork:
    """Seconds of the first pass and of a steady later one, and everything that happened."""

    prefill_s: float
    decode_s_per_pass: float
    outcome: Execution
    timeline: Timeline


def simulate_work(
    model: Model,
    machine: Machine,
    arrangement: Arrangement,
    work: Workload,
    rates: Rates,
    *,
    passes: int = DECODE_PASSES,
) -> SimulatedWork:
    """Simulate the prefill and `passes` decode passes at this work's mean context; replicas but the sharded run alike.

    Raises event_core.DeadlockError where the arrangement cannot go on (no slot for what is due).
    """
    sequences = math.ceil(work.sequences / arrangement.parallelism.replicas)
    batches = min(arrangement.parallelism.micro_batches, sequences)
    first = PassTokens(sequences=sequences / batches, new_tokens=work.prompt_tokens, context_tokens=work.prompt_tokens)
    later = PassTokens(
        sequences=sequences / batches,
        new_tokens=1,
        context_tokens=mean_context_tokens(work),
    )
    carried = [first, *[later] * passes]
    if arrangement.parallelism.pipeline > 1:
        outcome, ends = _pipeline(model, machine, arrangement, carried, rates, batches=batches)
    elif arrangement.parallelism.sharded:
        outcome, ends = _shard(model, machine, arrangement, carried, rates)
    else:
        outcome, ends = _stream(model, machine, arrangement, carried, rates)
    middle = max(1, passes // 2)
    steady = (ends[-1] - ends[middle]) / (len(ends) - 1 - middle) if passes > 1 else ends[-1] - ends[0]
    stages = arrangement.parallelism.pipeline
    if stages > 1:
        names = [f"stage {number}" for number in range(stages)]
    else:
        names = [*(f"layer {number}" for number in range(model.num_layers)), "head"]
    return SimulatedWork(prefill_s=ends[0], decode_s_per_pass=steady, outcome=outcome, timeline=outcome.timeline(names))


def _stream(
    model: Model, machine: Machine, arrangement: Arrangement, carried: Sequence[PassTokens], rates: Rates
) -> tuple[Execution, list[float]]:
    """Execute all passes; return what happened and when each pass ended."""
    layers = list(model.layers())
    by_host = [placement is Placement.CPU for placement in arrangement.placements[:-1]]
    streamed = [placement in TRAVELLING for placement in arrangement.placements[:-1]]
    schedule = Schedule(slots={"slot": max(1, arrangement.slots), "ring": RING, "cache": CACHE_LAYERS_ON_DEVICE})
    copy_lane = "copy" if rates.overlaps_copies else "device"
    disk_lane = "disk" if rates.overlaps_hops else copy_lane
    done: int | None = None
    passes: list[int] = []
    for pass_index, tokens in enumerate(carried):
        for index, layer in enumerate(layers):
            loads = _Loads.of(layer, model, tokens, rates, arrangement)
            before = () if done is None else (done,)
            ready = list(before)
            slot = None
            turn = before if not arrangement.overlap else ()
            if streamed[index]:
                slot = "slot"
                ring = None
                if loads.disk_s:
                    ring = "ring" if arrangement.overlap else None
                    mark = Mark(Lane.READ, index, pass_index)
                    turn = (schedule.add(disk_lane, loads.disk_s, after=turn, takes=ring, mark=mark),)
                mark = Mark(Lane.COPY, index, pass_index)
                ready.append(schedule.add(copy_lane, loads.link_s, after=turn, takes=slot, gives=ring, mark=mark))
            cache = None
            if loads.cache_s and not by_host[index]:
                cache = "cache"
                ready.append(schedule.add(copy_lane, loads.cache_s, after=turn, takes=cache))
            if loads.cold_s:
                ready.append(schedule.add("device", loads.cold_s, after=ready))
            if by_host[index]:
                done = schedule.add("host", host_layer_s(layer, model, tokens, rates), after=ready)
                continue
            seconds = layer_seconds(layer, model, tokens, rates=rates, arrangement=arrangement, machine=machine)
            computed = Mark(Lane.COMPUTE, index, pass_index)
            products = schedule.add("device", seconds.total_s - seconds.communication_s, after=ready, mark=computed)
            if seconds.communication_s:  # partial results are added up over the devices before they go on
                products = schedule.add("exchange", seconds.communication_s, after=(products,))
            done = schedule.add("device", 0.0, after=(products,), gives=slot)
            if cache is not None:
                schedule.add(None, after=(done,), gives=cache)
        ends_s = pass_ends_s(model, tokens, rates, arrangement)
        done = schedule.add("device", ends_s, after=() if done is None else (done,))
        passes.append(done)
    outcome = schedule.run()
    return outcome, [outcome.ends[number] for number in passes]


class _Loads:
    """What a layer that travels takes on each hop, and what its cache and its missed experts take; seconds."""

    def __init__(self, link_s: float, disk_s: float, cache_s: float, cold_s: float) -> None:
        self.link_s, self.disk_s, self.cache_s, self.cold_s = link_s, disk_s, cache_s, cold_s

    @classmethod
    def of(cls, layer: Layer, model: Model, tokens: PassTokens, rates: Rates, arrangement: Arrangement) -> _Loads:
        """Take the averages over all layers apart: weights by the layers that travel, the cache by every layer."""
        with_cache, disk_s, cold_s = load_seconds(layer, model, tokens, rates=rates, arrangement=arrangement)
        alone = arrangement._replace(cache_on_host=False)
        link_s, _, _ = load_seconds(layer, model, tokens, rates=rates, arrangement=alone)
        share = arrangement.streamed_share or 1.0
        return cls(link_s / share, disk_s / share, with_cache - link_s, cold_s)


def _shard(
    model: Model, machine: Machine, arrangement: Arrangement, carried: Sequence[PassTokens], rates: Rates
) -> tuple[Execution, list[float]]:
    """Execute all passes on all devices; a pass ends when the last device has ended it."""
    layers, devices = list(model.layers()), arrangement.parallelism.replicas
    streamed = [placement in TRAVELLING for placement in arrangement.placements[:-1]]
    own, *shared = machine.path("host")
    link_share = rates.link_bytes_per_s / machine.rate("host", sharers=devices).expected
    capacities = {f"host {device}": own.bytes_per_s.expected * link_share for device in range(devices)}
    capacities |= {link.name: link.bytes_per_s.expected * link_share for link in shared}
    capacities["disk"] = rates.read_bytes_per_s
    slots = {f"slot {device}": arrangement.slots for device in range(devices)}
    slots |= {f"ring {device}": RING for device in range(devices)}
    schedule = Schedule(capacities=capacities, slots=slots)
    from_disk = arrangement.source is Tier.DISK
    done: list[int | None] = [None] * devices
    passes: list[list[int]] = []
    for pass_index, tokens in enumerate(carried):
        for index, layer in enumerate(layers):
            pulled = []
            if streamed[index]:
                for device in range(devices):
                    part = layer.size_bytes / devices
                    after: tuple[int, ...] = ()
                    ring = f"ring {device}" if from_disk else None
                    if from_disk:
                        after = (schedule.add(f"reader {device}", size_bytes=part, path=("disk",), takes=ring),)
                    path = (f"host {device}", *(link.name for link in shared))
                    mark = Mark(Lane.READ, index, pass_index) if device == 0 else None
                    copied = schedule.add(
                        f"copy {device}",
                        size_bytes=part,
                        path=path,
                        after=after,
                        takes=f"slot {device}",
                        gives=ring,
                        mark=mark,
                    )
                    pulled.append(copied)
                gather_s = collectives.ring_all_gather(
                    layer.size_bytes,
                    devices,
                    bytes_per_s=rates.exchange.peer_bytes_per_s,
                    latency_s=rates.exchange.peer_latency_s,
                )
                # Each device's part and what it gathers arrive in one lane: its slot is filled by both.
                pulled = [schedule.add(f"copy {device}", gather_s, after=tuple(pulled)) for device in range(devices)]
            seconds = layer_seconds(layer, model, tokens, rates=rates, arrangement=arrangement, machine=machine)
            for device in range(devices):
                before = done[device]
                waits = [*pulled] if before is None else [*pulled, before]
                done[device] = schedule.add(
                    f"device {device}",
                    seconds.total_s,
                    after=waits,
                    gives=f"slot {device}" if streamed[index] else None,
                    mark=Mark(Lane.COMPUTE, index, pass_index) if device == 0 else None,
                )
        ended = []
        for device in range(devices):
            before = done[device]
            ends_s = pass_ends_s(model, tokens, rates, arrangement)
            done[device] = schedule.add(f"device {device}", ends_s, after=() if before is None else (before,))
            ended.append(done[device] or 0)
        passes.append(ended)
    outcome = schedule.run()
    return outcome, [max(outcome.ends[number] for number in ended) for ended in passes]


def _pipeline(
    model: Model,
    machine: Machine,
    arrangement: Arrangement,
    carried: Sequence[PassTokens],
    rates: Rates,
    *,
    batches: int,
) -> tuple[Execution, list[float]]:
    """Execute all passes of all micro-batches; a pass ends when its last micro-batch leaves the last stage."""
    layers, stages = list(model.layers()), arrangement.parallelism.pipeline
    per_stage = math.ceil(len(layers) / stages)
    schedule = Schedule()
    last: list[int | None] = [None] * batches
    passes: list[list[int]] = []
    for pass_index, tokens in enumerate(carried):
        handing_over_s = hop_s(model, machine, arrangement, tokens, rates)
        ends_s = pass_ends_s(model, tokens, rates, arrangement)
        times = [
            sum(
                layer_seconds(layer, model, tokens, rates=rates, arrangement=arrangement, machine=machine).total_s
                for layer in layers[stage * per_stage : (stage + 1) * per_stage]
            )
            + ends_s * (stage == stages - 1)
            for stage in range(stages)
        ]
        ended = []
        for batch in range(batches):
            at = last[batch]
            for stage in range(stages):
                mark = Mark(Lane.COMPUTE, stage, pass_index)
                after = () if at is None else (at,)
                at = schedule.add(f"stage {stage}", times[stage], after=after, mark=mark)
                at = schedule.add(None, handing_over_s, after=(at,))
            last[batch] = at
            ended.append(at if at is not None else 0)
        passes.append(ended)
    outcome = schedule.run()
    return outcome, [max(outcome.ends[number] for number in ended) for ended in passes]
