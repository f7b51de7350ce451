"""What a device costs that is bought, and what training costs beside inference (docs/formulas.md, section 7)."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from importlib import resources

from headrace.errors import InvalidRequestError, MachineError
from headrace.machine.machine import Processor
from headrace.machine.quantity import Interval, Quantity, interval_of

HOURS_PER_YEAR = 8760.0
FLOPS_PER_PARAMETER_TRAINED = 6.0
"""per parameter and token: two forward, four backward"""
FLOPS_PER_PARAMETER_INFERRED = 2.0


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What owning costs beside the device; every one can be replaced."""

    years: Quantity
    """over which servers are written off"""
    utilisation: Quantity
    """share of its hours that a device works"""
    pue: Quantity
    """site power over the computers' power"""
    usd_per_kwh: Quantity
    server_share: Quantity
    """price of host, network and building per price of the device"""
    server_w: Quantity
    """power of the host per device"""

    def __post_init__(self) -> None:
        for name, most in (("years", 100.0), ("utilisation", 1.0), ("pue", 10.0)):
            value: Quantity = getattr(self, name)
            if value.low <= 0 or value.high > most:
                raise InvalidRequestError(
                    f"{name} of {value.low:g} to {value.high:g} is out of range: above 0, at most {most:g}"
                )
        if self.pue.low < 1:
            raise InvalidRequestError(f"a PUE of {self.pue.low:g}: a site never takes less power than its computers")


_TABLES = tomllib.loads(resources.files("headrace.economics").joinpath("terms.toml").read_text(encoding="utf-8"))
DEFAULT_TERMS = Terms(**{name: Quantity(**table) for name, table in _TABLES.items()})


def owned_usd_per_h(processor: Processor, *, terms: Terms, drawn: Quantity) -> Interval:
    """Dollars per device and *working* hour of an owned device, which draws this share of its rated power.

    price x (1 + server) / (years x 8760 x utilisation) + kW x PUE x dollars per kWh. Raises MachineError where price or
    power are unknown.
    """
    if processor.price_usd is None or processor.power_w is None:
        lacking = "price" if processor.price_usd is None else "rated power"
        raise MachineError(f"no {lacking} is known for {processor.name}, so owning it cannot be reckoned; give one")
    known = {"price": processor.price_usd, "rated": processor.power_w, "drawn": drawn}
    return interval_of(
        known | {field.name: getattr(terms, field.name) for field in fields(terms)},
        lambda v: (
            v["price"] * (1 + v["server_share"]) / (v["years"] * HOURS_PER_YEAR * v["utilisation"])
            + (v["rated"] * v["drawn"] + v["server_w"]) / 1000 * v["pue"] * v["usd_per_kwh"]
        ),
    )


def crossover_tokens(training_tokens: float, *, training_share: float = 1.0, inference_share: float = 1.0) -> float:
    """Tokens after which inference has cost as much as training did.

    6 N D = 2 N T gives T = 3 D operations for operations. In money a token's operations cost more where less of the
    peak is reached, so T is 3 D x inference share / training share (shares of peak, both 1: count operations).
    """
    for what, share in (("training", training_share), ("inference", inference_share)):
        if not 0 < share <= 1:
            raise InvalidRequestError(f"the share of peak in {what} must lie above 0 and up to 1, not at {share}")
    ratio = FLOPS_PER_PARAMETER_TRAINED / FLOPS_PER_PARAMETER_INFERRED
    return ratio * training_tokens * (inference_share / training_share)
