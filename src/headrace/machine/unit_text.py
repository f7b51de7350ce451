"""Quantities with their units, as machine files write them: `"24GB/s"`, `"989TFLOPS"`, `"80GB"`, `"5us"`, `"2.5USD/h"`.

A number without a unit is refused: whether 24 means GB/s, GiB/s or Gbit/s is what goes wrong unseen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from headrace.errors import MachineError, near_names
from headrace.machine.quantity import Quantity

_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
_BYTES = {f"{prefix}B": factor for prefix, factor in (_PREFIXES | _BINARY).items()}

UNITS: dict[str, dict[str, float]] = {
    "size": _BYTES,
    "rate": {f"{name}/s": factor for name, factor in _BYTES.items()},
    "flops": {f"{prefix}FLOPS": factor for prefix, factor in _PREFIXES.items()}
    | {f"{prefix}OPS": factor for prefix, factor in _PREFIXES.items()},
    "time": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "ps": 1e-12, "fs": 1e-15},
    "power": {"W": 1.0, "kW": 1e3, "MW": 1e6},
    "rent": {"USD/h": 1.0},
    "price": {"USD": 1.0, "kUSD": 1e3},
    "share": {"": 1.0},
    "factor": {"": 1.0},
}
"""by kind of quantity: units and what they mean in bytes, bytes/s, operations/s, seconds, watts, dollars"""
_EXAMPLES = {
    "size": "80GB",
    "rate": "24GB/s",
    "flops": "312TFLOPS",
    "time": "5us",
    "power": "400W",
    "rent": "2.5USD/h",
    "price": "11500USD",
    "share": "0.8",
    "factor": "1.2",
}
_UNITLESS = ("share", "factor")
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*(\S*)\s*")
LARGEST = 1e24


def read_number(value: object, kind: str, *, field: str) -> float:
    """Read one number with its unit; raises MachineError naming `field` and the form that is expected."""
    example = _EXAMPLES[kind]
    if kind in _UNITLESS and isinstance(value, int | float) and not isinstance(value, bool):
        value = repr(float(value))
    if isinstance(value, bool) or not isinstance(value, str):
        if isinstance(value, int | float):
            raise MachineError(f'{field} is {value}, without a unit; write for instance {field} = "{example}"')
        raise MachineError(f'{field} is {value!r}; a text such as "{example}" is expected')
    match = _NUMBER.fullmatch(value)
    if match is None:
        raise MachineError(f'{field} is {value!r}; a number from 0 on with its unit is expected, such as "{example}"')
    number, unit = float(match[1]), match[2]
    units = UNITS[kind]
    if unit not in units:
        if not unit:
            raise MachineError(f'{field} is {value!r}, without a unit; write for instance "{example}"')
        if "bit" in unit or re.fullmatch(r"[kKMGT]?b(/s|ps)", unit):
            raise MachineError(f'{field} is {value!r}: bits are not accepted; write bytes, such as "{example}"')
        known = ", ".join(name for name in units if "i" not in name)
        raise MachineError(f"{field} is {value!r}: unknown unit {unit!r}; {near_names(unit, units)}known: {known}")
    if not number * units[unit] <= LARGEST:
        raise MachineError(f"{field} is {value!r}, which is beyond all machines")
    return float(Decimal(match[1]) * _decimal(units[unit]))  # 84ps is 8.4e-11 to the last bit


def read_quantity(value: object, kind: str, *, field: str, source: str) -> Quantity:
    """Read a number, or a table of expected, low, high and source."""
    if not isinstance(value, Mapping):
        return Quantity.of(read_number(value, kind, field=field), source)
    unknown = set(value) - {"expected", "low", "high", "source"}
    if unknown:
        raise MachineError(f"{field} has unknown entries {sorted(unknown)}; known: expected, low, high, source")
    if "expected" not in value:
        raise MachineError(f"{field}.expected is missing")
    expected = read_number(value["expected"], kind, field=f"{field}.expected")
    low = read_number(value.get("low", value["expected"]), kind, field=f"{field}.low")
    high = read_number(value.get("high", value["expected"]), kind, field=f"{field}.high")
    if not low <= expected <= high:
        raise MachineError(f"{field}: low <= expected <= high is expected, found {low:g}, {expected:g}, {high:g}")
    return Quantity(expected, low, high, str(value.get("source", source)))


def write_number(number: float, kind: str) -> str:
    """Write a number with the largest decimal unit that leaves at least 1; read back, it is the same number."""
    decimal = {name: factor for name, factor in UNITS[kind].items() if not re.search("i|^K|(?<!FL)OPS", name)}
    name = max(
        (name for name, factor in decimal.items() if factor <= number),
        key=decimal.__getitem__,
        default=next(name for name, factor in decimal.items() if factor == 1.0),
    )
    return f"{(_decimal(number) / _decimal(decimal[name])).normalize():f}{name}"


def write_quantity(quantity: Quantity, kind: str, *, default_source: str = "") -> Any:
    """Write a quantity as `read_quantity` reads it where `default_source` is the source of all that state none."""
    exact = quantity.low == quantity.expected == quantity.high
    if exact and quantity.source == default_source:
        return _number_or_text(quantity.expected, kind)
    names = ("expected",) if exact else ("expected", "low", "high")
    made = {name: _number_or_text(getattr(quantity, name), kind) for name in names}
    return made if quantity.source == default_source else made | {"source": quantity.source}


def _number_or_text(number: float, kind: str) -> float | str:
    return number if kind in _UNITLESS else write_number(number, kind)


def _decimal(number: float) -> Decimal:
    return Decimal(repr(number))
