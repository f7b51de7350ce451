"""Dollars and joules of tokens: what an hour of a device costs, rented or owned, spread over what it writes in it.

Pure functions of quantities. Results are intervals: every constant is moved to its ends, independently of the others
(`headrace.machine.quantity.interval_of`). Formulas: docs/formulas.md, section 7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from headrace.errors import InvalidRequestError, MachineError
from headrace.machine.machine import Machine, Processor
from headrace.machine.quantity import Interval, Quantity, interval_of
from headrace.planning.plan import Plan

WORDS_PER_PAGE = 750
"""a page: the unit of prices per 750 words"""
TOKENS_PER_PAGE = 1000
"""as many tokens are about 750 English words: OpenAI's own rule"""
HOURS_PER_YEAR = 8760.0
FLOPS_PER_PARAMETER_TRAINED = 6.0
"""per parameter and token: two forward, four backward"""
FLOPS_PER_PARAMETER_INFERRED = 2.0


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What owning costs beside the device; every one can be replaced."""

    years: Quantity = field(
        default=Quantity(
            5,
            3,
            6,
            "years over which servers are written off: 4 to 6 in the annual reports for 2022 of Microsoft, "
            "Alphabet, Amazon and Meta (shaulkoral.com collects them); 3 where chips age faster",
        )
    )
    utilisation: Quantity = field(default=Quantity(0.7, 0.3, 1.0, "share of its hours that a device works; estimate"))
    pue: Quantity = field(
        default=Quantity(
            1.25,
            1.08,
            1.58,
            "site power / computers' power: 1.58 is the industry's mean (Uptime "
            "Institute 2023), about 1.1 what the largest operators report",
        )
    )
    usd_per_kwh: Quantity = field(
        default=Quantity(
            0.0806,
            0.0575,
            0.187,
            "industry in the United States 2023 (EIA): mean, and the cheap and the dear states of the mainland",
        )
    )
    server_share: Quantity = field(
        default=Quantity(0.35, 0.15, 0.6, "price of host, network and building per price of the device; estimate")
    )
    server_w: Quantity = field(
        default=Quantity(150, 75, 300, "power of the host per device: 1.2 kW per 8 devices (EcoLogits)")
    )

    def __post_init__(self) -> None:
        for name, most in (("years", 100.0), ("utilisation", 1.0), ("pue", 10.0)):
            value: Quantity = getattr(self, name)
            if value.low <= 0 or value.high > most:
                raise InvalidRequestError(
                    f"{name} of {value.low:g} to {value.high:g} is out of range: above 0, at most {most:g}"
                )
        if self.pue.low < 1:
            raise InvalidRequestError(f"a PUE of {self.pue.low:g}: a site never takes less power than its computers")


DEFAULT_TERMS = Terms()

_EMPTY_SHARE = 0.43
_BUSY_SHARE = 0.43
_POWER_SPREAD = 0.3
STREAMING_POWER_SHARE = Quantity(
    0.43, 0.1, 1.0, "no source gives the power of a device that waits for a link: bare idle to full rated power"
)


def power_share(busy: float) -> Quantity:
    """Share of a device's rated power that it draws while serving, `busy` of its places taken (0 to 1).

    0.43 + 0.43 x busy, as vllm-sr-sim fits to ML.ENERGY's measurements (H100: 300 W at batch 1, 600 W at 128).
    """
    _within("the busy share", busy, 0.0, 1.0)
    expected = _EMPTY_SHARE + _BUSY_SHARE * busy
    return Quantity(
        expected,
        expected / (1 + _POWER_SPREAD),
        min(1.0, expected * (1 + _POWER_SPREAD)),
        "0.43 + 0.43 x busy share (vllm-sr-sim over ML.ENERGY v3)",
    )


def rent_usd_per_h(processor: Processor) -> Quantity:
    """Dollars per device and hour; raises MachineError where no source is known."""
    if processor.rent_usd_per_h is None:
        raise MachineError(
            f"no rent is known for {processor.name}; give one (rent_usd_per_h in a machine file), or reckon with owning"
        )
    return processor.rent_usd_per_h


def owned_usd_per_h(
    processor: Processor, *, terms: Terms = DEFAULT_TERMS, drawn_share: Quantity | None = None
) -> Interval:
    """Dollars per device and *working* hour of an owned device.

    price x (1 + server) / (years x 8760 x utilisation) + kW x PUE x dollars per kWh; `drawn_share` is the share of the
    rated power that it draws (without it: all places taken). Raises MachineError where price or power are unknown.
    """
    if processor.price_usd is None or processor.power_w is None:
        lacking = "price" if processor.price_usd is None else "rated power"
        raise MachineError(f"no {lacking} is known for {processor.name}, so owning it cannot be reckoned; give one")
    constants = {
        "price": processor.price_usd,
        "rated": processor.power_w,
        "drawn": power_share(1.0) if drawn_share is None else drawn_share,
        "years": terms.years,
        "utilisation": terms.utilisation,
        "pue": terms.pue,
        "usd_per_kwh": terms.usd_per_kwh,
        "server_share": terms.server_share,
        "server_w": terms.server_w,
    }
    return interval_of(
        constants,
        lambda v: (
            v["price"] * (1 + v["server_share"]) / (v["years"] * HOURS_PER_YEAR * v["utilisation"])
            + (v["rated"] * v["drawn"] + v["server_w"]) / 1000 * v["pue"] * v["usd_per_kwh"]
        ),
    )


def usd_per_million_tokens(usd_per_h: Quantity | Interval, tokens_per_s: Quantity | Interval) -> Interval:
    """Dollars per million tokens of something that costs `usd_per_h` and does `tokens_per_s` (output, or input)."""
    return interval_of(
        {"usd_per_h": _quantity(usd_per_h), "tokens_per_s": _positive(tokens_per_s, "tokens per second")},
        lambda v: v["usd_per_h"] / 3600 / v["tokens_per_s"] * 1e6,
    )


def usd_per_page(usd_per_million: Interval) -> Interval:
    """Dollars per 750 words, from dollars per million tokens."""
    return scaled(usd_per_million, TOKENS_PER_PAGE / 1e6)


def page_price(usd_per_1k_tokens: float, *, words: float = WORDS_PER_PAGE, factor: float = 1.0) -> float:
    """Dollars for a text at a price per 1,000 tokens, for a model `factor` times as dear (1,000: as large)."""
    _within("a price per 1,000 tokens", usd_per_1k_tokens, 0.0, 1e9)
    _within("words", words, 0.0, 1e15)
    _within("the factor", factor, 0.0, 1e15)
    return usd_per_1k_tokens * factor * (words / WORDS_PER_PAGE * TOKENS_PER_PAGE / 1000)


def joules_per_token(
    watts: Quantity, tokens_per_s: Quantity | Interval, *, devices: int = 1, drawn_share: Quantity | None = None
) -> Interval:
    """Joules of the devices per token; `watts` is one device's rated power, `drawn_share` what it draws of that."""
    return interval_of(
        {
            "rated": watts,
            "drawn": power_share(1.0) if drawn_share is None else drawn_share,
            "tokens_per_s": _positive(tokens_per_s, "tokens per second"),
        },
        lambda v: devices * v["rated"] * v["drawn"] / v["tokens_per_s"],
    )


