"""The arrangements of a described machine worth considering, by strategy.

Numbers of devices run over the divisors of what there is; how much stays resident is computed from the memory, since
more is never slower. The planner evaluates each by its closed form; there are a few hundred at most.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from headrace.machine.machine import Machine, Tier
from headrace.model.model import Model
from headrace.planning.memory import described_memory
from headrace.planning.plan import ONE_DEVICE, Arrangement, Parallelism, Placement, arranged
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from headrace.planning.workload import Workload

_SLOTS = (2, 3)
_STEPS = 16
"""into how many parts the layers are divided when a number of the CPU's layers is searched"""
_KEEPS_CACHE = (Strategy.CPU, Strategy.PIPELINE, Strategy.TENSOR_2D, Strategy.TENSOR_PIPELINE)
"""strategies in which keys and values stay with what computes the layer"""


def candidates(scenario: Scenario, strategy: Strategy) -> Iterator[Arrangement]:
    """Arrangements of one strategy, each with as much resident as fits, also those that do not fit at all."""
    machine = scenario.described_machine
    for bare in _bare(strategy, scenario.model, machine, scenario.workload):
        for cache_on_host in (False, True) if machine.host is not None and strategy not in _KEEPS_CACHE else (False,):
            yield _filled(bare._replace(cache_on_host=cache_on_host), scenario)


