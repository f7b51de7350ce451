"""Tokens per second at batch 1 with more and more blocks on the device, and with some computed by the processor."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench_report import spread
from gpu_parts.outcome import Measured, Table
from gpu_parts.stage import Stage
from gpu_parts.timing import decode_cycles_s, generate, some_tokens
from headrace.planning.plan import Placement

COLUMNS = (
    "memory GB", "blocks: device / host / disk / processor", "GB copied per pass", "tokens/s predicted",
    "tokens/s measured", "measured / predicted",
)  # fmt: skip


class Speed(NamedTuple):
    """One load's tokens per second."""

    budget_bytes: int
    blocks: dict[str, int]
    """by place"""
    streamed_bytes_per_pass: int
    predicted_per_s: float
    decode_s: list[float]

    @property
    def measured_per_s(self) -> float:
        """Median."""
        return 1 / statistics.median(self.decode_s)


def measure_residency(stage: Stage) -> Measured:
    """The main shape with shares of its blocks on the device."""
    name = stage.case.main
    found: list[Speed] = []
    for share in stage.case.residency:
        if found and stage.deadline.left_s < stage.rack.seconds(name, loads=1.2):
            break
        whole = share >= 1
        memory = stage.resident_bytes(name) if whole else stage.share_bytes(name, share)
        strategy = "resident" if whole else "overlap"
        found.append(_speed(stage, name, f"{share:.0%} resident", memory=memory, strategy=strategy))
    left_out = stage.case.residency[len(found) :]
    notes = ["No time was left for " + ", ".join(f"{share:.0%}" for share in left_out) + "."] if left_out else []
    return _report(stage, name, found, notes)


def measure_processor(stage: Stage) -> Measured:
    """The main shape in the least memory, with as many layers computed by the processor as the plan thinks fit."""
    name = stage.case.main
    memory = stage.least_bytes(name, "overlap")
    found = [_speed(stage, name, "and processor", memory=memory, strategy="overlap", cpu_blocks=True)]
    notes = (
        []
        if found[0].blocks[Placement.CPU]
        else ["The plan gives the processor no layer here: the link alone is faster."]
    )
    return _report(stage, name, found, notes)


def _speed(stage: Stage, name: str, what: str, *, memory: int, strategy: str, **options: Any) -> Speed:
    with stage.load(name, what=what, memory=memory, strategy=strategy, **options) as model:
        prompt, plan, decode = some_tokens(model, 1, 16), model.headrace.plan, []
        generate(model, prompt, 2)  # brings every block to its place
        for _ in stage.deadline.rounds(2):
            decode += decode_cycles_s(model, prompt, stage.case.new_tokens)
        return Speed(
            memory,
            {place.value: plan.placements.count(place) for place in Placement},
            plan.streamed_bytes_per_pass,
            model.headrace.prediction.tokens_per_s,
            decode,
        )


def _report(stage: Stage, name: str, found: Sequence[Speed], notes: Sequence[str]) -> Measured:
    rows = [
        [
            f"{one.budget_bytes / 1e9:.3g}",
            " / ".join(map(str, one.blocks.values())),
            f"{one.streamed_bytes_per_pass / 1e9:.3g}",
            f"{one.predicted_per_s:.4g}",
            f"**{one.measured_per_s:.4g}**",
            f"{one.measured_per_s / one.predicted_per_s:.2f}",
        ]
        for one in sorted(found, key=lambda one: one.budget_bytes)
    ]
    return Measured(
        tables=[Table(COLUMNS, rows)],
        notes=[f"{name}, batch 1, medians over {stage.case.new_tokens - 2} tokens of each generation.", *notes],
        record={
            "shape": name,
            "rows": [
                {
                    **one._asdict(),
                    "decode_s": spread(one.decode_s),
                    "measured_per_s": one.measured_per_s,
                }
                for one in found
            ],
        },
    )