def crossover_tokens(training_tokens: float, *, training_share: float = 1.0, inference_share: float = 1.0) -> float:
    """Tokens after which inference has cost as much as training did.

    6 N D = 2 N T gives T = 3 D operations for operations. In money a token's operations cost more where less of the
    peak is reached, so T is 3 D x inference share / training share (shares of peak, both 1: count operations).
    """
    _within("training tokens", training_tokens, 0.0, 1e30)
    for what, share in (
        ("the share of peak in training", training_share),
        ("the share of peak in inference", inference_share),
    ):
        if not 0 < share <= 1:
            raise InvalidRequestError(f"{what} must lie above 0 and up to 1, not at {share}")
    ratio = FLOPS_PER_PARAMETER_TRAINED / FLOPS_PER_PARAMETER_INFERRED
    return ratio * training_tokens * (inference_share / training_share)


def days_until(tokens: float, *, tokens_per_day: float) -> float:
    """Days in which so many tokens are written."""
    _within("tokens", tokens, 0.0, 1e30)
    if not 0 < tokens_per_day < math.inf:
        raise InvalidRequestError(f"tokens per day must be more than 0, not {tokens_per_day}")
    return tokens / tokens_per_day


def scaled(interval: Interval, factor: float) -> Interval:
    """The interval times a certain factor."""
    return Interval(expected=interval.expected * factor, low=interval.low * factor, high=interval.high * factor)


def _quantity(value: Quantity | Interval) -> Quantity:
    if isinstance(value, Quantity):
        return value
    return Quantity(value.expected, value.low, value.high, "predicted")


def _positive(value: Quantity | Interval, what: str) -> Quantity:
    quantity = _quantity(value)
    if quantity.low <= 0:
        raise InvalidRequestError(f"{what} must be more than 0, not {quantity.low:g}")
    return quantity


def _within(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidRequestError(f"{what} must lie between {low:g} and {high:g}, not at {value}")


@dataclass(frozen=True, kw_only=True)
class Price:
    """Per generated token, prefill included; None where the catalogue knows no rent, no price or no power."""

    usd_per_million_tokens: Interval | None
    """rented"""
    usd_per_750_words: Interval | None
    owned_usd_per_million_tokens: Interval | None
    joules_per_token: Interval | None


def price(machine: Machine, plan: Plan, total_s: Interval, *, binds: str, token_multiplier: float = 1.0) -> Price:
    """Spread rent, ownership and power of the used devices over the tokens of the whole work, done in `total_s`.

    `token_multiplier`: tokens computed for each token that the user gets (best of n, revisions).
    """
    work = plan.workload
    tokens = work.sequences * work.generate_tokens / token_multiplier
    devices, processor = plan.parallelism.devices, machine.processor
    rate = Interval(expected=tokens / total_s.expected, low=tokens / total_s.high, high=tokens / total_s.low)
    rented = owned = joules = None
    if processor.rent_usd_per_h is not None:
        rented = usd_per_million_tokens(processor.rent_usd_per_h.times(devices), rate)
    drawn = STREAMING_POWER_SHARE if binds in {"link", "disk"} else power_share(1.0)
    try:
        owned = usd_per_million_tokens(scaled(owned_usd_per_h(processor, drawn_share=drawn), devices), rate)
    except MachineError:
        owned = None  # the catalogue knows no price or no power
    if processor.power_w is not None:
        joules = joules_per_token(processor.power_w, rate, devices=devices, drawn_share=drawn)
    return Price(
        usd_per_million_tokens=rented,
        usd_per_750_words=None if rented is None else usd_per_page(rented),
        owned_usd_per_million_tokens=owned,
        joules_per_token=joules,
    )
