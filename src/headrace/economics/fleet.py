"""N copies of a model writing at r tokens per second: devices, share of the world's, power, dollars, against a writer.

A copy is one reader's conversation; many share one set of weights in a batch. `private_devices` is what it would
take if they did not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from headrace.economics.owning import (
    DEFAULT_TERMS,
    FLOPS_PER_PARAMETER_INFERRED,
    HOURS_PER_YEAR,
    Terms,
    crossover_tokens,
    owned_usd_per_h,
)
from headrace.economics.service import Promise, Service, best_service
from headrace.errors import HeadraceError, InvalidRequestError, MachineError
from headrace.machine.machine import Processor
from headrace.machine.quantity import Interval, Quantity, interval_of
from headrace.planning.described_rates import arithmetic_format
from headrace.planning.price import drawn_share, joules_per_token, usd_per_million_tokens, usd_per_page
from headrace.planning.scenario import Scenario

H100_FLOPS = 989e12
"""dense 16-bit operations per second of an H100, the unit in which devices are added up"""
TOKENS_PER_PARAMETER = 20.0
"""training tokens that are assumed where none are given (Hoffmann et al. 2022, compute-optimal)"""
TRAINING_SHARE = Quantity(0.4, 0.3, 0.55, "share of peak arithmetic that large training runs report; estimate")
HUMAN_USD_PER_PAGE = Quantity(
    75.0,
    32.27,
    375.0,
    "from one hour at the median wage of writers in the United States (BLS 2020: 32.27 $/h) to freelance rates of 0.10 "
    "to 0.50 $ per word",
)
_SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Stock:
    """Installed accelerators, in H100 equivalents."""

    h100_equivalents: Quantity
    date: str


@dataclass(frozen=True, kw_only=True)
class FleetAsked:
    """What the fleet is for. `scenario.workload.sequences` is not used: the batch is found, or `sequences` fixes it."""

    scenario: Scenario
    copies: float
    tokens_per_s: float
    """that each copy writes, on average"""
    promise: Promise
    sequences: int | None = None
    training_tokens: float | None = None
    terms: Terms = DEFAULT_TERMS
    stock: Stock | None = None

    def __post_init__(self) -> None:
        for what, value in (("copies", self.copies), ("tokens per second", self.tokens_per_s)):
            if not 0 < value < 1e18:
                raise InvalidRequestError(f"{value} {what} is invalid; it must be more than 0 and finite")
        if self.training_tokens is not None and not 0 < self.training_tokens < 1e24:
            raise InvalidRequestError(
                f"{self.training_tokens} training tokens is invalid; it must be more than 0 and finite"
            )


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What it costs one way, rented or owned (then with the devices that stand idle for their share of the time)."""

    usd_per_device_hour: Interval
    usd_per_year: Interval
    usd_per_million_tokens: Interval
    usd_per_million_prompt_tokens: Interval
    usd_per_750_words: Interval
    human_times_dearer: Interval
    """a writer's price over this one"""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The answer. Dollars and joules per token are those of devices that are busy; those per year of all of them."""

    service: Service
    devices: Interval
    """whole groups of as many as one batch takes"""
    copies_per_device: Interval
    devices_per_copy_of_weights: int
    private_devices: float
    """where no two copies share weights, at the fewest devices that hold them"""
    h100_equivalents: Interval
    stock_share: Interval | None
    device_power_w: Interval | None
    site_power_w: Interval | None
    joules_per_token: Interval | None
    rented: Bill | str
    """or why it cannot be reckoned"""
    owned: Bill | str
    training_tokens: float
    crossover_tokens: float
    """operation for operation: three times the training tokens"""
    crossover_days: float
    inference_share: float
    """share of the peak arithmetic that this service reaches, prompts included"""
    crossover_tokens_in_money: float
    """counting device hours, in which training reaches `TRAINING_SHARE` of the peak"""
    tokens_per_day: float
    """read and written"""


def plan_fleet(asked: FleetAsked) -> Fleet:
    """Size it. Raises MachineError where the model does not fit or the promise cannot be kept."""
    scenario, processor = asked.scenario, asked.scenario.described_machine.processor
    service = best_service(scenario, asked.promise, sequences=asked.sequences)
    rate, work, per_copy = service.tokens_per_s_per_device, scenario.workload, service.candidate.plan.parallelism
    wanted = asked.copies * asked.tokens_per_s
    exact = rate.dividing(wanted)
    devices = Interval(*(_whole(each, service) for each in (exact.expected, exact.low, exact.high)))
    equivalents = devices.times(h100_equivalents(processor))
    per_day = wanted * _SECONDS_PER_DAY * work.context_tokens / work.generate_tokens
    training = asked.training_tokens or TOKENS_PER_PARAMETER * scenario.model.parameters
    reached = _inference_share(scenario, service)
    rated, drawn = processor.power_w, drawn_share(service.candidate.prediction.binds, service.filled_share)
    chips, site = _power(asked, devices, drawn)
    return Fleet(
        service=service,
        devices=devices,
        copies_per_device=rate.times(1 / asked.tokens_per_s),
        devices_per_copy_of_weights=per_copy.devices_per_copy,
        private_devices=asked.copies * _fewest_devices(scenario, per_copy.devices_per_copy),
        h100_equivalents=equivalents,
        stock_share=None if asked.stock is None else _over(equivalents, asked.stock.h100_equivalents),
        device_power_w=chips,
        site_power_w=site,
        joules_per_token=None if rated is None else joules_per_token(rated, rate, drawn),
        rented=_bill(lambda: _rent_usd_per_h(processor), service, devices),
        owned=_bill(lambda: owned_usd_per_h(processor, terms=asked.terms, drawn=drawn), service, devices),
        training_tokens=training,
        crossover_tokens=crossover_tokens(training),
        crossover_days=crossover_tokens(training) / per_day,
        inference_share=reached,
        crossover_tokens_in_money=crossover_tokens(
            training, training_share=TRAINING_SHARE.expected, inference_share=reached
        ),
        tokens_per_day=per_day,
    )


def h100_equivalents(processor: Processor) -> float:
    """Dense 16-bit arithmetic over that of an H100, as the count of installed devices is made."""
    return processor.flops[arithmetic_format("bf16", processor.flops)].expected / H100_FLOPS


def _rent_usd_per_h(processor: Processor) -> Quantity:
    if processor.rent_usd_per_h is None:
        raise MachineError(
            f"no rent is known for {processor.name}; give one (rent_usd_per_h in a machine file), or reckon with owning"
        )
    return processor.rent_usd_per_h


def _whole(devices: float, service: Service) -> float:
    return float(math.ceil(devices / service.devices * (1 - 1e-12)) * service.devices)


def _inference_share(scenario: Scenario, service: Service) -> float:
    work, flops = scenario.workload, scenario.described_machine.processor.flops
    tokens = service.tokens_per_s_per_device.expected * work.context_tokens / work.generate_tokens
    operations = FLOPS_PER_PARAMETER_INFERRED * scenario.model.active_parameters * tokens
    return min(1.0, operations / flops[arithmetic_format(scenario.model.weight_format, flops)].expected)


def _power(asked: FleetAsked, devices: Interval, drawn: Quantity) -> tuple[Interval | None, Interval | None]:
    """Return the devices' power, and the site's with hosts and cooling."""
    rated = asked.scenario.described_machine.processor.power_w
    if rated is None:
        return None, None
    constants = {
        "devices": devices,
        "rated": rated,
        "drawn": drawn,
        "server_w": asked.terms.server_w,
        "pue": asked.terms.pue,
    }
    chips = interval_of(constants, lambda v: v["devices"] * v["rated"] * v["drawn"])
    site = interval_of(constants, lambda v: v["devices"] * (v["rated"] * v["drawn"] + v["server_w"]) * v["pue"])
    return chips, site


def _bill(reckon: Callable[[], Interval], service: Service, devices: Interval) -> Bill | str:
    try:
        hour = reckon()
    except HeadraceError as error:
        return str(error)
    million = usd_per_million_tokens(hour, service.tokens_per_s_per_device)
    page = usd_per_page(million)
    of_all = interval_of({"devices": devices, "hour": hour}, lambda v: v["devices"] * v["hour"] * HOURS_PER_YEAR)
    return Bill(
        usd_per_device_hour=hour,
        usd_per_year=of_all,
        usd_per_million_tokens=million,
        usd_per_million_prompt_tokens=usd_per_million_tokens(hour, service.prompt_tokens_per_s_per_device),
        usd_per_750_words=page,
        human_times_dearer=_over(HUMAN_USD_PER_PAGE, page),
    )


def _fewest_devices(scenario: Scenario, most: int) -> int:
    """Fewest devices whose memory holds the weights (or those that stay, where the service streams)."""
    return min(most, math.ceil(scenario.model.weights_bytes / scenario.budget_bytes))


def _over(amount: Interval, of: Interval) -> Interval:
    return interval_of({"amount": amount, "of": of}, lambda v: v["amount"] / v["of"])
