"""From a plan and a scenario to times: the one function behind every estimate that headrace shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from headrace.machine.quantity import Interval, Quantity, interval_of
from headrace.planning.block_times import PassOverheads, block_times
from headrace.planning.plan import Placement, Plan, Strategy
from headrace.planning.scenario import Scenario
from headrace.planning.simulation.one_copy import PassSchedule, simulate
from headrace.planning.timeline import Timeline

DECODE_PASSES_SIMULATED = 5

READ_RANGE = Quantity(1.0, 0.7, 1.25, "bench/results: raw reads of one file within an hour, against their median")
LIMITED_READ_RANGE = Quantity(1.0, 0.97, 1.01, "bench/results/prediction-steady: reads held at a limit")
COMPUTE_RANGE = Quantity(1.0, 0.9, 1.25, "bench/results/prediction-steady: passes bound by arithmetic")
LINK_RANGE = Quantity(1.0, 0.9, 1.03, "an assumption, until passes bound by a link have been measured on a GPU")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a plan will do. Seconds; tokens per second count all sequences."""

    prefill_s: float
    decode_s_per_pass: float
    tokens_per_s: float
    total_s: float
    binds: str
    """what a decode pass waits for: `disk`, `link`, `compute` (the device's), `cpu`, or `both` in sequence"""
    load_s_per_pass: float
    """the longer of the disk's and the link's seconds"""
    compute_s_per_pass: float
    break_even_tokens_per_pass: float
    """tokens at which computing a pass takes as long as loading what the plan streams; 0 when nothing is streamed"""
    possible_decode_s: float
    """the longest of loading and computing: no schedule is faster"""
    timeline: Timeline


class Candidate(NamedTuple):
    """One way to run, with what it is predicted to do."""

    plan: Plan
    prediction: Prediction


class PredictionInterval(NamedTuple):
    """Seconds and tokens per second, each with its ends."""

    prefill_s: Interval
    decode_s_per_pass: Interval
    tokens_per_s: Interval


def predict(plan: Plan, scenario: Scenario, *, decode_passes: int = DECODE_PASSES_SIMULATED) -> Prediction:
    """Simulate the plan's workload and say what binds."""
    model, rates, work = scenario.model, scenario.known_rates, plan.workload
    overheads = PassOverheads.of(model, work, rates, plan.embedding)
    schedule = PassSchedule(
        blocks=block_times(scenario, plan.placements, workload=work, cache_on_host=plan.cache_on_host),
        placements=plan.placements,
        slots=plan.slots,
        overlap=plan.strategy is not Strategy.SEQUENTIAL,
        ring_pieces=scenario.ring_chunks,
        decode_passes=decode_passes,
        pass_overhead_s=overheads.further_pass_s,
        first_pass_overhead_s=overheads.first_pass_s,
        read_latency_s=rates.read_latency_s,
        stall_penalty_s=rates.stall_penalty_s,
        compute_slowdown=rates.compute_slowdown,
        read_slowdown=rates.read_slowdown,
    )
    simulated = simulate(schedule, [block.name for block in model.blocks])
    demand, decode_s = schedule.demand, simulated.decode_s_per_pass
    load_s = max(demand.read_s, demand.copy_s)
    return Prediction(
        prefill_s=simulated.prefill_s,
        decode_s_per_pass=decode_s,
        tokens_per_s=work.sequences / decode_s,
        total_s=simulated.prefill_s + (work.generate_tokens - 1) * decode_s,
        binds=_binds(schedule),
        load_s_per_pass=load_s,
        compute_s_per_pass=demand.compute_s,
        break_even_tokens_per_pass=break_even_tokens(
            scenario, work.sequences, load_s=load_s, compute_s=demand.compute_s
        ),
        possible_decode_s=max(demand),
        timeline=simulated.timeline,
    )


def prediction_interval(candidate: Candidate, scenario: Scenario) -> PredictionInterval:
    """Predict the same plan with each measured constant at its low and its high end.

    They are the rate of reading, the time of computing and, on an accelerator, the rate of its link. Where reading is
    measured, disks that are shared swing; where it is held at a limit, it is steady. Arithmetic and the link are
    measured just before, so what remains is what other work on the machine takes.
    """
    constants = {"read": LIMITED_READ_RANGE if scenario.read_is_limited else READ_RANGE, "compute": COMPUTE_RANGE}
    if not scenario.on_cpu:
        constants["link"] = LINK_RANGE

    @cache
    def predicted(read: float, compute: float, link: float) -> Prediction:
        if read == compute == link == 1.0:
            return candidate.prediction
        moved_rates = scenario.known_rates.scaled(read=read, compute=compute, link=link)
        return predict(candidate.plan, scenario.at(moved_rates))

    def moved(of: Callable[[Prediction], float]) -> Interval:
        def value(factors: Mapping[str, float]) -> float:
            return of(predicted(factors["read"], factors["compute"], factors.get("link", 1.0)))

        return interval_of(constants, value)

    decode_s = moved(lambda prediction: prediction.decode_s_per_pass)
    sequences = candidate.plan.workload.sequences
    return PredictionInterval(
        prefill_s=moved(lambda prediction: prediction.prefill_s),
        decode_s_per_pass=decode_s,
        tokens_per_s=Interval(
            expected=sequences / decode_s.expected, low=sequences / decode_s.high, high=sequences / decode_s.low
        ),
    )


def break_even_tokens(scenario: Scenario, tokens_now: int, *, load_s: float, compute_s: float) -> float:
    """Tokens per pass at which computing equals loading, by bisection on the curve; 0 where nothing is streamed.

    The curve is scaled so that it passes through the seconds that the prediction uses at the plan's own number of
    tokens. Below the result further tokens are free; above it more bandwidth is.
    """
    if load_s <= 0:
        return 0.0
    rates, blocks = scenario.known_rates, scenario.model.blocks
    kinds = {(block.active_parameters, block.head_rows is None): block for block in blocks}
    numbers = Counter((block.active_parameters, block.head_rows is None) for block in blocks)

    def seconds(count: float) -> float:
        return rates.pass_overhead_s + sum(
            numbers[kind] * rates.block_seconds(block, tokens=count, head_tokens=count) for kind, block in kinds.items()
        )

    factor = compute_s / seconds(tokens_now)
    if factor * seconds(1) >= load_s:
        return load_s / (factor * seconds(1))
    low, high = 1.0, 2.0
    while factor * seconds(high) < load_s:
        low, high = high, high * 2
        if high > 2**40:
            return high
    while high - low > low * 1e-7:  # curves may be steep
        middle = (low + high) / 2
        if factor * seconds(middle) < load_s:
            low = middle
        else:
            high = middle
    return high


def _binds(schedule: PassSchedule) -> str:
    read_s, copy_s, compute_s = schedule.demand
    if max(read_s, copy_s) > 0 and not schedule.overlap:
        return "both"
    placed = list(zip(schedule.blocks, schedule.placements, strict=True))
    if max(read_s, copy_s) > compute_s:
        disk_s = sum(times.read_s for times, placement in placed if placement is Placement.DISK)
        return "disk" if disk_s > max(copy_s, read_s - disk_s) else "link"
    cpu_s = sum(times.decode_s for times, placement in placed if placement is Placement.CPU)
    return "cpu" if cpu_s > compute_s - cpu_s else "compute"
