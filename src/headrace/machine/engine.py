"""What software makes of a machine: which share of its rates is reached, and the fixed times per layer and pass.

An `Engine` is a way to run, not a product's specification: its constants are those that published measurements of
such software imply (docs/formulas.md tells how they were fitted, on which rows, and how well they hold on others).
The engines that sources name lie in `engines.toml`, which `bench/fit_engines.py` writes.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from headrace.errors import MachineError, near_names
from headrace.machine.quantity import Quantity
from headrace.machine.unit_text import read_quantity

_NONE = Quantity(0.0, 0.0, 0.0, "not seen apart")
_ALL = Quantity(1.0, 0.3, 1.0, "measured with NCCL; engines' own kernels have less")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Shares of peak rates (0 to 1) and fixed seconds."""

    name: str
    memory_share: Quantity
    """of the device's memory bandwidth, while weights are read by small batches"""
    compute_share: Quantity
    """of the achievable matrix rate (Processor.achievable x peak), in large products"""
    attention_share: Quantity
    """of the memory bandwidth, while the KV cache is read"""
    layer_overhead_s: Quantity
    """per layer and pass on one device: launches, norms, what does not overlap"""
    split_overhead_s: Quantity
    """added per layer where its width is split over devices of a node, beside the collective's own bytes"""
    pass_overhead_s: Quantity
    """per pass: sampling, scheduling, the interpreter"""
    link_share: Quantity
    """of a link's achieved rate, while weights stream"""
    quantised_share: Quantity
    """of the memory bandwidth share, where weights are unpacked from 4 or 8 bits while they are read"""
    across_overhead_s: Quantity = _NONE
    """added per layer besides where the width spans computers"""
    exchange_excess: Quantity = _ALL
    """of what a measured all-reduce takes beyond latency and bandwidth in the middle sizes: 1 with NCCL on A100, less
    with kernels of an engine's own"""
    token_overhead_s: Quantity = _NONE
    """per sequence and pass: sampling, scheduling, answering"""
    overlaps_hops: bool = True
    """whether reading from disk goes on while the host's memory is copied to the device"""
    overlaps_copies: bool = True
    """whether copies to the device go on while it computes; False where measured prefetching brought nothing"""
    spread: Quantity
    """factor on every time: how far such software is off the formulas"""


PRESENT = Engine(
    name="present",
    memory_share=Quantity(0.80, 0.60, 0.95, "formulas.md section 2: 0.63-0.97 over published engines"),
    compute_share=Quantity(0.85, 0.60, 1.0, "of the measured matrix rate; formulas.md section 2"),
    attention_share=Quantity(0.60, 0.35, 0.90, "estimate; attention kernels at small batches"),
    layer_overhead_s=Quantity(15e-6, 4e-6, 60e-6, "Erdil: 4 us a launch x 4 products per layer"),
    split_overhead_s=Quantity(50e-6, 30e-6, 90e-6, "formulas.md section 4: b of a/n + b, 50-80 us per layer"),
    pass_overhead_s=Quantity(0.5e-3, 0.1e-3, 3e-3, "estimate; sampling and scheduling"),
    link_share=Quantity(0.95, 0.80, 1.0, "pinned copies in large blocks"),
    quantised_share=Quantity(0.85, 0.55, 1.0, "formulas.md section 2: Q4 rows against f16 rows"),
    spread=Quantity(1.0, 0.55, 2.0, "rows of engines that no other source knows, docs/formulas.md"),
)
"""Well-kept software of today, unknown otherwise. No constant of it is fitted: other engines are drawn to it."""

CONSTANTS = tuple(field.name for field in fields(Engine) if field.type == "Quantity")


@functools.cache
def engines() -> dict[str, Engine]:
    """The engines that sources name."""
    return {engine.name: engine for engine, _ in _read()}


def engine_named(text: str) -> Engine:
    """Return the engine that a source's text names first; PRESENT where it names none that is known."""
    low = text.lower()
    found = [(low.find(part), -len(part), engine.name) for engine, parts in _read() for part in parts if part in low]
    return engines()[min(found)[2]] if found else PRESENT


@functools.cache
def _read() -> tuple[tuple[Engine, tuple[str, ...]], ...]:
    text = resources.files("headrace.machine").joinpath("engines.toml").read_text(encoding="utf-8")
    return tuple((read_engine(raw), tuple(raw["named"])) for raw in tomllib.loads(text)["engine"])


def read_engine(raw: Mapping[str, Any]) -> Engine:
    """Read one table of `engines.toml`. Raises MachineError that names the engine and the field."""
    where = f"engines.toml, {raw['name']}"
    known = {field.name for field in fields(Engine)} | {"named", "source"}
    if unknown := sorted(set(raw) - known):
        raise MachineError(f"{where} has an unknown entry {unknown[0]}; {near_names(unknown[0], known)}")
    if missing := sorted(set(CONSTANTS) - set(raw)):
        raise MachineError(f"{where}: {missing[0]} is missing")
    values: dict[str, Any] = {name: value for name, value in raw.items() if name.startswith("overlaps_")}
    for name in CONSTANTS:
        kind = "time" if name.endswith("_s") else "share"
        values[name] = read_quantity(raw[name], kind, field=f"{where}: {name}", source=raw["source"])
    return Engine(name=raw["name"], **values)
