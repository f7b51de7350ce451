"""The largest batch that a machine serves at a promised speed, and what each device then writes per second."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from headrace.errors import InvalidRequestError, MachineError
from headrace.machine.machine import Machine, Tier
from headrace.machine.quantity import Interval
from headrace.planning.infeasible import narrower
from headrace.planning.plan import Arrangement
from headrace.planning.planner import described_candidates
from headrace.planning.prediction import Candidate, Prediction, PredictionInterval, prediction_interval
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from headrace.units import format_bytes

HELD = (Strategy.RESIDENT, Strategy.TENSOR, Strategy.PIPELINE, Strategy.TENSOR_PIPELINE, Strategy.TENSOR_2D)
"""strategies whose weights stay on the devices: tried first, as one that streams never writes more per device"""
STREAMED = (
    Strategy.EXPERTS,
    Strategy.OVERLAP,
    Strategy.TENSOR_OVERLAP,
    Strategy.SHARDED,
    Strategy.CPU,
    Strategy.HYBRID,
)
_MOST_SEQUENCES = 2**20
_WORTH = 1.001
"""a larger batch must bring at least this much"""


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What every reader is promised; None: nothing is (offline work)."""

    tokens_per_s: float | None = None
    """speed at which each reader sees tokens come"""
    first_token_s: float | None = None

    def __post_init__(self) -> None:
        for what, value in (("tokens per second", self.tokens_per_s), ("seconds to the first", self.first_token_s)):
            if value is not None and not 0 < value < math.inf:
                raise InvalidRequestError(f"a promise of {value} {what} is invalid; it must be more than 0 and finite")

    def kept_by(self, predicted: Prediction) -> bool:
        """Whether readers get it at the expected values."""
        slow = self.tokens_per_s is not None and predicted.decode_s_per_pass * self.tokens_per_s > 1
        late = self.first_token_s is not None and predicted.prefill_s > self.first_token_s
        return not slow and not late


@dataclass(frozen=True, kw_only=True)
class Service:
    """The best arrangement found, with its batch over all devices of the machine."""

    candidate: Candidate
    interval: PredictionInterval
    sequences: int
    devices: int
    """devices that this batch takes: those it uses, or the whole machine where they share links"""
    tokens_per_s_per_device: Interval
    """generated tokens, the time to read the prompts included"""
    prompt_tokens_per_s_per_device: Interval
    """while prompts are read"""
    reader_tokens_per_s: Interval
    filled_share: float
    """share of the cache's room that is taken"""


def best_service(scenario: Scenario, promise: Promise, *, sequences: int | None = None) -> Service:
    """Find it; `sequences` fixes the batch. Raises MachineError where nothing fits or no promise can be kept."""
    best = _best(scenario, promise, sequences)
    if best is None:
        raise MachineError(_refusal(scenario, promise, sequences))
    _, count, found = best
    asked = scenario.batch(count)
    interval = prediction_interval(found, asked)
    devices = _devices(scenario, found.plan.arrangement)
    tokens = count * asked.workload.generate_tokens / devices
    memory = found.plan.memory
    room = scenario.budget_bytes - memory.total_bytes + memory.kv_cache_bytes
    return Service(
        candidate=found,
        interval=interval,
        sequences=count,
        devices=devices,
        tokens_per_s_per_device=interval.total_s.dividing(tokens),
        prompt_tokens_per_s_per_device=interval.prefill_s.dividing(count * asked.workload.prompt_tokens / devices),
        reader_tokens_per_s=interval.decode_s_per_pass.dividing(1.0),
        filled_share=min(1.0, max(0.0, memory.kv_cache_bytes / room)) if room > 0 else 1.0,
    )


_Found = tuple[float, int, Candidate]
"""tokens per second and device, sequences, how"""


def _best(scenario: Scenario, promise: Promise, sequences: int | None) -> _Found | None:
    def best_of(strategy: Strategy) -> _Found | None:
        if sequences is None:
            return _largest(scenario, strategy, promise)
        return _at(scenario, strategy, promise, sequences)

    for strategies in (HELD, STREAMED):
        found = [best for best in map(best_of, strategies) if best is not None]
        if found:
            return max(found, key=lambda item: (item[0], -item[2].plan.parallelism.devices))
    return None


def _largest(scenario: Scenario, strategy: Strategy, promise: Promise) -> _Found | None:
    """Double the batch for as long as that is kept and pays, then look between the last two."""
    best: _Found | None = None
    count, failed = 1, 0
    while count <= _MOST_SEQUENCES and failed < _patience(scenario.described_machine, best):
        found = _at(scenario, strategy, promise, count)
        if found is None or (best is not None and found[0] < best[0] * _WORTH):
            failed += 1
        else:
            best, failed = found, 0
        count *= 2
    if best is None:
        return None
    low, high = best[1], best[1] * 2
    for _ in range(5):
        middle = (low + high) // 2
        if middle == low:
            break
        found = _at(scenario, strategy, promise, middle)
        if found is not None and found[0] > best[0]:
            best, low = found, middle
        else:
            high = middle
    return best


