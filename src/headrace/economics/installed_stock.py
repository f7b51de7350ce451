"""The accelerators installed in the world: how many, of whose make, as of when."""

from __future__ import annotations

from typing import NamedTuple

from headrace.economics.fleet import Stock
from headrace.machine.quantity import Quantity

DATE = "end of 2025"
SOURCE = "Epoch AI, counts of AI chips (ai-chip-counts @d1b1bc3), cumulative medians"
_SPREAD = 0.25
"""either way; the medians' own intervals are wider for some makers and narrower for others; estimate"""


class Maker(NamedTuple):
    """One maker's share, in H100 equivalents."""

    name: str
    h100_equivalents: float


MAKERS = (
    Maker("NVIDIA", 13.66e6),
    Maker("Google TPU", 3.81e6),
    Maker("AMD", 1.24e6),
    Maker("Amazon Trainium", 1.02e6),
)
DEVICE_POWER_W = Quantity.about(12.4e9, f"{SOURCE}: power of the chips alone, {DATE}", share=_SPREAD)


def installed_stock() -> Stock:
    """Everybody's together."""
    total = sum(maker.h100_equivalents for maker in MAKERS)
    return Stock(h100_equivalents=Quantity.about(total, SOURCE, share=_SPREAD), date=DATE)
