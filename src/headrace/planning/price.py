"""Dollars and energy of an answer: the devices that an arrangement uses, at their rent, for the time it takes."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.planning.comparison import Answer
from headrace.planning.machine import Machine
from headrace.planning.plan import Workload
from headrace.planning.quantity import Quantity
from headrace.planning.rates import Interval

TOKENS_PER_750_WORDS = 1000
"""OpenAI's own rule"""
_STREAMING_POWER = Quantity(0.6, 0.3, 1.0, "no source gives the power of a device that waits for a link: idle to full")
_BUSY_POWER = Quantity(0.8, 0.5, 1.0, "0.43 + 0.43 x busy share of rated power in measured serving, and its spread")


@dataclass(frozen=True, kw_only=True)
class Price:
    """Per generated token, prefill included; None where the catalogue knows no rent or no power."""

    usd_per_million_tokens: Interval | None
    usd_per_750_words: Interval | None
    joules_per_token: Interval | None


def price(machine: Machine, answer: Answer, work: Workload, *, token_multiplier: float = 1.0) -> Price:
    """Spread the rent of the used devices over the tokens of the whole work.

    `token_multiplier`: tokens computed for each token that the user gets (best of n, revisions).
    """
    tokens = work.sequences * work.generate_tokens / token_multiplier
    seconds = answer.total_s
    devices = answer.arrangement.devices
    rent, power = machine.processor.rent_usd_per_h, machine.processor.power_w
    usd = None if rent is None else _product(rent.times(devices / 3600 / tokens), seconds)
    joules = None
    if power is not None:
        waits = answer.binds in {"host link", "disk"}
        share = _STREAMING_POWER if waits else _BUSY_POWER
        joules = _product(
            Quantity(
                power.expected * share.expected, power.low * share.low, power.high * share.high, power.source
            ).times(devices / tokens),
            seconds,
        )
    return Price(
        usd_per_million_tokens=None if usd is None else _scaled(usd, 1e6),
        usd_per_750_words=None if usd is None else _scaled(usd, TOKENS_PER_750_WORDS),
        joules_per_token=joules,
    )


def _product(rate: Quantity, seconds: Interval) -> Interval:
    return Interval(
        expected=rate.expected * seconds.expected, low=rate.low * seconds.low, high=rate.high * seconds.high
    )


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(expected=interval.expected * factor, low=interval.low * factor, high=interval.high * factor)
