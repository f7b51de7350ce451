"""The parts in the order of their importance, and about how long each takes: one that would not fit is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gpu_parts.compiled import measure_compiled
from gpu_parts.disk import measure_disk
from gpu_parts.exactness import measure_exactness
from gpu_parts.outcome import Measured
from gpu_parts.overlap import measure_overlap
from gpu_parts.residency import measure_processor, measure_residency
from gpu_parts.rivals import measure_rivals
from gpu_parts.stage import Stage
from gpu_parts.streaming import measure_large, measure_link


class Part(NamedTuple):
    """Something to measure. `needs_s`: seconds it takes at least, by what is known when its turn comes."""

    name: str
    title: str
    run: Callable[[Stage], Measured]
    needs_s: Callable[[Stage], float]


def _small(fixed_s: float, loads: float) -> Callable[[Stage], float]:
    return lambda stage: stage.needs_s(fixed_s) + stage.rack.seconds(stage.case.small, loads=loads)


def _main(fixed_s: float, loads: float) -> Callable[[Stage], float]:
    return lambda stage: stage.needs_s(fixed_s) + stage.rack.seconds(stage.case.main, loads=loads)


PARTS = (
    Part("exactness", "Exactness", measure_exactness, _small(25, 8)),
    Part("link", "The link while streaming", measure_link, _main(15, 1)),
    Part("overlap", "Loading behind computing", measure_overlap, _main(35, 2)),
    Part("rivals", "Against others", measure_rivals, _main(25, 2)),
    Part("large", "A model larger than the device", measure_large, lambda stage: stage.needs_s(50)),
    Part("residency", "Blocks that stay on the device", measure_residency, _main(10, 2)),
    Part("processor", "Layers computed by the processor", measure_processor, _main(15, 1)),
    Part("disk", "From the disk", measure_disk, _main(8, 3)),
    Part("compiled", "Compiled layers", measure_compiled, _small(45, 2)),
)
