"""Dollars and joules of tokens: what an hour of a rented device costs, spread over what it writes in it.

Pure functions of quantities. Results are intervals: every constant is moved to its ends, independently of the others
(`headrace.machine.quantity.interval_of`). Formulas: docs/formulas.md, section 7. `economics/owning.py` has the price of
devices that are bought.
"""

from __future__ import annotations

from typing import NamedTuple

from headrace.errors import InvalidRequestError
from headrace.machine.machine import Machine
from headrace.machine.quantity import Interval, Quantity, interval_of
from headrace.planning.plan import Plan

TOKENS_PER_PAGE = 1000
"""as many tokens are about 750 English words, a page: OpenAI's own rule"""
_EMPTY_SHARE = 0.43
_BUSY_SHARE = 0.43
_POWER_SPREAD = 0.3
STREAMING_POWER_SHARE = Quantity(
    0.43, 0.1, 1.0, "no source gives the power of a device that waits for a link: bare idle to full rated power"
)


def drawn_share(binds: str, busy: float = 1.0) -> Quantity:
    """Share of a device's rated power that it draws, `busy` of its places taken (0 to 1), where `binds` is waited for.

    0.43 + 0.43 x busy, as vllm-sr-sim fits to ML.ENERGY's measurements (H100: 300 W at batch 1, 600 W at 128).
    """
    if binds in ("link", "disk"):
        return STREAMING_POWER_SHARE
    expected = _EMPTY_SHARE + _BUSY_SHARE * busy
    low, high = expected / (1 + _POWER_SPREAD), min(1.0, expected * (1 + _POWER_SPREAD))
    return Quantity(expected, low, high, "0.43 + 0.43 x busy share (vllm-sr-sim over ML.ENERGY v3)")


def usd_per_million_tokens(usd_per_h: Interval, tokens_per_s: Interval) -> Interval:
    """Dollars per million tokens of something that costs `usd_per_h` and does `tokens_per_s` (output, or input)."""
    if tokens_per_s.low <= 0:
        raise InvalidRequestError(f"tokens per second must be more than 0, not {tokens_per_s.low:g}")
    return interval_of(
        {"usd_per_h": usd_per_h, "tokens_per_s": tokens_per_s},
        lambda v: v["usd_per_h"] / 3600 / v["tokens_per_s"] * 1e6,
    )


def usd_per_page(usd_per_million: Interval) -> Interval:
    """Dollars per 750 words, from dollars per million tokens."""
    return usd_per_million.times(TOKENS_PER_PAGE / 1e6)


def joules_per_token(watts: Quantity, tokens_per_s: Interval, drawn: Quantity, *, devices: int = 1) -> Interval:
    """Joules of the devices per token; `watts` is one device's rated power, `drawn` the share that it draws of that."""
    return interval_of(
        {"rated": watts, "drawn": drawn, "tokens_per_s": tokens_per_s},
        lambda v: devices * v["rated"] * v["drawn"] / v["tokens_per_s"],
    )


class Price(NamedTuple):
    """Per generated token, prefill included, on rented devices; None where the catalogue knows no rent or no power."""

    usd_per_million_tokens: Interval | None
    usd_per_750_words: Interval | None
    joules_per_token: Interval | None


def price(machine: Machine, plan: Plan, total_s: Interval, *, binds: str, token_multiplier: float = 1.0) -> Price:
    """Spread rent and power of the used devices over the tokens of the whole work, done in `total_s`.

    `token_multiplier`: tokens computed for each token that the user gets (best of n, revisions).
    """
    work, devices, processor = plan.workload, plan.parallelism.devices, machine.processor
    rate = total_s.dividing(work.sequences * work.generate_tokens / token_multiplier)
    rented = joules = None
    if processor.rent_usd_per_h is not None:
        rented = usd_per_million_tokens(processor.rent_usd_per_h.times(devices), rate)
    if processor.power_w is not None:
        joules = joules_per_token(processor.power_w, rate, drawn_share(binds), devices=devices)
    return Price(rented, None if rented is None else usd_per_page(rented), joules)
