"""The machine as plans see it: how fast its disk reads, how fast it computes, how much it may hold. TOML on disk.

Every constant says where it comes from. The only machine so far is one processor that computes what a disk brings;
links and tiers of whole machines are to follow.
"""

from __future__ import annotations

import bisect
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from headrace.errors import MachineError


class CurvePoint(NamedTuple):
    """Seconds that one weight element of a matrix product takes when `tokens` tokens are multiplied with it at once."""

    tokens: int
    seconds_per_parameter: float


@dataclass(frozen=True, kw_only=True)
class ComputeCurve:
    """Arithmetic as a curve over tokens per pass, for one dtype of the product and one dtype of the stored weights."""

    compute_dtype: str
    stored_dtype: str
    points: tuple[CurvePoint, ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise MachineError("a compute curve needs at least one point")
        tokens = [point.tokens for point in self.points]
        if tokens != sorted(set(tokens)) or tokens[0] < 1:
            raise MachineError("the points of a compute curve must be in order of tokens, none twice, from 1 on")
        if any(not 0 < point.seconds_per_parameter < math.inf for point in self.points):
            raise MachineError("a compute curve holds a time that is not positive")

    def seconds_per_parameter(self, tokens: int) -> float:
        """Interpolate in log-log; proportional to `tokens` beyond the last point, constant before the first."""
        points = self.points
        if tokens <= points[0].tokens:
            return points[0].seconds_per_parameter
        if tokens >= points[-1].tokens:
            return points[-1].seconds_per_parameter * tokens / points[-1].tokens
        upper = bisect.bisect_right([point.tokens for point in points], tokens)
        low, high = points[upper - 1], points[upper]
        share = math.log(tokens / low.tokens) / math.log(high.tokens / low.tokens)
        ratio = high.seconds_per_parameter / low.seconds_per_parameter
        return low.seconds_per_parameter * ratio**share

    def scaled(self, factor: float) -> ComputeCurve:
        """The same curve with every time multiplied by `factor`."""
        points = tuple(CurvePoint(p.tokens, p.seconds_per_parameter * factor) for p in self.points)
        return ComputeCurve(compute_dtype=self.compute_dtype, stored_dtype=self.stored_dtype, points=points)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One computer that computes on its processor what its disk brings."""

    name: str
    memory_bytes: int
    read_bytes_per_s: float
    """direct reads of large files, with the reader's own threads and chunk size"""
    read_chunk_bytes: int = 8 << 20
    reader_threads: int = 2
    compute: tuple[ComputeCurve, ...]
    block_overhead_s: float = 0.0003
    """fixed time per block and pass: norms, activation functions, the interpreter"""
    pass_overhead_s: float = 0.002
    """time per pass beside the blocks: sampling, masks, embedding"""
    compute_slowdown: float = 1.0
    """how many times longer computing takes while the disk is being read"""
    read_slowdown: float = 1.0
    """how many times longer reading takes while the processor computes"""
    sources: Mapping[str, str] = field(default_factory=dict)
    """for each constant, where it comes from"""

    def __post_init__(self) -> None:
        if not 0 < self.read_bytes_per_s < math.inf:
            raise MachineError(f"{self.name}: the disk's bandwidth must be positive, not {self.read_bytes_per_s}")
        if self.memory_bytes <= 0:
            raise MachineError(f"{self.name}: memory must be positive, not {self.memory_bytes}")
        if self.reader_threads < 1 or self.read_chunk_bytes < 4096:
            raise MachineError(f"{self.name}: at least one reader thread and chunks of 4096 bytes are needed")
        for name in ("compute_slowdown", "read_slowdown"):
            if not 1.0 <= getattr(self, name) < 100:
                raise MachineError(f"{self.name}: {name} must lie between 1 and 100")

    def curve(self, *, compute_dtype: str, stored_dtype: str) -> ComputeCurve:
        """The curve for this pair of dtypes; raises MachineError when the machine was not measured with it."""
        for curve in self.compute:
            if (curve.compute_dtype, curve.stored_dtype) == (compute_dtype, stored_dtype):
                return curve
        raise MachineError(
            f"{self.name} has no measurement of {compute_dtype} products with {stored_dtype} weights; "
            "run `headrace probe` again"
        )

    def to_toml(self) -> str:
        """Return the description as TOML; `from_toml` is its inverse."""
        raw: dict[str, Any] = {
            "name": self.name,
            "memory_bytes": self.memory_bytes,
            "disk": {
                "read_bytes_per_s": self.read_bytes_per_s,
                "chunk_bytes": self.read_chunk_bytes,
                "threads": self.reader_threads,
                "slowdown_while_computing": self.read_slowdown,
            },
            "processor": {
                "block_overhead_s": self.block_overhead_s,
                "pass_overhead_s": self.pass_overhead_s,
                "slowdown_while_reading": self.compute_slowdown,
                "curves": [
                    {
                        "compute_dtype": curve.compute_dtype,
                        "stored_dtype": curve.stored_dtype,
                        "tokens": [point.tokens for point in curve.points],
                        "seconds_per_parameter": [point.seconds_per_parameter for point in curve.points],
                    }
                    for curve in self.compute
                ],
            },
            "sources": dict(self.sources),
        }
        return tomli_w.dumps(raw)

    @classmethod
    def from_toml(cls, text: str, *, origin: str) -> Machine:
        """Read a description; raises MachineError that names `origin` and what is wrong with it."""
        try:
            raw = tomllib.loads(text)
            disk, processor = raw["disk"], raw["processor"]
            curves = tuple(
                ComputeCurve(
                    compute_dtype=str(curve["compute_dtype"]),
                    stored_dtype=str(curve["stored_dtype"]),
                    points=tuple(
                        CurvePoint(int(tokens), float(seconds))
                        for tokens, seconds in zip(curve["tokens"], curve["seconds_per_parameter"], strict=True)
                    ),
                )
                for curve in processor["curves"]
            )
            return cls(
                name=str(raw["name"]),
                memory_bytes=int(raw["memory_bytes"]),
                read_bytes_per_s=float(disk["read_bytes_per_s"]),
                read_chunk_bytes=int(disk["chunk_bytes"]),
                reader_threads=int(disk["threads"]),
                read_slowdown=float(disk.get("slowdown_while_computing", 1.0)),
                compute=curves,
                block_overhead_s=float(processor["block_overhead_s"]),
                pass_overhead_s=float(processor["pass_overhead_s"]),
                compute_slowdown=float(processor.get("slowdown_while_reading", 1.0)),
                sources={str(key): str(value) for key, value in raw.get("sources", {}).items()},
            )
        except (tomllib.TOMLDecodeError, TypeError, ValueError, AttributeError) as error:
            raise MachineError(f"{origin} is not a machine description: {error}") from error
        except KeyError as error:
            raise MachineError(f"{origin} lacks the field {error}; `headrace probe` writes a complete one") from error

    @classmethod
    def load(cls, path: Path) -> Machine:
        """Read a TOML file."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MachineError(f"the machine file {path} cannot be read: {error}") from error
        return cls.from_toml(text, origin=str(path))
