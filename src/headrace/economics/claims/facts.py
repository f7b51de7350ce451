"""Assumptions that are looked up in the catalogues, or predicted by the cost model, when a claim asks for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from headrace.economics.claims.ledger import Assumption, Default, Ledger
from headrace.economics.fleet import h100_equivalents
from headrace.economics.installed_stock import DEVICE_POWER_W, installed_stock
from headrace.economics.service import Promise, best_service
from headrace.machine.catalogue import find_machine
from headrace.machine.machine import Machine
from headrace.model.catalogue import find_model
from headrace.model.formats import requantised
from headrace.model.model import Model
from headrace.planning.closed_form import ClosedForm
from headrace.planning.plan import Arrangement, Parallelism, arranged
from headrace.planning.planner import described_plan
from headrace.planning.prediction import predict
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy
from headrace.planning.workload import Workload

DEVICES = {
    "V100-32": "v100-32",
    "A100-40": "a100-40",
    "A100-80": "a100-80",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
    "GB300": "gb300",
}
"""what reports call a device, and the catalogue"""


def memory_name(device: str) -> str:
    """The assumption that holds a device's memory."""
    return f"{device.lower().replace('-', '_')}_memory_bytes"


def memory_rate_name(device: str) -> str:
    """The assumption that holds its bandwidth."""
    return f"{device.lower().replace('-', '_')}_memory_bytes_per_s"


@cache
def model(name: str) -> Model:
    """A model of the catalogue, read once."""
    return find_model(name)


@cache
def machine(name: str) -> Machine:
    """A machine of the catalogue, read once."""
    return find_machine(name)


def model_fact(name: str, attribute: str) -> Callable[[Ledger], Assumption]:
    """One figure of a model: parameters, weights_bytes, num_layers, ..."""

    def read(_: Ledger) -> Assumption:
        value = getattr(model(name), attribute)
        return Assumption(float(value() if callable(value) else value), f"{attribute} of {name}, model catalogue")

    return read


def larger_fact(attribute: str) -> Default:
    """The same of GPT-3 scaled by the assumed growth."""

    def read(given: Ledger) -> Assumption:
        return model_fact(f"gpt-3*{given('growth'):g}", attribute)(given)

    return read


def machine_fact(name: str, what: str, read: Callable[[Machine], float]) -> Default:
    """One figure of a machine."""
    return lambda _: Assumption(read(machine(name)), f"{what} of {name}, machine catalogue")


def memory_bytes(name: str) -> Default:
    """Bytes of one device's memory."""
    return machine_fact(name, "memory", lambda found: found.processor.memory_bytes)


def memory_rate(name: str) -> Default:
    """Bytes per second of one device's memory."""
    return machine_fact(name, "memory bandwidth", lambda found: found.processor.memory_bytes_per_s.expected)


def equivalents(name: str) -> Default:
    """H100 equivalents of one device."""
    return machine_fact(name, "16-bit arithmetic over an H100's", lambda found: h100_equivalents(found.processor))


def stock(_: Ledger) -> Assumption:
    """The world's accelerators."""
    found = installed_stock()
    return Assumption(found.h100_equivalents.expected, f"{found.h100_equivalents.source}, {found.date}")


def stock_power(_: Ledger) -> Assumption:
    """Their rated power."""
    return Assumption(DEVICE_POWER_W.expected, DEVICE_POWER_W.source)


def closed_form(place: Machine, arrangement: Arrangement, model: Model) -> ClosedForm:
    """What passes take at the constants' expected values."""
    work = Workload(prompt_tokens=1, generate_tokens=1)
    return ClosedForm.of(Scenario.described(model, place, work), arrangement)


def predicted_tokens_per_s(
    model_name: str,
    machine_name: str,
    *,
    sequences: int,
    prompt_tokens: int,
    generate_tokens: int,
    tensor: int = 1,
    streamed: bool = False,
) -> Default:
    """Generated tokens per second, prefill included, as the cost model predicts them for present software."""
    work = Workload(sequences=sequences, prompt_tokens=prompt_tokens, generate_tokens=generate_tokens)
    strategy = Strategy.OVERLAP if streamed else Strategy.TENSOR if tensor > 1 else Strategy.RESIDENT

    def predict_rate(_: Ledger) -> Assumption:
        wanted = model(model_name)
        scenario = Scenario.described(wanted, machine(machine_name), work)
        arrangement = arranged(
            wanted.num_layers, resident=0 if streamed else None, parallelism=Parallelism(tensor=tensor)
        )
        predicted = predict(described_plan(scenario, strategy, arrangement), scenario)
        rate = sequences * generate_tokens / predicted.total_s
        shown = f"batch {sequences}, {prompt_tokens} in, {generate_tokens} out"
        return Assumption(rate, f"predicted for {model_name} on {machine_name}, {shown}")

    return predict_rate


def predicted_service(
    model_name: str, weights: str, machine_name: str, *, prompt_tokens: int, generate_tokens: int
) -> Default:
    """Generated tokens per second and device in the best offline batch, as the cost model predicts them."""
    work = Workload(prompt_tokens=prompt_tokens, generate_tokens=generate_tokens)

    def predict(_: Ledger) -> Assumption:
        wanted = requantised(model(model_name), weights)
        service = best_service(Scenario.described(wanted, machine(machine_name), work), Promise())
        shown = f"in {weights}, {prompt_tokens} in, {generate_tokens} out, a batch of {service.sequences:,}"
        return Assumption(
            service.tokens_per_s_per_device.expected, f"predicted for {model_name} {shown} on {machine_name}"
        )

    return predict
