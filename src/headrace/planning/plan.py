"""The plan: for each block where it lives; slots, dtype, memory. Frozen; one for planner, simulator, runtime."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from headrace.errors import InvalidRequestError


class Strategy(StrEnum):
    """How weights reach the processor."""

    RESIDENT = "resident"
    SEQUENTIAL = "sequential"
    OVERLAP = "overlap"


class EmbeddingPlacement(StrEnum):
    """Where the rows of the input embedding come from."""

    RESIDENT = "resident"
    """a table of its own in memory"""
    HEAD = "head"
    """tied weights whose head is resident: the rows are taken from there"""
    ROWS = "rows"
    """read row by row from the checkpoint"""


COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED_AS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


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
    """Bytes on the computing device by purpose; the budget bounds their sum."""

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
        return self.num_blocks - self.resident_blocks

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
            if raw["compute_dtype"] not in COMPUTE_DTYPES:
                raise ValueError(f"compute_dtype is {raw['compute_dtype']!r}")
            _counts({name: raw[name] for name in ("slots", "slot_bytes", "budget_bytes", "streamed_bytes_per_pass")})
            return cls(**raw)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InvalidRequestError(f"this is not a plan: {type(error).__name__}: {error}") from error


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"resident holds {value!r} where true or false is expected")
    return value


def _counts(fields: dict[str, Any]) -> dict[str, int]:
    for name, value in fields.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}, not a whole number from 0 on")
    return fields
