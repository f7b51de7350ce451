"""The plan: for each block where it lives; slots, dtype, memory. Frozen; one for planner, simulator, runtime."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from headrace.dtypes import DTYPES
from headrace.errors import InvalidRequestError


class Strategy(StrEnum):
    """How weights reach the processor."""

    RESIDENT = "resident"
    SEQUENTIAL = "sequential"
    OVERLAP = "overlap"


class Placement(StrEnum):
    """Where a block's weights live between its turns, and by that who computes it and how it travels."""

    DEVICE = "device"
    """in the computing device's memory for good: read once, never travels again"""
    HOST = "host"
    """in host memory, page-locked where the system allows it; copied to an accelerator in every pass"""
    DISK = "disk"
    """in the checkpoint only; read in every pass"""
    CPU = "cpu"
    """in host memory, and computed there by the processor: its activations travel instead"""


TRAVELLING = (Placement.HOST, Placement.DISK)
"""places from which a block passes through a slot of the computing device"""


class EmbeddingPlacement(StrEnum):
    """Where the rows of the input embedding come from."""

    RESIDENT = "resident"
    """a table of its own in the computing device's memory"""
    HEAD = "head"
    """tied weights whose head is resident: the rows are taken from there"""
    ROWS = "rows"
    """read row by row from the checkpoint"""
    HOST = "host"
    """a table in host memory, from which an accelerator is given the rows of each pass"""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked of the model: `sequences` prompts of `prompt_tokens` each, `generate_tokens` more for each."""

    sequences: int = 1
    prompt_tokens: int = 16
    generate_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("sequences", "prompt_tokens", "generate_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def context_tokens(self) -> int:
        """Longest context of the run."""
        return self.prompt_tokens + self.generate_tokens


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of the computing device's memory by purpose; the budget bounds their sum."""

    resident_bytes: int
    slots_bytes: int
    fixed_bytes: int
    embedding_bytes: int
    conversion_bytes: int
    """buffer in which weights are widened to the compute dtype or put together"""
    kv_cache_bytes: int
    work_space_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def arena_bytes(self) -> int:
        """What holds weights as stored: residents and slots."""
        return self.resident_bytes + self.slots_bytes


@dataclass(frozen=True, kw_only=True)
class HostMemoryUse:
    """Bytes of host memory by purpose where an accelerator computes; the host budget bounds their sum."""

    stores_bytes: int
    """blocks that wait here to be copied"""
    cpu_bytes: int
    """blocks that the processor computes, with the buffer in which it converts"""
    ring_bytes: int
    """page-locked chunks between disk and device"""
    embedding_bytes: int
    kv_cache_bytes: int
    """of blocks that the processor computes, or of all where the cache is kept here"""
    work_space_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


@dataclass(frozen=True, kw_only=True)
class AcceleratorPlan:
    """What a plan says beyond the processor's own when an accelerator computes."""

    device: str
    places: tuple[Placement, ...]
    """per block, in the order of a pass"""
    host: HostMemoryUse
    host_budget_bytes: int
    chunk_bytes: int
    """of one read, and of one place of the ring"""
    ring_chunks: int
    cache_on_host: bool = False
    """keys and values wait in host memory and visit the device layer by layer"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """For each block where it lives; how many slots; in which dtype; and what memory that takes."""

    strategy: Strategy
    resident: tuple[bool, ...]
    """per block, in the order of a pass"""
    slots: int
    slot_bytes: int
    embedding: EmbeddingPlacement
    compute_dtype: str
    memory: MemoryUse
    budget_bytes: int
    workload: Workload
    streamed_bytes_per_pass: int
    """bytes that pass through the slots"""
    accelerator: AcceleratorPlan | None = None
    """None: the processor computes, from its own memory"""

    @property
    def places(self) -> tuple[Placement, ...]:
        """Where each block lives."""
        if self.accelerator is not None:
            return self.accelerator.places
        return places_of(self.resident)

    @property
    def device(self) -> str:
        """Who computes."""
        return "cpu" if self.accelerator is None else self.accelerator.device

    @property
    def num_blocks(self) -> int:
        """Blocks in a pass."""
        return len(self.resident)

    @property
    def resident_blocks(self) -> int:
        """Blocks that stay."""
        return sum(self.resident)

    @property
    def streamed_blocks(self) -> int:
        """Blocks that pass through the slots."""
        return sum(place in TRAVELLING for place in self.places)

    @property
    def cpu_blocks(self) -> int:
        """Blocks that the processor computes for an accelerator."""
        return sum(place is Placement.CPU for place in self.places)

    def to_json(self) -> str:
        """Return the plan as JSON text; `from_json` is its inverse."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Rebuild a plan from `to_json`; raises InvalidRequestError where fields are missing or of the wrong kind."""
        try:
            raw: dict[str, Any] = json.loads(text)
            raw["strategy"] = Strategy(raw["strategy"])
            raw["embedding"] = EmbeddingPlacement(raw["embedding"])
            raw["resident"] = tuple(_flag(flag) for flag in raw["resident"])
            raw["memory"] = MemoryUse(**_counts(raw["memory"]))
            raw["workload"] = Workload(**_counts(raw["workload"]))
            if raw["accelerator"] is not None:
                raw["accelerator"] = _accelerator(raw["accelerator"])
            if raw["compute_dtype"] not in DTYPES:
                raise ValueError(f"compute_dtype is {raw['compute_dtype']!r}")
            _counts({name: raw[name] for name in ("slots", "slot_bytes", "budget_bytes", "streamed_bytes_per_pass")})
            return cls(**raw)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InvalidRequestError(f"this is not a plan: {type(error).__name__}: {error}") from error


def places_of(resident: Sequence[bool]) -> tuple[Placement, ...]:
    """Places where only the processor computes: in its memory or on the disk."""
    return tuple(Placement.DEVICE if stays else Placement.DISK for stays in resident)


def _accelerator(raw: dict[str, Any]) -> AcceleratorPlan:
    device, on_host = raw["device"], raw["cache_on_host"]
    if not isinstance(device, str):
        raise ValueError(f"device is {device!r}")
    _counts({name: raw[name] for name in ("host_budget_bytes", "chunk_bytes", "ring_chunks")})
    return AcceleratorPlan(
        **{
            **raw,
            "places": tuple(Placement(place) for place in raw["places"]),
            "host": HostMemoryUse(**_counts(raw["host"])),
            "cache_on_host": _flag(on_host),
        }
    )


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"resident holds {value!r} where true or false is expected")
    return value


def _counts(fields: dict[str, Any]) -> dict[str, int]:
    for name, value in fields.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}, not a whole number from 0 on")
    return fields
