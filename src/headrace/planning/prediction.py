"""From a plan and a scenario to times: the one function behind every estimate that headrace shows.

Where rates were measured, a plan of one device is simulated; a described machine's, and every plan over several
devices, has a closed form. Both are functions of constants with ranges, so that each prediction has an interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

from headrace.machine.quantity import Interval, Quantity, interval_of
from headrace.planning.block_times import block_times, pass_overheads
from headrace.planning.closed_form import ClosedForm, least_tokens
from headrace.planning.described_rates import fastest_values, quantities
from headrace.planning.plan import Placement, Plan
from headrace.planning.scenario import Scenario
from headrace.planning.simulation.many_devices import simulate_work
from headrace.planning.simulation.one_copy import PassSchedule, pass_seconds, simulate
from headrace.planning.strategies import RUNNABLE, Strategy
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
    """what a decode pass waits for most: `disk`, `link`, `compute` or a part of it, `cpu`, or `both` in sequence"""
    load_s_per_pass: float
    """the longer of the disk's and the link's seconds"""
    compute_s_per_pass: float
    possible_decode_s: float
    """the longest of loading and computing: no schedule is faster"""
    break_even_tokens_per_pass: float = 0.0
    """of a simulated plan, the tokens at which computing a pass takes as long as loading what it streams; 0: nothing"""
    prefill_parts_s: Mapping[str, float] = field(default_factory=dict)
    """seconds by resource"""
    decode_parts_s: Mapping[str, float] = field(default_factory=dict)


class Candidate(NamedTuple):
    """One way to run, with what it is predicted to do."""

    plan: Plan
    prediction: Prediction


class PredictionInterval(NamedTuple):
    """Seconds and tokens per second, each with its ends."""

    prefill_s: Interval
    decode_s_per_pass: Interval
    tokens_per_s: Interval
    total_s: Interval


Values = Mapping[str, float]
"""a choice of values of a plan's constants, by name"""


def predict(plan: Plan, scenario: Scenario, values: Values | None = None) -> Prediction:
    """Predict at the expected values of the plan's constants, or at others.

    Raises MachineError where the machine lacks a link that the plan needs.
    """
    if is_simulated(plan, scenario):
        factors = values or {}
        rates = scenario.known_rates
        if any(factor != 1.0 for factor in factors.values()):
            rates = rates.scaled(**factors)
        return _simulated(plan, scenario.at(rates))
    return _closed_form(plan, scenario, values)


def is_simulated(plan: Plan, scenario: Scenario) -> bool:
    """Whether the plan is played block by block with measured rates."""
    return scenario.is_calibrated and plan.strategy in RUNNABLE and plan.parallelism.devices == 1


def constants(plan: Plan, scenario: Scenario) -> dict[str, Quantity]:
    """The uncertain constants of a plan's prediction, by name.

    Of measured rates they are factors: on reading, computing and, to an accelerator, the link. Where reading is
    measured, disks that are shared swing; where it is held at a limit, it is steady. Arithmetic and the link are
    measured just before, so what remains is what other work on the machine takes. Where there was such work meanwhile,
    it may have ended since, or have grown as much again.
    """
    if not is_simulated(plan, scenario):
        return quantities(scenario, plan.arrangement)
    rest, why = 1 - scenario.busy, "what others had of the machine while it was measured"
    limited = LIMITED_READ_RANGE.widened(low=rest, why=why)  # still no faster than the limit
    read = limited if scenario.read_is_limited else READ_RANGE.widened(low=rest, high=1 / rest, why=why)
    found = {"read": read, "compute": COMPUTE_RANGE.widened(low=rest, high=1 / rest, why=why)}
    return found if scenario.on_cpu else {**found, "link": LINK_RANGE}


def prediction_interval(candidate: Candidate, scenario: Scenario) -> PredictionInterval:
    """Predict the same plan with each of its constants at its low and its high end.

    A described machine bounds the low end: software may be better than any known, the hardware is no faster.
    """
    plan, ranges = candidate.plan, constants(candidate.plan, scenario)
    fastest = None if is_simulated(plan, scenario) else predict(plan, scenario, fastest_values(ranges))
    expected = tuple(constant.expected for constant in ranges.values())

    @cache
    def at(values: tuple[float, ...]) -> Prediction:
        if values == expected:
            return candidate.prediction
        return predict(plan, scenario, dict(zip(ranges, values, strict=True)))

    def moved(of: Callable[[Prediction], float]) -> Interval:
        found = interval_of(ranges, lambda values: of(at(tuple(values[name] for name in ranges))))
        return found if fastest is None else replace(found, low=max(found.low, of(fastest)))

    decode_s = moved(lambda prediction: prediction.decode_s_per_pass)
    tokens = candidate.prediction.tokens_per_s * decode_s.expected
    return PredictionInterval(
        prefill_s=moved(lambda prediction: prediction.prefill_s),
        decode_s_per_pass=decode_s,
        tokens_per_s=decode_s.dividing(tokens),
        total_s=moved(lambda prediction: prediction.total_s),
    )