def _patience(machine: Machine, best: _Found | None) -> int:
    """Doublings without success: where sequences are fewer than devices, some strategies are not to be had yet."""
    return 1 if best is not None else machine.num_devices.bit_length() + 1


def _at(scenario: Scenario, strategy: Strategy, promise: Promise, sequences: int) -> _Found | None:
    asked = scenario.batch(sequences)
    best: _Found | None = None
    for item in _fitting(asked, strategy):
        if promise.kept_by(item.prediction):
            devices = _devices(asked, item.plan.arrangement)
            rate = sequences * asked.workload.generate_tokens / item.prediction.total_s / devices
            if best is None or rate > best[0]:
                best = (rate, sequences, item)
    return best


def _fitting(scenario: Scenario, strategy: Strategy) -> Iterator[Candidate]:
    """Every plan of a strategy that fits, at its expected times."""
    return (item for item in described_candidates(scenario, strategy) if isinstance(item, Candidate))


def _devices(scenario: Scenario, arrangement: Arrangement) -> int:
    """Devices that cannot do the same once more: the whole machine where links or the host are shared."""
    alone = arrangement.source is Tier.DEVICE and not arrangement.cache_on_host and not arrangement.cpu_share
    return arrangement.parallelism.devices if alone else scenario.described_machine.num_devices


# -- refusals -----------------------------------------------------------------------------------------------------


def _refusal(scenario: Scenario, promise: Promise, sequences: int | None) -> str:
    """Say what was asked, what was found, and the smallest change that would make it fit."""
    who = f"{scenario.model.name} on {scenario.described_machine.name}"
    fastest = _best_speed(scenario, sequences)
    changes = _changes(scenario, promise, sequences)
    if fastest is None:
        model, machine, work = scenario.model, scenario.described_machine, scenario.workload
        cache_bytes = model.kv_cache_bytes(sequences=sequences or 1, context_tokens=work.context_tokens)
        return (
            f"{who} fits in no way: its weights take {format_bytes(model.weights_bytes)} and the cache of a batch of "
            f"{sequences or 1} {format_bytes(cache_bytes)}; its devices may hold "
            f"{format_bytes(scenario.budget_bytes * machine.num_devices)}, its hosts' memory "
            f"{format_bytes(scenario.host_budget_bytes * machine.nodes)}. "
            + (
                f"Try {'; or '.join(changes)}"
                if changes
                else "More of these devices, and weights in 8 or 4 bits, were tried and do not suffice"
            )
        )
    predicted = fastest.prediction
    wanted = []
    if promise.tokens_per_s is not None:
        wanted.append(
            f"{promise.tokens_per_s:g} tokens/s per reader were asked for, and "
            f"{1 / predicted.decode_s_per_pass:.3g} is the most"
        )
    if promise.first_token_s is not None:
        wanted.append(f"a first token within {promise.first_token_s:g} s, and {predicted.prefill_s:.3g} s is the least")
    what = "; ".join(wanted)
    return f"{who} fits but misses the target: {what}. Try {'; or '.join(['a lower --slo', *changes])}"


def _best_speed(scenario: Scenario, sequences: int | None) -> Candidate | None:
    asked = scenario.batch(sequences or 1)
    every = [item for strategy in (*HELD, *STREAMED) for item in _fitting(asked, strategy)]
    return min(every, key=lambda item: item.prediction.decode_s_per_pass, default=None)


def _changes(scenario: Scenario, promise: Promise, sequences: int | None) -> list[str]:
    """More devices of the kind, or fewer bits: the least of each that would suffice."""
    found = []
    held_bytes = scenario.budget_bytes * scenario.described_machine.num_devices
    least = max(1, math.ceil(math.log2(scenario.model.weights_bytes / held_bytes)))
    for doublings in range(least, least + 6):
        machine = _more(scenario.described_machine, 2**doublings)
        if _best(scenario.on(machine), promise, sequences or 1) is not None:
            found.append(f"{machine.num_devices} of these devices instead of {scenario.described_machine.num_devices}")
            break
    fewer = (name for name, asked in narrower(scenario) if _best(asked, promise, sequences or 1) is not None)
    found += [f"weights in {name}" for name in itertools.islice(fewer, 1)]
    return found


def _more(machine: Machine, times: int) -> Machine:
    within = "scale_up" in machine.links and machine.devices * times <= 8
    if within or "network" not in machine.links:
        return replace(machine, devices=machine.devices * times)
    return replace(machine, nodes=machine.nodes * times)
