"""One copy of a model: resident, streamed in turn or ahead, partly computed by the host; its width split or not.

    disk lane:    read layer j into the host's ring            (waits for a place in the ring)
    copy lane:    copy layer j to a slot of the device         (waits for its read and for a slot)
    device lane:  compute layer j                              (waits for its copy and for layer j-1); frees the slot

Loading goes on over the end of a pass into the next one. In sequence the three follow one another, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.machine.machine import Machine
from headrace.model.model import Layer, Model
from headrace.planning.closed_form import host_layer_s, layer_seconds, load_seconds, pass_ends_s
from headrace.planning.memory import CACHE_LAYERS_ON_DEVICE
from headrace.planning.plan import TRAVELLING, Arrangement, Placement
from headrace.planning.rates import Rates
from headrace.planning.simulation.event_core import Mark, Outcome, Schedule
from headrace.planning.timeline import Lane
from headrace.planning.workload import PassTokens

RING = 2
"""layers that the host's ring holds between disk and device"""


def run(
    model: Model, machine: Machine, arrangement: Arrangement, carried: Sequence[PassTokens], rates: Rates
) -> tuple[Outcome, list[float]]:
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