def timeline_of(candidate: Candidate, scenario: Scenario) -> Timeline:
    """The events of the first pass and some decode passes: as simulated, or a closed form's schedule executed."""
    plan = candidate.plan
    if is_simulated(plan, scenario):
        return simulate(_schedule(plan, scenario), [block.name for block in scenario.model.blocks]).timeline
    return simulate_work(ClosedForm.of(scenario, plan.arrangement), plan.workload).timeline


# -- measured rates: simulated ------------------------------------------------------------------------------------


def _simulated(plan: Plan, scenario: Scenario) -> Prediction:
    """Play the plan's workload block by block and say what binds."""
    work, schedule = plan.workload, _schedule(plan, scenario)
    simulated = pass_seconds(schedule)
    demand, decode_s, tokens_per_pass = schedule.demand, simulated.decode_s_per_pass, 1.0
    if scenario.speculation is not None:
        decode_s *= 1.0 + scenario.speculation.draft_s_share
        tokens_per_pass = scenario.speculation.tokens_per_pass
    load_s = max(demand.read_s, demand.copy_s)
    placed = list(zip(schedule.blocks, schedule.placements, strict=True))
    disk_s = sum(times.read_s for times, placement in placed if placement is Placement.DISK)
    cpu_s = sum(times.decode_s for times, placement in placed if placement is Placement.CPU)
    link_s = max(demand.copy_s, demand.read_s - disk_s)
    return Prediction(
        prefill_s=simulated.prefill_s,
        decode_s_per_pass=decode_s,
        tokens_per_s=work.sequences * tokens_per_pass / decode_s,
        total_s=simulated.prefill_s + (work.generate_tokens - 1) / tokens_per_pass * decode_s,
        binds=_binds(disk_s=disk_s, link_s=link_s, load_s=load_s, cpu_s=cpu_s, schedule=schedule),
        load_s_per_pass=load_s,
        compute_s_per_pass=demand.compute_s,
        break_even_tokens_per_pass=break_even_tokens(
            scenario, work.sequences * scenario.tokens_checked, load_s=load_s, compute_s=demand.compute_s
        ),
        possible_decode_s=max(demand),
        decode_parts_s={"compute": demand.compute_s - cpu_s, "cpu": cpu_s, "link": link_s, "disk": disk_s},
    )


def _schedule(plan: Plan, scenario: Scenario) -> PassSchedule:
    """What the plan's workload takes of each resource, block by block."""
    rates, work = scenario.known_rates, plan.workload
    first_s, further_s = pass_overheads(scenario.model, work, rates, plan.embedding)
    return PassSchedule(
        blocks=block_times(scenario, plan.placements, workload=work, cache_on_host=plan.cache_on_host),
        placements=plan.placements,
        slots=plan.slots,
        overlap=plan.strategy is not Strategy.SEQUENTIAL,
        ring_pieces=scenario.ring_chunks,
        decode_passes=DECODE_PASSES_SIMULATED,
        pass_overhead_s=further_s,
        first_pass_overhead_s=first_s,
        read_latency_s=rates.read_latency_s,
        stall_penalty_s=rates.stall_penalty_s,
        compute_slowdown=rates.compute_slowdown,
        read_slowdown=rates.read_slowdown,
    )


def first_pass_s(plan: Plan, scenario: Scenario) -> float:
    """Seconds of the first pass as `predict` finds them, which alone are found in a fraction of the time."""
    return pass_seconds(replace(_schedule(plan, scenario), decode_passes=0)).prefill_s


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
    # Curves may be steep; and beyond all sense it is a number still, which JSON can hold.
    return min(2.0**41, least_tokens(lambda count: factor * seconds(count) >= load_s, tolerance=1e-7))


def _binds(*, disk_s: float, link_s: float, load_s: float, cpu_s: float, schedule: PassSchedule) -> str:
    compute_s = schedule.demand.compute_s
    if load_s > 0 and not schedule.overlap:
        return "both"
    if load_s > compute_s:
        return "disk" if disk_s > link_s else "link"
    return "cpu" if cpu_s > compute_s - cpu_s else "compute"


# -- a described machine: closed form -----------------------------------------------------------------------------


def _closed_form(plan: Plan, scenario: Scenario, values: Values | None) -> Prediction:
    arrangement = plan.arrangement
    cost = ClosedForm.of(scenario, arrangement, values).work(plan.workload, scenario.speculation)
    decode = cost.decode
    return Prediction(
        prefill_s=cost.prefill_s,
        decode_s_per_pass=cost.decode_s_per_pass,
        tokens_per_s=cost.tokens_per_s,
        total_s=cost.total_s,
        binds=decode.binds(overlap=arrangement.overlap),
        load_s_per_pass=decode.load_s,
        compute_s_per_pass=decode.busy_s,
        possible_decode_s=max(decode.load_s, decode.busy_s),
        prefill_parts_s=cost.prefill.parts,
        decode_parts_s=decode.parts,
    )
