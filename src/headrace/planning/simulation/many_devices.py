"""The entry: play a workload through for any arrangement."""

from __future__ import annotations

import math
from dataclasses import dataclass

from headrace.machine.machine import Machine
from headrace.model.model import Model
from headrace.planning.closed_form import mean_context_tokens
from headrace.planning.plan import Arrangement
from headrace.planning.rates import Rates
from headrace.planning.simulation import pipeline, sharded, streaming
from headrace.planning.simulation.event_core import Outcome
from headrace.planning.timeline import Timeline
from headrace.planning.workload import PassTokens, Workload

DECODE_PASSES = 6


@dataclass(frozen=True, kw_only=True)
class SimulatedWork:
    """Seconds of the first pass and of a steady later one, and everything that happened."""

    prefill_s: float
    decode_s_per_pass: float
    outcome: Outcome
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
        outcome, ends = pipeline.run(model, machine, arrangement, carried, rates, batches=batches)
    elif arrangement.parallelism.sharded:
        outcome, ends = sharded.run(model, machine, arrangement, carried, rates)
    else:
        outcome, ends = streaming.run(model, machine, arrangement, carried, rates)
    middle = max(1, passes // 2)
    steady = (ends[-1] - ends[middle]) / (len(ends) - 1 - middle) if passes > 1 else ends[-1] - ends[0]
    stages = arrangement.parallelism.pipeline
    if stages > 1:
        names = [f"stage {number}" for number in range(stages)]
    else:
        names = [*(f"layer {number}" for number in range(model.num_layers)), "head"]
    return SimulatedWork(prefill_s=ends[0], decode_s_per_pass=steady, outcome=outcome, timeline=outcome.timeline(names))
