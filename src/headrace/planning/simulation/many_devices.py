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
from typing import NamedTuple

from headrace.machine.machine import Tier
from headrace.model.model import Layer
from headrace.planning.closed_form import ClosedForm
from headrace.planning.memory import CACHE_LAYERS_ON_DEVICE
from headrace.planning.plan import TRAVELLING, Arrangement, Placement
from headrace.planning.simulation.event_core import Execution, Schedule
from headrace.planning.simulation.one_copy import Simulated
from headrace.planning.timeline import Lane
from headrace.planning.workload import PassTokens, Workload

DECODE_PASSES = 6
RING = 2
"""layers that the host's ring holds between disk and device"""


def simulate_work(form: ClosedForm, work: Workload, *, passes: int = DECODE_PASSES) -> Simulated:
    """Simulate the prefill and `passes` decode passes at this work's mean context; replicas but the sharded run alike.

    Raises RuntimeError where the arrangement cannot go on (no slot for what is due).
    """
    divided = form.arrangement.parallelism
    batches, first, later = form.passes_of(work)
    carried = [first, *[later] * passes]
    if divided.pipeline > 1:
        outcome, ends = _pipeline(form, carried, batches=batches)
        names = [f"stage {number}" for number in range(divided.pipeline)]
    else:
        outcome, ends = (_shard if divided.sharded else _stream)(form, carried)
        names = [*(f"layer {number}" for number in range(form.model.num_layers)), "head"]
    middle = max(1, passes // 2)
    steady = (ends[-1] - ends[middle]) / (len(ends) - 1 - middle) if passes > 1 else ends[-1] - ends[0]
    return Simulated(ends[0], steady, outcome.timeline(names))


def _after(*tasks: int | None) -> list[int]:
    """Those of these tasks that there are."""
    return [task for task in tasks if task is not None]


def _ends_of(schedule: Schedule, passes: Sequence[Sequence[int]]) -> tuple[Execution, list[float]]:
    """Run the schedule; return what happened and when each pass ended, that is the last of its last tasks."""
    outcome = schedule.run()
    return outcome, [max(outcome.ends[number] for number in ended) for ended in passes]


def _streamed(arrangement: Arrangement) -> list[bool]:
    return [placement in TRAVELLING for placement in arrangement.placements[:-1]]


def _stream(form: ClosedForm, carried: Sequence[PassTokens]) -> tuple[Execution, list[float]]:
    """Execute all passes of one copy."""
    arrangement, rates = form.arrangement, form.rates
    by_host = [placement is Placement.CPU for placement in arrangement.placements[:-1]]
    streamed = _streamed(arrangement)
    schedule = Schedule(slots={"slot": max(1, arrangement.slots), "ring": RING, "cache": CACHE_LAYERS_ON_DEVICE})
    copy_lane = "copy" if rates.overlaps_copies else "device"
    disk_lane = "disk" if rates.overlaps_hops else copy_lane
    done: int | None = None
    passes = []
    for pass_index, tokens in enumerate(carried):
        for index, layer in enumerate(form.model.layers()):
            loads = _Loads.of(form, layer, tokens)
            ready = _after(done)
            turn = [] if arrangement.overlap else _after(done)
            slot = ring = cache = None
            if streamed[index]:
                slot = "slot"
                if loads.disk_s:
                    ring = "ring" if arrangement.overlap else None
                    mark = (Lane.READ, index, pass_index)
                    turn = [schedule.add(disk_lane, loads.disk_s, after=turn, takes=ring, mark=mark)]
                mark = (Lane.COPY, index, pass_index)
                ready.append(schedule.add(copy_lane, loads.link_s, after=turn, takes=slot, gives=ring, mark=mark))
            if loads.cache_s and not by_host[index]:
                cache = "cache"
                ready.append(schedule.add(copy_lane, loads.cache_s, after=turn, takes=cache))
            if loads.cold_s:
                ready.append(schedule.add("device", loads.cold_s, after=ready))
            if by_host[index]:
                done = schedule.add("host", form.host_layer_s(layer, tokens), after=ready)
                continue
            seconds = form.layer_seconds(layer, tokens)
            computed = (Lane.COMPUTE, index, pass_index)
            products = schedule.add("device", sum(seconds) - seconds.communication_s, after=ready, mark=computed)
            if seconds.communication_s:  # partial results are added up over the devices before they go on
                products = schedule.add("exchange", seconds.communication_s, after=(products,))
            done = schedule.add("device", 0.0, after=(products,), gives=slot)
            if cache is not None:
                schedule.add(None, after=(done,), gives=cache)
        done = schedule.add("device", form.ends_s(tokens), after=_after(done))
        passes.append([done])
    return _ends_of(schedule, passes)


class _Loads(NamedTuple):
    """What a layer that travels takes on each hop, and what its cache and its missed experts take; seconds."""

    link_s: float
    disk_s: float
    cache_s: float
    cold_s: float

    @classmethod
    def of(cls, form: ClosedForm, layer: Layer, tokens: PassTokens) -> _Loads:
        """Take the averages over all layers apart: weights by the layers that travel, the cache by every layer."""
        with_cache, disk_s, cold_s = form.load_seconds(layer, tokens)
        without = form._replace(arrangement=form.arrangement._replace(cache_on_host=False))
        link_s, _, _ = without.load_seconds(layer, tokens)
        share = form.arrangement.streamed_share or 1.0
        return cls(link_s / share, disk_s / share, with_cache - link_s, cold_s)


def _shard(form: ClosedForm, carried: Sequence[PassTokens]) -> tuple[Execution, list[float]]:
    """Execute all passes on all devices; a pass ends when the last device has ended it."""
    devices, rates = range(form.arrangement.parallelism.replicas), form.rates
    streamed = _streamed(form.arrangement)
    own, *shared = form.machine.path("host")
    link_share = rates.link_bytes_per_s / form.machine.rate("host", sharers=len(devices)).expected
    capacities = {f"host {device}": own.bytes_per_s.expected * link_share for device in devices}
    capacities |= {link.name: link.bytes_per_s.expected * link_share for link in shared}
    capacities["disk"] = rates.read_bytes_per_s
    slots = {f"slot {device}": form.arrangement.slots for device in devices}
    slots |= {f"ring {device}": RING for device in devices}
    schedule = Schedule(capacities=capacities, slots=slots)
    from_disk = form.arrangement.source is Tier.DISK
    done: list[int | None] = [None for _ in devices]
    passes = []
    for pass_index, tokens in enumerate(carried):
        for index, layer in enumerate(form.model.layers()):
            pulled = []
            if streamed[index]:
                part = layer.size_bytes / len(devices)
                for device in devices:
                    after: list[int] = []
                    ring = f"ring {device}" if from_disk else None
                    if from_disk:
                        after = [schedule.add(f"reader {device}", size_bytes=part, path=("disk",), takes=ring)]
                    copied = schedule.add(
                        f"copy {device}",
                        size_bytes=part,
                        path=(f"host {device}", *(link.name for link in shared)),
                        after=after,
                        takes=f"slot {device}",
                        gives=ring,
                        mark=(Lane.READ, index, pass_index) if device == 0 else None,
                    )
                    pulled.append(copied)
                # Each device's part and what it gathers arrive in one lane: its slot is filled by both.
                gather_s = form.gather_s(layer.size_bytes)
                pulled = [schedule.add(f"copy {device}", gather_s, after=pulled) for device in devices]
            layer_s = sum(form.layer_seconds(layer, tokens))
            for device in devices:
                done[device] = schedule.add(
                    f"device {device}",
                    layer_s,
                    after=[*pulled, *_after(done[device])],
                    gives=f"slot {device}" if streamed[index] else None,
                    mark=(Lane.COMPUTE, index, pass_index) if device == 0 else None,
                )
        ends_s = form.ends_s(tokens)
        ended = [schedule.add(f"device {device}", ends_s, after=_after(done[device])) for device in devices]
        done = [*ended]
        passes.append(ended)
    return _ends_of(schedule, passes)


def _pipeline(form: ClosedForm, carried: Sequence[PassTokens], *, batches: int) -> tuple[Execution, list[float]]:
    """Execute all passes of all micro-batches; a pass ends when its last micro-batch leaves the last stage."""
    layers, stages = list(form.model.layers()), form.arrangement.parallelism.pipeline
    per_stage = math.ceil(len(layers) / stages)
    schedule = Schedule()
    last: list[int | None] = [None] * batches
    passes = []
    for pass_index, tokens in enumerate(carried):
        hop_s = form.hop_s(tokens)
        layers_s = [sum(form.layer_seconds(layer, tokens)) for layer in layers]
        times = [sum(layers_s[stage * per_stage : (stage + 1) * per_stage]) for stage in range(stages)]
        times[-1] += form.ends_s(tokens)
        for batch in range(batches):
            at = last[batch]
            for stage, seconds in enumerate(times):
                mark = (Lane.COMPUTE, stage, pass_index)
                computed = schedule.add(f"stage {stage}", seconds, after=_after(at), mark=mark)
                at = schedule.add(None, hop_s, after=(computed,))
            last[batch] = at
        passes.append(_after(*last))
    return _ends_of(schedule, passes)