def _bare(strategy: Strategy, model: Model, machine: Machine, work: Workload) -> Iterator[Arrangement]:
    """Arrangements before it is known how much stays: nothing but what the strategy itself keeps."""
    layers = model.num_layers
    sources = [
        placement
        for placement, tier in ((Placement.HOST, Tier.HOST), (Placement.DISK, Tier.DISK))
        if machine.usable_bytes(tier) > 0
    ]

    def held(**division: int | bool) -> Arrangement:
        return arranged(layers, parallelism=Parallelism(**division))  # type: ignore[arg-type]

    def streamed(source: Placement, slots: int = 2, parallelism: Parallelism = ONE_DEVICE) -> Arrangement:
        return arranged(layers, resident=0, source=source, slots=slots, parallelism=parallelism)

    counts, per_node = _divisors(machine.num_devices), _divisors(machine.devices)
    if strategy is Strategy.RESIDENT:
        for replicas in _replicas(machine.num_devices, work):
            yield held(replicas=replicas)
    elif strategy in (Strategy.SEQUENTIAL, Strategy.OVERLAP):
        for source in sources:
            for replicas in _replicas(machine.devices, work):
                for slots in _SLOTS if strategy is Strategy.OVERLAP else (1,):
                    yield streamed(source, slots, Parallelism(replicas=replicas))
    elif strategy is Strategy.CPU and machine.host is not None:
        yield arranged(layers, cpu=layers)
    elif strategy is Strategy.HYBRID and machine.host is not None:
        for number in sorted({round(layers * step / _STEPS) for step in range(1, _STEPS)} - {0, layers}):
            yield arranged(layers, cpu=number, resident=0)
    elif strategy is Strategy.EXPERTS and any(group.layer.num_experts for group in model.groups):
        for source in sources:
            yield held()._replace(expert_hit_rate=0.0, expert_source=source)
    elif strategy in (Strategy.TENSOR, Strategy.TENSOR_2D):
        two_dimensional = strategy is Strategy.TENSOR_2D
        for width in counts:
            if width >= (16 if two_dimensional else 2) and _divides(model, width):
                for replicas in _replicas(machine.num_devices // width, work):
                    yield held(tensor=width, replicas=replicas, two_dimensional=two_dimensional)
    elif strategy in (Strategy.PIPELINE, Strategy.TENSOR_PIPELINE):
        widths = [1] if strategy is Strategy.PIPELINE else [n for n in per_node if n > 1 and _divides(model, n)]
        for stages in counts:
            for width in widths if 2 <= stages <= layers else ():
                if stages * width <= machine.num_devices:
                    for replicas in _replicas(machine.num_devices // (stages * width), work):
                        share = math.ceil(work.sequences / replicas)
                        for batches in {1, min(stages, share), min(2 * stages, share)}:
                            yield held(tensor=width, pipeline=stages, micro_batches=batches, replicas=replicas)
    elif strategy is Strategy.TENSOR_OVERLAP:
        for source in sources:
            for width in per_node:
                if width > 1 and _divides(model, width):
                    yield streamed(source, parallelism=Parallelism(tensor=width))
    elif strategy is Strategy.SHARDED:
        for source in sources:
            for replicas in per_node:
                if 1 < replicas <= work.sequences:
                    yield streamed(source, parallelism=Parallelism(replicas=replicas, sharded=True))


def _filled(bare: Arrangement, scenario: Scenario) -> Arrangement:
    """Let as much stay on the device as its memory allows, or as an asked hit rate says."""
    if bare.expert_hit_rate is not None:
        if scenario.expert_hit_rate is not None:
            return bare._replace(expert_hit_rate=scenario.expert_hit_rate)
        share = largest_share(lambda share: bare._replace(expert_hit_rate=share), scenario)
        return bare._replace(expert_hit_rate=share)
    layers = scenario.model.num_layers
    cpu = bare.placements.count(Placement.CPU)
    if not bare.travelling:
        return bare
    # As many layers travel as there are slots; only what the CPU computes need not travel at all.
    most = layers - cpu if cpu else layers - bare.slots
    if most <= 0:
        return bare
    source = Placement.DISK if Placement.DISK in bare.placements else Placement.HOST

    def keeping(number: int) -> Arrangement:
        return arranged(
            layers,
            resident=number,
            cpu=cpu,
            source=source,
            slots=bare.slots,
            cache_on_host=bare.cache_on_host,
            parallelism=bare.parallelism,
        )

    if device_fits(scenario, keeping(most)):
        return keeping(most)
    more = range(1, most)
    return keeping(bisect.bisect_left(more, x=True, key=lambda number: not device_fits(scenario, keeping(number))))


def device_fits(scenario: Scenario, arrangement: Arrangement) -> bool:
    """Whether each device holds its part within the budget."""
    return described_memory(scenario, arrangement).device.total_bytes <= scenario.budget_bytes


def largest_share(placed: Callable[[float], Arrangement], scenario: Scenario) -> float:
    """The largest share from 0 to 1 whose arrangement fits on the device; 0 where none does."""
    if device_fits(scenario, placed(1.0)):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if device_fits(scenario, placed(middle)) else (low, middle)
    return low


def with_devices(machine: Machine, count: int) -> Machine | None:
    """Give a machine `count` devices: in one node as far as its node goes, then in whole nodes; None where neither."""
    in_node = machine.devices
    if count <= in_node:
        return replace(machine, devices=count, nodes=1)
    if machine.nodes == 1 and in_node == 1 and "scale_up" in machine.links and count <= 8:
        return replace(machine, devices=count)
    if count % in_node or "network" not in machine.links:
        return None
    return replace(machine, nodes=count // in_node)


def _divides(model: Model, width: int) -> bool:
    """Whether attention heads can be split into `width` equal parts."""
    return all(group.layer.query_heads % width == 0 for group in model.groups)


def _divisors(number: int) -> list[int]:
    """Return divisors in ascending order; of large numbers only those that are reached by halving, and a few more."""
    if number <= 4096:
        return [n for n in range(1, number + 1) if number % n == 0]
    return sorted({number // 2**k for k in range(number.bit_length()) if number % 2**k == 0} | {1, 2, 4, 8})


def _replicas(most: int, work: Workload) -> list[int]:
    """Numbers of copies that share the sequences: one, and as many as there is work for."""
    return sorted({1, max(1, min(most, work.sequences))})
