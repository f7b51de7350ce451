"""Stages on devices of their own, micro-batches passing through them; a token's next pass waits for its own last."""

from __future__ import annotations

import math
from collections.abc import Sequence

from headrace.machine.machine import Machine
from headrace.model.model import Model
from headrace.planning.closed_form import hop_s, layer_seconds, pass_ends_s
from headrace.planning.plan import Arrangement
from headrace.planning.rates import Rates
from headrace.planning.simulation.event_core import Mark, Outcome, Schedule
from headrace.planning.timeline import Lane
from headrace.planning.workload import PassTokens


def run(
    model: Model,
    machine: Machine,
    arrangement: Arrangement,
    carried: Sequence[PassTokens],
    rates: Rates,
    *,
    batches: int,
) -> tuple[Outcome, list[float]]:
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
