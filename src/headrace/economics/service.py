"""The largest batch that a machine serves at a promised speed, and what each device then writes per second."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from headrace.errors import HeadraceError, InvalidRequestError, MachineError
from headrace.machine.machine import Machine, Tier
from headrace.machine.quantity import Interval
from headrace.model.formats import NARROWER_FORMATS, requantised
from headrace.planning.arrangement import Arrangement
from headrace.planning.comparison import Answer, Question, evaluate
from headrace.planning.cost import WorkCost, work_cost
from headrace.planning.machine_rates import MachineRates, quantities
from headrace.planning.memory_need import memory_need, usable_bytes
from headrace.planning.strategies import candidates
from headrace.units import format_bytes

HELD = ("resident", "tensor", "pipeline", "tensor+pipeline", "tensor-2d")
"""strategies whose weights stay on the devices: tried first, as one that streams never writes more per device"""
STREAMED = ("experts", "overlap", "tensor+overlap", "sharded", "cpu", "hybrid")
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
                raise InvalidRequestError(f"a promise of {value} {what} cannot be meant; it must be more than 0")

    def kept_by(self, cost: WorkCost) -> bool:
        """Whether readers get it at the expected values."""
        slow = self.tokens_per_s is not None and cost.decode_s_per_pass * self.tokens_per_s > 1
        late = self.first_token_s is not None and cost.prefill_s > self.first_token_s
        return not slow and not late


@dataclass(frozen=True, kw_only=True)
class Service:
    """The best arrangement found, with its batch over all devices of the machine."""

    answer: Answer
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


def best_service(question: Question, promise: Promise, *, sequences: int | None = None) -> Service:
    """Find it; `sequences` fixes the batch. Raises MachineError where nothing fits or no promise can be kept."""
    best = _best(question, promise, sequences)
    if best is None:
        raise MachineError(_refusal(question, promise, sequences))
    _, count, arrangement = best
    asked = _with_sequences(question, count)
    found = evaluate(asked, arrangement)
    devices = _devices(question.machine, arrangement)
    tokens = count * asked.work.generate_tokens / devices
    room = question.device_bytes - found.memory.device_bytes + found.memory.kv_cache_bytes
    return Service(
        answer=found,
        sequences=count,
        devices=devices,
        tokens_per_s_per_device=_rate(tokens, found.total_s),
        prompt_tokens_per_s_per_device=_rate(count * asked.work.prompt_tokens / devices, found.prefill_s),
        reader_tokens_per_s=_rate(1.0, found.decode_s_per_pass),
        filled_share=min(1.0, max(0.0, found.memory.kv_cache_bytes / room)) if room > 0 else 1.0,
    )


_Found = tuple[float, int, Arrangement]
"""tokens per second and device, sequences, how"""


def _best(question: Question, promise: Promise, sequences: int | None) -> _Found | None:
    for strategies in (HELD, STREAMED):
        found = [
            best
            for strategy in strategies
            if (
                best := _at(question, strategy, promise, sequences)
                if sequences is not None
                else _largest(question, strategy, promise)
            )
            is not None
        ]
        if found:
            return max(found, key=lambda item: (item[0], -item[2].devices))
    return None


def _largest(question: Question, strategy: str, promise: Promise) -> _Found | None:
    """Double the batch for as long as that is kept and pays, then look between the last two."""
    best: _Found | None = None
    count, failed = 1, 0
    while count <= _MOST_SEQUENCES and failed < _patience(question.machine, best):
        found = _at(question, strategy, promise, count)
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
        found = _at(question, strategy, promise, middle)
        if found is not None and found[0] > best[0]:
            best, low = found, middle
        else:
            high = middle
    return best


def _patience(machine: Machine, best: _Found | None) -> int:
    """Doublings without success: where sequences are fewer than devices, some strategies are not to be had yet."""
    return 1 if best is not None else machine.num_devices.bit_length() + 1


def _at(question: Question, strategy: str, promise: Promise, sequences: int) -> _Found | None:
    asked = _with_sequences(question, sequences)
    best: _Found | None = None
    for arrangement, cost in _costs(asked, strategy):
        if promise.kept_by(cost):
            devices = _devices(asked.machine, arrangement)
            rate = sequences * asked.work.generate_tokens / cost.total_s / devices
            if best is None or rate > best[0]:
                best = (rate, sequences, arrangement)
    return best


def _costs(question: Question, strategy: str) -> Iterator[tuple[Arrangement, WorkCost]]:
    """Every arrangement of a strategy that fits, with its expected times."""
    model, machine, work = question.model, question.machine, question.work
    for arrangement in candidates(strategy, model, machine, work, device_bytes=question.device_bytes):
        need = memory_need(model, machine, arrangement, work)
        if (
            need.device_bytes > question.device_bytes
            or need.host_bytes > question.host_bytes
            or need.disk_bytes > usable_bytes(machine, Tier.DISK)
        ):
            continue
        try:
            constants = quantities(machine, question.engine, arrangement, weight_format=model.weight_format)
        except MachineError:  # a link that this arrangement needs is not described
            continue
        rates = MachineRates.of({name: constant.expected for name, constant in constants.items()})
        yield (
            arrangement,
            work_cost(model, machine, arrangement, work, rates, speculation=question.speculation),
        )


def _devices(machine: Machine, arrangement: Arrangement) -> int:
    """Devices that cannot do the same once more: the whole machine where links or the host are shared."""
    alone = arrangement.source is Tier.DEVICE and arrangement.kv_tier is Tier.DEVICE and not arrangement.cpu_share
    return arrangement.devices if alone else machine.num_devices


def _with_sequences(question: Question, sequences: int) -> Question:
    return replace(question, work=replace(question.work, sequences=sequences))


def _rate(amount: float, seconds: Interval) -> Interval:
    return Interval(expected=amount / seconds.expected, low=amount / seconds.high, high=amount / seconds.low)


# -- refusals -----------------------------------------------------------------------------------------------------


def _refusal(question: Question, promise: Promise, sequences: int | None) -> str:
    """Say what was asked, what was found, and the smallest change that would do."""
    who = f"{question.model.name} on {question.machine.name}"
    fastest = _best_speed(question, sequences)
    changes = _changes(question, promise, sequences)
    if fastest is None:
        model, machine, work = question.model, question.machine, question.work
        cache_bytes = model.kv_cache_bytes(sequences=sequences or 1, context_tokens=work.context_tokens)
        return (
            f"{who} fits in no way: its weights take {format_bytes(model.weights_bytes)} and the cache of a batch of "
            f"{sequences or 1} {format_bytes(cache_bytes)}; its devices may hold "
            f"{format_bytes(question.device_bytes * machine.num_devices)}, its hosts' memory "
            f"{format_bytes(question.host_bytes * machine.nodes)}. "
            + (
                f"What would do: {'; '.join(changes)}"
                if changes
                else "More of these devices, and weights in 8 or 4 bits, were tried and do not suffice"
            )
        )
    _, cost = fastest
    wanted = []
    if promise.tokens_per_s is not None:
        wanted.append(
            f"{promise.tokens_per_s:g} tokens/s per reader were asked for, {1 / cost.decode_s_per_pass:.3g} is the most"
        )
    if promise.first_token_s is not None:
        wanted.append(f"a first token within {promise.first_token_s:g} s, and {cost.prefill_s:.3g} s is the least")
    what = "; ".join(wanted)
    return f"{who} fits, but is too slow: {what}. What would do: {'; '.join(['a lower --slo', *changes])}"


def _best_speed(question: Question, sequences: int | None) -> tuple[Arrangement, WorkCost] | None:
    asked = _with_sequences(question, sequences or 1)
    every = [item for strategy in (*HELD, *STREAMED) for item in _costs(asked, strategy)]
    return min(every, key=lambda item: item[1].decode_s_per_pass, default=None)


def _changes(question: Question, promise: Promise, sequences: int | None) -> list[str]:
    """More devices of the kind, or fewer bits: the least of each that would do."""
    found = []
    held_bytes = question.device_bytes * question.machine.num_devices
    least = max(1, math.ceil(math.log2(question.model.weights_bytes / held_bytes)))
    for doublings in range(least, least + 6):
        machine = _more(question.machine, 2**doublings)
        if _best(replace(question, machine=machine), promise, sequences or 1) is not None:
            found.append(f"{machine.num_devices} of these devices instead of {question.machine.num_devices}")
            break
    for name in NARROWER_FORMATS:
        try:
            narrow = requantised(question.model, name)
        except HeadraceError:
            continue
        fewer = narrow.weights_bytes < 0.95 * question.model.weights_bytes
        if fewer and _best(replace(question, model=narrow), promise, sequences or 1) is not None:
            found.append(f"weights in {name}")
            break
    return found


def _more(machine: Machine, times: int) -> Machine:
    within = "scale_up" in machine.links and machine.devices * times <= 8
    if within or "network" not in machine.links:
        return replace(machine, devices=machine.devices * times)
    return replace(machine, nodes=machine.nodes * times)
