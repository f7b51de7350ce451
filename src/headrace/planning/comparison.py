"""Every strategy for a model on a machine: predicted with its interval, or refused with what would make it fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from headrace.errors import HeadraceError, InvalidRequestError, MachineError, near_names
from headrace.machine.engine import PRESENT, Engine
from headrace.machine.machine import Machine, Tier
from headrace.machine.quantity import Interval, interval_of
from headrace.model.model import Model
from headrace.planning.arrangement import Arrangement
from headrace.planning.cost import PassCost, WorkCost, work_cost
from headrace.planning.machine_rates import MachineRates, quantities
from headrace.planning.memory_need import MemoryNeed, memory_need, usable_bytes
from headrace.planning.strategies import STRATEGIES, candidates
from headrace.planning.workload import Speculation, Workload
from headrace.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of the planner."""

    model: Model
    machine: Machine
    work: Workload
    engine: Engine = PRESENT
    device_memory_bytes: float | None = None
    """what each device may hold; None: its memory less a reserve"""
    host_memory_bytes: float | None = None
    """what each node's host memory may hold; None: its memory less a reserve"""
    speculation: Speculation | None = None
    expert_hit_rate: float | None = None
    """share of the routed experts that are found on the device; None: what fits, uniformly used"""

    def __post_init__(self) -> None:
        if self.work.context_tokens > self.model.context_tokens:
            raise InvalidRequestError(
                f"{self.work.prompt_tokens} + {self.work.generate_tokens} tokens of context were asked for; "
                f"{self.model.name} can do {self.model.context_tokens}"
            )
        if self.expert_hit_rate is not None and not 0 <= self.expert_hit_rate <= 1:
            raise InvalidRequestError(f"an expert hit rate lies between 0 and 1, not at {self.expert_hit_rate}")

    @property
    def device_bytes(self) -> float:
        """Bytes that each device may hold."""
        usable = usable_bytes(self.machine, Tier.DEVICE)
        return usable if self.device_memory_bytes is None else min(self.device_memory_bytes, usable)

    @property
    def host_bytes(self) -> float:
        """Bytes that each node's host memory may hold."""
        usable = usable_bytes(self.machine, Tier.HOST)
        return usable if self.host_memory_bytes is None else min(self.host_memory_bytes, usable)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A strategy's best arrangement and what it will do."""

    strategy: str
    arrangement: Arrangement
    memory: MemoryNeed
    prefill_s: Interval
    decode_s_per_pass: Interval
    tokens_per_s: Interval
    total_s: Interval
    prefill: PassCost
    decode: PassCost
    binds: str


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a strategy cannot be had, and the smallest change that would do."""

    strategy: str
    why_not: str
    required_bytes: float | None = None
    """per device, where memory is what lacks"""


Compared = Mapping[str, Answer | Refusal]


def compare(question: Question, *, only: str | None = None) -> Compared:
    """Answer or refusal of every strategy, or of one. Raises InvalidRequestError for an unknown name."""
    if only is not None and only not in STRATEGIES:
        raise InvalidRequestError(
            f"there is no strategy {only!r}; {near_names(only, STRATEGIES)}known: {', '.join(STRATEGIES)}"
        )
    return {name: answer(question, name) for name in STRATEGIES if only in (None, name)}


def fastest(compared: Compared) -> Answer | None:
    """Return the answer with the least time for the whole work; of equals the one with the fewest devices."""
    answers = [item for item in compared.values() if isinstance(item, Answer)]
    return min(answers, key=lambda item: (item.total_s.expected, item.arrangement.devices), default=None)


def answer(question: Question, strategy: str) -> Answer | Refusal:
    """The fastest arrangement of one strategy that fits."""
    best: tuple[float, int, Arrangement] | None = None
    refused: list[tuple[float, str]] = []
    for arrangement in candidates(
        strategy, question.model, question.machine, question.work, device_bytes=question.device_bytes
    ):
        tried = arrangement
        if tried.expert_hit_rate is not None and question.expert_hit_rate is not None:
            tried = replace(tried, expert_hit_rate=question.expert_hit_rate)
        lack = _lack(question, tried)
        if lack is not None:
            refused.append(lack)
            continue
        try:
            seconds = _expected(question, tried).total_s
        except MachineError as error:
            refused.append((math.inf, str(error)))
            continue
        if best is None or (seconds * (1 + 1e-12), tried.devices) < best[:2]:
            best = (seconds, tried.devices, tried)
    if best is None:
        return _refusal(question, strategy, refused)
    return evaluate(question, best[2])


def evaluate(question: Question, arrangement: Arrangement) -> Answer:
    """Predict one arrangement with intervals. Raises MachineError where the machine lacks a link that it needs."""
    model, machine, work = question.model, question.machine, question.work
    constants = quantities(machine, question.engine, arrangement, weight_format=model.weight_format)

    def cost(values: Mapping[str, float]) -> WorkCost:
        return work_cost(model, machine, arrangement, work, MachineRates.of(values), speculation=question.speculation)

    expected = cost({name: constant.expected for name, constant in constants.items()})
    decode_s = interval_of(constants, lambda values: cost(values).decode_s_per_pass)
    tokens = expected.tokens_per_s * decode_s.expected
    return Answer(
        strategy=arrangement.strategy,
        arrangement=arrangement,
        memory=memory_need(model, machine, arrangement, work),
        prefill_s=interval_of(constants, lambda values: cost(values).prefill_s),
        decode_s_per_pass=decode_s,
        tokens_per_s=Interval(expected=expected.tokens_per_s, low=tokens / decode_s.high, high=tokens / decode_s.low),
        total_s=interval_of(constants, lambda values: cost(values).total_s),
        prefill=expected.prefill,
        decode=expected.decode,
        binds=expected.decode.binds(overlap=arrangement.overlap),
    )


def _expected(question: Question, arrangement: Arrangement) -> WorkCost:
    constants = quantities(question.machine, question.engine, arrangement, weight_format=question.model.weight_format)
    rates = MachineRates.of({name: constant.expected for name, constant in constants.items()})
    return work_cost(
        question.model, question.machine, arrangement, question.work, rates, speculation=question.speculation
    )


def _lack(question: Question, arrangement: Arrangement) -> tuple[float, str] | None:
    """Bytes per device that this arrangement needs and does not have, and a text; None where it fits."""
    need = memory_need(question.model, question.machine, arrangement, question.work)
    if need.device_bytes > question.device_bytes:
        return need.device_bytes, _too_large("each device", need.device_bytes, question.device_bytes)
    if need.host_bytes > question.host_bytes:
        return math.inf, _too_large("host memory", need.host_bytes, question.host_bytes)
    disk_bytes = usable_bytes(question.machine, Tier.DISK)
    if need.disk_bytes > disk_bytes:
        return math.inf, _too_large("the disk", need.disk_bytes, disk_bytes)
    return None


def _too_large(where: str, needed: float, offered: float) -> str:
    return f"{where} would hold {format_bytes(needed)} and may hold {format_bytes(offered)}"


def _refusal(question: Question, strategy: str, refused: list[tuple[float, str]]) -> Refusal:
    if not refused:
        return Refusal(strategy=strategy, why_not=_not_applicable(question, strategy))
    required, text = min(refused, key=lambda item: item[0])
    change = _smallest_change(question, strategy)
    why_not = f"{text}. {change}" if change else text
    return Refusal(strategy=strategy, why_not=why_not, required_bytes=required if required < math.inf else None)


def _not_applicable(question: Question, strategy: str) -> str:
    machine = question.machine
    if strategy == "experts":
        return f"{question.model.name} has no routed experts"
    if strategy in {"cpu", "hybrid"} and machine.host is None:
        return f"{machine.name} computes where its weights lie already"
    if strategy in {"sequential", "overlap", "tensor+overlap"} and not machine.links and machine.disk is None:
        return f"{machine.name} describes no disk and no host memory to stream from"
    if strategy == "sharded" and question.work.sequences < 2:
        return "a batch of at least 2 is needed: each device works on sequences of its own"
    if strategy == "tensor-2d":
        return (
            f"at least 16 devices whose number divides the heads are needed; {machine.name} has {machine.num_devices}"
        )
    if strategy in {"tensor", "pipeline", "tensor+pipeline", "tensor+overlap", "sharded"}:
        return f"more devices are needed than the {machine.num_devices} of {machine.name}, or another number of them"
    return f"{strategy} does not apply to {question.model.name} on {machine.name}"


def _smallest_change(question: Question, strategy: str) -> str:
    """Find the least of a few changes that would make a strategy fit: batch, devices, precision."""
    found = []
    batch = _largest_batch(question, strategy)
    if batch:
        found.append(f"a batch of {batch} would fit")
    else:
        devices = _fewest_devices(question, strategy)
        if devices:
            found.append(f"{devices} devices would do")
        precision = _gentlest_format(question, strategy)
        if precision:
            found.append(f"weights in {precision} would fit")
    return (
        "; ".join(found).capitalize()
        if found
        else "No smaller batch, no more of these devices (up to 128 times as many) and no fewer bits would do"
    )


def _fits(question: Question, strategy: str) -> bool:
    options = candidates(strategy, question.model, question.machine, question.work, device_bytes=question.device_bytes)
    return any(_lack(question, option) is None for option in options)


def _largest_batch(question: Question, strategy: str) -> int:
    """The largest batch below the one asked for that fits; 0 where none does."""

    def fits(sequences: int) -> bool:
        return _fits(replace(question, work=replace(question.work, sequences=sequences)), strategy)

    if question.work.sequences == 1 or not fits(1):
        return 0
    low, high = 1, question.work.sequences
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fewest_devices(question: Question, strategy: str) -> int:
    if strategy not in {"tensor", "pipeline", "tensor+pipeline", "tensor-2d"}:
        return 0
    machine = question.machine
    for doublings in range(1, 8):
        larger = (
            replace(machine, nodes=machine.nodes * 2**doublings)
            if "network" in machine.links
            else replace(machine, devices=machine.devices * 2**doublings)
        )
        try:
            if _fits(replace(question, machine=larger), strategy):
                return larger.num_devices
        except HeadraceError:
            return 0
    return 0


def _gentlest_format(question: Question, strategy: str) -> str:
    """The widest of a few narrower weight formats with which the strategy fits."""
    from headrace.model.formats import NARROWER_FORMATS, requantised

    for name in NARROWER_FORMATS:
        try:
            narrower = requantised(question.model, name)
        except HeadraceError:
            continue
        if narrower.weights_bytes < question.model.weights_bytes * 0.95 and _fits(
            replace(question, model=narrower), strategy
        ):
            return name
    return ""
