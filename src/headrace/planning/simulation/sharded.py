"""Bandwidth-centric sharding: each device pulls its part of a layer, all gather, each computes its own batch.

The parts travel over each device's own link and over whatever uplinks these share, at the same time; bytes that share
an uplink share it fairly. A device computes a layer when all parts have been gathered.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.machine.machine import Machine, Tier
from headrace.model.model import Model
from headrace.planning import collectives
from headrace.planning.closed_form import layer_seconds, pass_ends_s
from headrace.planning.plan import TRAVELLING, Arrangement
from headrace.planning.rates import Rates
from headrace.planning.simulation.event_core import Mark, Outcome, Schedule
from headrace.planning.simulation.streaming import RING
from headrace.planning.timeline import Lane
from headrace.planning.workload import PassTokens


def run(
    model: Model, machine: Machine, arrangement: Arrangement, carried: Sequence[PassTokens], rates: Rates
) -> tuple[Outcome, list[float]]:
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
