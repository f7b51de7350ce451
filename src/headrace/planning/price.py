"""Dollars and energy of an answer: the devices that an arrangement uses, rented or owned, for the time it takes."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import MachineError
from headrace.planning.comparison import Answer
from headrace.planning.economics import (
    STREAMING_POWER_SHARE,
    joules_per_token,
    owned_usd_per_h,
    power_share,
    scaled,
    usd_per_million_tokens,
    usd_per_page,
)
from headrace.planning.machine import Machine
from headrace.planning.plan import Workload
from headrace.planning.rates import Interval


@dataclass(frozen=True, kw_only=True)
class Price:
    """Per generated token, prefill included; None where the catalogue knows no rent, no price or no power."""

    usd_per_million_tokens: Interval | None
    """rented"""
    usd_per_750_words: Interval | None
    owned_usd_per_million_tokens: Interval | None
    joules_per_token: Interval | None


def price(machine: Machine, answer: Answer, work: Workload, *, token_multiplier: float = 1.0) -> Price:
    """Spread rent, ownership and power of the used devices over the tokens of the whole work.

    `token_multiplier`: tokens computed for each token that the user gets (best of n, revisions).
    """
    tokens = work.sequences * work.generate_tokens / token_multiplier
    seconds, devices, processor = answer.total_s, answer.arrangement.devices, machine.processor
    rate = Interval(expected=tokens / seconds.expected, low=tokens / seconds.high, high=tokens / seconds.low)
    rented = owned = joules = None
    if processor.rent_usd_per_h is not None:
        rented = usd_per_million_tokens(processor.rent_usd_per_h.times(devices), rate)
    drawn = STREAMING_POWER_SHARE if answer.binds in {"host link", "disk"} else power_share(1.0)
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
