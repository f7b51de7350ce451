"""Every arrangement worth considering for a model on a machine, by the name of its strategy.

Numbers of devices run over the divisors of what there is; how much stays resident is computed from the memory, since
more is never slower. The planner evaluates each; there are a few hundred at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from headrace.machine.machine import Machine, Tier
from headrace.model.model import Model
from headrace.planning.arrangement import Arrangement
from headrace.planning.memory_need import memory_need, usable_bytes
from headrace.planning.workload import Workload

STRATEGIES = {
    "resident": "all weights on one device",
    "sequential": "load a layer, compute it, drop it",
    "overlap": "the next layers load while one computes; what fits stays",
    "cpu": "the host's processor computes from its own memory",
    "hybrid": "the device computes what it holds, the host's processor the rest where it lies",
    "experts": "of each layer the experts stay as far as they fit, others are fetched when they are needed",
    "tensor": "every layer's width is split over devices",
    "tensor-2d": "every layer's width is split in two directions",
    "pipeline": "each device holds some of the layers",
    "tensor+pipeline": "stages of layers, each split by width",
    "tensor+overlap": "split by width, and each device streams its part of the layers that do not fit",
    "sharded": "each device pulls a part of every layer over its own link and gathers the others'",
}
_SLOTS = (2, 3)
_STEPS = 16
"""into how many parts the layers are divided when a share is searched"""


def candidates(
    strategy: str, model: Model, machine: Machine, work: Workload, *, device_bytes: float
) -> Iterator[Arrangement]:
    """Arrangements of one strategy; `device_bytes` is what each device may hold."""
    for arrangement in _bare(strategy, model, machine, work):
        for tier in (Tier.DEVICE, Tier.HOST) if machine.host is not None else (Tier.DEVICE,):
            placed = replace(arrangement, kv_tier=tier) if tier is not arrangement.kv_tier else arrangement
            if tier is Tier.HOST and (strategy in {"cpu", "pipeline", "tensor-2d", "tensor+pipeline"}):
                continue
            yield from _filled(placed, model, machine, work, device_bytes)


def _bare(strategy: str, model: Model, machine: Machine, work: Workload) -> Iterator[Arrangement]:
    """Arrangements before it is known how much stays."""
    sources = [tier for tier in (Tier.HOST, Tier.DISK) if usable_bytes(machine, tier) > 0]
    counts = _divisors(machine.num_devices)
    per_node = _divisors(machine.devices)
    if strategy == "resident":
        for replicas in _replicas(machine.num_devices, work):
            yield Arrangement(strategy=strategy, replicas=replicas)
    elif strategy in {"sequential", "overlap"}:
        overlap = strategy == "overlap"
        for source in sources:
            for replicas in _replicas(machine.devices, work):
                for slots in _SLOTS if overlap else (1,):
                    yield Arrangement(
                        strategy=strategy,
                        source=source,
                        overlap=overlap,
                        slots=slots,
                        resident_share=0.0,
                        replicas=replicas,
                    )
    elif strategy == "cpu" and machine.host is not None:
        yield Arrangement(strategy=strategy, source=Tier.HOST, resident_share=0.0, cpu_share=1.0)
    elif strategy == "hybrid" and machine.host is not None:
        for step in range(1, _STEPS):
            yield Arrangement(strategy=strategy, source=Tier.HOST, slots=2, resident_share=0.0, cpu_share=step / _STEPS)
    elif strategy == "experts" and any(group.layer.num_experts for group in model.groups):
        for source in sources:
            yield Arrangement(strategy=strategy, source=source, slots=0, expert_hit_rate=0.0)
    elif strategy in {"tensor", "tensor-2d"}:
        for width in counts:
            if width < (16 if strategy == "tensor-2d" else 2) or not _divides(model, width):
                continue
            for replicas in _replicas(machine.num_devices // width, work):
                yield Arrangement(
                    strategy=strategy,
                    tensor=width,
                    replicas=replicas,
                    two_dimensional=strategy == "tensor-2d",
                )
    elif strategy in {"pipeline", "tensor+pipeline"}:
        for stages in counts:
            if stages < 2 or stages > model.num_layers:
                continue
            widths = [1] if strategy == "pipeline" else [n for n in per_node if n > 1 and _divides(model, n)]
            for width in widths:
                if stages * width > machine.num_devices:
                    continue
                for replicas in _replicas(machine.num_devices // (stages * width), work):
                    share = math.ceil(work.sequences / replicas)
                    for batches in {1, min(stages, share), min(2 * stages, share)}:
                        yield Arrangement(
                            strategy=strategy, tensor=width, pipeline=stages, micro_batches=batches, replicas=replicas
                        )
    elif strategy == "tensor+overlap":
        for source in sources:
            for width in per_node:
                if width > 1 and _divides(model, width):
                    yield Arrangement(strategy=strategy, source=source, slots=2, resident_share=0.0, tensor=width)
    elif strategy == "sharded":
        for source in sources:
            for replicas in per_node:
                if 1 < replicas <= work.sequences:
                    yield Arrangement(
                        strategy=strategy, source=source, slots=2, resident_share=0.0, replicas=replicas, sharded=True
                    )


def _filled(
    arrangement: Arrangement, model: Model, machine: Machine, work: Workload, device_bytes: float
) -> Iterator[Arrangement]:
    """Let as much stay on the device as its memory allows; what does not fit at all is passed on, to be refused."""
    layers = model.num_layers

    def fits(tried: Arrangement) -> bool:
        return memory_need(model, machine, tried, work).device_bytes <= device_bytes

    if arrangement.expert_hit_rate is not None:
        yield _most(lambda share: replace(arrangement, expert_hit_rate=share), 1.0, fits)
    elif arrangement.source is Tier.DEVICE or arrangement.cpu_share >= 1:
        yield arrangement
    else:
        # As many layers travel as there are slots; only what the host computes need not travel at all.
        most = 1.0 - (arrangement.cpu_share or arrangement.slots / layers)
        if most <= 0:
            yield arrangement
            return
        yield _most(lambda share: replace(arrangement, resident_share=share), most, fits, steps=layers)


def _most(
    placed: Callable[[float], Arrangement], most: float, fits: Callable[[Arrangement], bool], *, steps: int = 0
) -> Arrangement:
    """Return the arrangement with the largest share up to `most` that fits (in whole `steps`), or with none."""
    if fits(placed(most)):
        return placed(most)
    low, high = 0.0, most
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(placed(middle)) else (low, middle)
    return placed(math.floor(low * steps + 1e-9) / steps if steps else low)


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
