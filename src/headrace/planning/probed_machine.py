"""The machine as plans see it: how fast its disk reads, how fast it computes, how much it may hold. TOML on disk.

Every constant says where it comes from. This is the computer that `headrace probe` ran on: one processor that computes
what a disk brings. Whole machines with their devices and links are `machine.py`'s.
"""

from __future__ import annotations

import bisect
import math
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

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

    def seconds_per_parameter(self, tokens: float) -> float:
        """Interpolate in log-log; proportional to `tokens` beyond the last point, constant before the first."""
        points = self.points
        if tokens <= points[0].tokens:
            return points[0].seconds_per_parameter
        if tokens >= points[-1].tokens:
            return points[-1].seconds_per_parameter * (tokens / points[-1].tokens)
        upper = bisect.bisect_right([point.tokens for point in points], tokens)
        low, high = points[upper - 1], points[upper]
        share = math.log(tokens / low.tokens) / math.log(high.tokens / low.tokens)
        ratio = high.seconds_per_parameter / low.seconds_per_parameter
        return low.seconds_per_parameter * math.pow(ratio, share)

    def scaled(self, factor: float) -> ComputeCurve:
        """The same curve with every time multiplied by `factor`."""
        points = tuple(CurvePoint(p.tokens, p.seconds_per_parameter * factor) for p in self.points)
        return ComputeCurve(compute_dtype=self.compute_dtype, stored_dtype=self.stored_dtype, points=points)

    def through(self, measured: Sequence[CurvePoint]) -> ComputeCurve:
        """The same curve bent so that it passes through these points.

        What it was wrong by at a measured point is what it is taken to be wrong by beyond it, and between two of them
        what lies (log-log) between.
        """
        if not measured:
            return self
        errors = ComputeCurve(
            compute_dtype=self.compute_dtype,
            stored_dtype=self.stored_dtype,
            points=tuple(
                CurvePoint(p.tokens, p.seconds_per_parameter / self.seconds_per_parameter(p.tokens)) for p in measured
            ),
        )
        exact = {point.tokens: point for point in measured}
        last = measured[-1].tokens
        bent = {
            p.tokens: CurvePoint(p.tokens, p.seconds_per_parameter * errors.seconds_per_parameter(min(p.tokens, last)))
            for p in self.points
        }
        points = tuple(point for _, point in sorted((bent | exact).items()))
        return ComputeCurve(compute_dtype=self.compute_dtype, stored_dtype=self.stored_dtype, points=points)


