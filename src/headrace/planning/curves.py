"""Curves behind the pictures: one thing varied, the rest of the question kept.

Points that do not fit are left out. Every point has its low and high end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from headrace.errors import HeadraceError
from headrace.machine.machine import Machine, Tier
from headrace.machine.quantity import Interval, interval_of
from headrace.model.scaling import scaled
from headrace.planning.arrangement import Arrangement
from headrace.planning.comparison import Answer, Question, answer
from headrace.planning.cost import pass_cost
from headrace.planning.machine_rates import MachineRates, quantities
from headrace.planning.memory_need import usable_bytes
from headrace.planning.price import price
from headrace.planning.workload import PassTokens

MOST_TOKENS = 1 << 17
SIZE_FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
DEVICE_COUNTS = (1, 2, 4, 8, 16, 32, 64)
_MOST_DEVICES = 1 << 17


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line: what varies, and the value there."""

    name: str
    points: tuple[tuple[float, Interval], ...]


def against_tokens(question: Question, *, steps: int = 35) -> list[Curve]:
    """Seconds per pass against tokens per pass: streamed with and without overlap, and resident where that fits."""
    ways: list[tuple[str, Arrangement]] = []
    source = _source(question)
    if source is not None:
        streamed = Arrangement(strategy="overlap", source=source, slots=2, resident_share=0.0)
        ways.append((f"streamed from {source.value}, overlapped", streamed))
        in_turn = replace(streamed, strategy="sequential", overlap=False, slots=1)
        ways.append((f"streamed from {source.value}, in turn", in_turn))
    held = answer(question, "resident")
    if isinstance(held, Answer):
        ways.append(("resident on one device", Arrangement(strategy="resident")))
    split = answer(question, "tensor")
    if isinstance(split, Answer):
        ways.append((f"split over {split.arrangement.tensor} devices", replace(split.arrangement, replicas=1)))
    return [Curve(name=name, points=tuple(_passes(question, arrangement, steps=steps))) for name, arrangement in ways]


def against_size(question: Question) -> Curve:
    """Dollars per 750 words against parameters: the model scaled, each on the fewest of these devices that hold it."""
    points = []
    for factor in SIZE_FACTORS:
        model = scaled(question.model, factor)
        found = _cheapest(replace(question, model=model))
        if found is not None:
            points.append((float(model.parameters), found))
    return Curve(name="dollars per 750 words", points=tuple(points))


def against_devices(question: Question) -> list[Curve]:
    """Seconds per token of one sequence's batch against the number of devices, by strategy."""
    curves: dict[str, list[tuple[float, Interval]]] = {}
    for count in DEVICE_COUNTS:
        machine = with_devices(question.machine, count)
        if machine is None:
            continue
        asked = replace(question, machine=machine)
        for strategy in ("resident", "pipeline", "tensor", "tensor-2d", "tensor+overlap", "sharded", "overlap"):
            if (strategy in {"resident", "overlap"}) != (count == 1):
                continue
            found = answer(asked, strategy)
            if isinstance(found, Answer) and (count == 1 or found.arrangement.devices == count):
                curves.setdefault(strategy, []).append((float(count), found.decode_s_per_pass))
    return [Curve(name=name, points=tuple(points)) for name, points in curves.items()]


def with_devices(machine: Machine, count: int) -> Machine | None:
    """Give a machine `count` devices: in one node as far as its node goes, then in whole nodes; None where neither."""
    in_node = machine.devices
    if count <= in_node:
        return replace(machine, devices=count, nodes=1)
    if machine.nodes == 1 and in_node == 1 and "scale_up" in machine.links and count <= 8:
        return replace(machine, devices=count)
    if count % in_node or "network" not in machine.links:
        return None
    return replace(machine, nodes=count // in_node)


def _passes(question: Question, arrangement: Arrangement, *, steps: int) -> Iterator[tuple[float, Interval]]:
    constants = quantities(question.machine, question.engine, arrangement, weight_format=question.model.weight_format)
    for step in range(steps):
        tokens = MOST_TOKENS ** (step / (steps - 1))
        carried = PassTokens(sequences=tokens, new_tokens=1, context_tokens=1)
        yield (
            tokens,
            interval_of(
                constants,
                lambda values, carried=carried: (  # type: ignore[misc]
                    pass_cost(question.model, question.machine, arrangement, carried, MachineRates.of(values)).total_s
                ),
            ),
        )


def _cheapest(question: Question) -> Interval | None:
    """The least price of the strategies that run on as many devices as it takes."""
    best: Interval | None = None
    count = 1
    while count <= _MOST_DEVICES:
        machine = with_devices(question.machine, count)
        if machine is not None:
            asked = replace(question, machine=machine)
            for strategy in ("resident", "tensor", "tensor+pipeline", "pipeline"):
                try:
                    found = answer(asked, strategy)
                except HeadraceError:
                    continue
                if isinstance(found, Answer):
                    usd = price(machine, found, question.work).usd_per_750_words
                    if usd is not None and (best is None or usd.expected < best.expected):
                        best = usd
            if best is not None:
                return best
        count *= 2
    return best


def _source(question: Question) -> Tier | None:
    machine, needed = question.machine, question.model.weights_bytes
    if machine.host is not None and question.host_bytes >= needed and "host" in machine.links:
        return Tier.HOST
    return Tier.DISK if usable_bytes(machine, Tier.DISK) >= needed else None