class DiskDepth(NamedTuple):
    """Direct reads of one chunk size by a number of threads at once, and the bytes per second that this gave."""

    chunk_bytes: int
    threads: int
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class ProbedMachine:
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
    handover_s: float = 0.0
    """from asking a reader that stood still for a block until its bytes come, and from the last byte to the asker"""
    disk_depths: tuple[DiskDepth, ...] = ()
    """what the disk gave with other chunks and threads"""
    memory_bytes_per_s: float | None = None
    """copied by all processors: bytes read plus bytes written"""
    host_to_device_bytes_per_s: float | None = None
    """over the link to an accelerator; None where there is none"""
    sources: Mapping[str, str] = field(default_factory=dict)
    """for each constant, where it comes from"""

    def __post_init__(self) -> None:
        for name, value, least, bound in (
            ("memory_bytes", self.memory_bytes, 1, math.inf),
            ("disk.read_bytes_per_s", self.read_bytes_per_s, 1, math.inf),
            ("disk.chunk_bytes", self.read_chunk_bytes, 4096, math.inf),
            ("disk.threads", self.reader_threads, 1, 1024),
            ("disk.slowdown_while_computing", self.read_slowdown, 1, 100),
            ("disk.handover_s", self.handover_s, 0, math.inf),
            *(
                (f"disk.depths[{n}].chunk_bytes", depth.chunk_bytes, 4096, math.inf)
                for n, depth in enumerate(self.disk_depths)
            ),
            *((f"disk.depths[{n}].threads", depth.threads, 1, 1024) for n, depth in enumerate(self.disk_depths)),
            *(
                (f"disk.depths[{n}].bytes_per_s", depth.bytes_per_s, 1, math.inf)
                for n, depth in enumerate(self.disk_depths)
            ),
            ("memory.bytes_per_s", 1 if self.memory_bytes_per_s is None else self.memory_bytes_per_s, 1, math.inf),
            (
                "link.host_to_device_bytes_per_s",
                1 if self.host_to_device_bytes_per_s is None else self.host_to_device_bytes_per_s,
                1,
                math.inf,
            ),
            ("processor.block_overhead_s", self.block_overhead_s, 0, math.inf),
            ("processor.pass_overhead_s", self.pass_overhead_s, 0, math.inf),
            ("processor.slowdown_while_reading", self.compute_slowdown, 1, 100),
        ):
            if not least <= value < bound:
                limit = "a finite number" if bound == math.inf else f"below {bound}"
                raise MachineError(f"{self.name}: {name} is {value}; it must be at least {least} and {limit}")

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
                "handover_s": self.handover_s,
                "depths": [depth._asdict() for depth in self.disk_depths],
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
        if self.memory_bytes_per_s is not None:
            raw["memory"] = {"bytes_per_s": self.memory_bytes_per_s}
        if self.host_to_device_bytes_per_s is not None:
            raw["link"] = {"host_to_device_bytes_per_s": self.host_to_device_bytes_per_s}
        return tomli_w.dumps(raw)

    @classmethod
    def from_toml(cls, text: str, *, origin: str) -> ProbedMachine:
        """Read a description; raises MachineError that names `origin` and what is wrong with it."""
        try:
            raw = _Table(tomllib.loads(text))
            disk, processor, sources = raw.table("disk"), raw.table("processor"), raw.table("sources", {})
            memory, link = raw.table("memory", {}), raw.table("link", {})
            return cls(
                name=raw.text("name"),
                memory_bytes=raw.whole("memory_bytes"),
                read_bytes_per_s=disk.number("read_bytes_per_s"),
                read_chunk_bytes=disk.whole("chunk_bytes"),
                reader_threads=disk.whole("threads"),
                read_slowdown=disk.number("slowdown_while_computing", 1.0),
                handover_s=disk.number("handover_s", 0.0),
                disk_depths=tuple(
                    DiskDepth(depth.whole("chunk_bytes"), depth.whole("threads"), depth.number("bytes_per_s"))
                    for depth in (disk.tables("depths") if "depths" in disk.raw else ())
                ),
                memory_bytes_per_s=memory.number("bytes_per_s") if "bytes_per_s" in memory.raw else None,
                host_to_device_bytes_per_s=(
                    link.number("host_to_device_bytes_per_s") if "host_to_device_bytes_per_s" in link.raw else None
                ),
                compute=tuple(_curve(curve) for curve in processor.tables("curves")),
                block_overhead_s=processor.number("block_overhead_s"),
                pass_overhead_s=processor.number("pass_overhead_s"),
                compute_slowdown=processor.number("slowdown_while_reading", 1.0),
                sources={key: sources.text(key) for key in sources.raw},
            )
        except (MachineError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise MachineError(
                f"{origin} is not a machine description: {error}; `headrace probe` writes a complete one"
            ) from error

    @classmethod
    def load(cls, path: Path) -> ProbedMachine:
        """Read a TOML file."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MachineError(f"the machine file {path} cannot be read: {error}") from error
        return cls.from_toml(text, origin=str(path))


@dataclass(frozen=True)
class _Table:
    """A table of the file, read field by field; a missing or wrong one raises MachineError that names it."""

    raw: Mapping[str, object]
    path: str = ""

    def table(self, key: str, default: object = None) -> _Table:
        value = self.raw.get(key, default)
        if not isinstance(value, dict):
            raise self._wrong(key, "a table")
        return _Table(value, f"{self.path}{key}.")

    def tables(self, key: str) -> list[_Table]:
        value = self.raw.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._wrong(key, "an array of tables")
        return [_Table(item, f"{self.path}{key}[{number}].") for number, item in enumerate(value)]

    def text(self, key: str) -> str:
        value = self.raw.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def whole(self, key: str) -> int:
        value = self.raw.get(key)
        if type(value) is not int:
            raise self._wrong(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key, default)
        if not _is_number(value):
            raise self._wrong(key, "a number")
        return float(value)

    def array(self, key: str) -> list[object]:
        value = self.raw.get(key)
        if not isinstance(value, list):
            raise self._wrong(key, "an array")
        return value

    def _wrong(self, key: str, expected: str) -> MachineError:
        if key not in self.raw:
            return MachineError(f"the field {self.path}{key} is missing")
        return MachineError(f"{self.path}{key} is {self.raw[key]!r} where {expected} is expected")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _curve(table: _Table) -> ComputeCurve:
    tokens, seconds = table.array("tokens"), table.array("seconds_per_parameter")
    if len(tokens) != len(seconds):
        raise MachineError(f"{table.path}tokens has {len(tokens)} entries and seconds_per_parameter {len(seconds)}")
    points = []
    for count, time_s in zip(tokens, seconds, strict=True):
        if type(count) is not int:
            raise MachineError(f"{table.path}tokens holds {count!r} where a whole number is expected")
        if not _is_number(time_s):
            raise MachineError(f"{table.path}seconds_per_parameter holds {time_s!r} where a number is expected")
        points.append(CurvePoint(count, float(time_s)))
    names = {name: table.text(name) for name in ("compute_dtype", "stored_dtype")}
    try:
        return ComputeCurve(**names, points=tuple(points))
    except MachineError as error:
        raise MachineError(f"{table.path[:-1]} (tokens, seconds_per_parameter): {error}") from None
