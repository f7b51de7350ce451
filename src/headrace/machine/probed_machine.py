"""The machine as plans see it: how fast its disk reads, how fast it computes, how much it may hold. TOML on disk.

Every constant says where it comes from. This is the computer that `headrace probe` ran on: one processor that computes
what a disk brings, and the accelerators beside it. Whole machines with their devices and links are `machine.py`'s.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from headrace.errors import MachineError
from headrace.machine.compute_curve import ComputeCurve, CurvePoint, find_curve
from headrace.machine.probed_accelerator import ProbedAccelerator
from headrace.machine.toml_table import TomlTable

__all__ = ["ComputeCurve", "CurvePoint", "DiskDepth", "ProbedMachine"]


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
    read_latency_s: float = 0.0
    """from asking a reader that stood still for a block until its bytes come, and from the last byte to the asker"""
    disk_depths: tuple[DiskDepth, ...] = ()
    """what the disk gave with other chunks and threads"""
    memory_bytes_per_s: float | None = None
    """copied by all processors: bytes read plus bytes written"""
    host_to_device_bytes_per_s: float | None = None
    """over the link to an accelerator; None where there is none"""
    accelerators: tuple[ProbedAccelerator, ...] = ()
    """those that were measured; the first one is what plans compute on"""
    sources: Mapping[str, str] = field(default_factory=dict)
    """for each constant, where it comes from"""

    def __post_init__(self) -> None:
        for name, value, least, bound in (
            ("memory_bytes", self.memory_bytes, 1, math.inf),
            ("disk.read_bytes_per_s", self.read_bytes_per_s, 1, math.inf),
            ("disk.chunk_bytes", self.read_chunk_bytes, 4096, math.inf),
            ("disk.threads", self.reader_threads, 1, 1024),
            ("disk.slowdown_while_computing", self.read_slowdown, 1, 100),
            ("disk.read_latency_s", self.read_latency_s, 0, math.inf),
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
        devices = [accelerator.device for accelerator in self.accelerators]
        if len(set(devices)) < len(devices):
            raise MachineError(f"{self.name}: accelerators names a device twice: {', '.join(devices)}")

    def curve(self, *, compute_dtype: str, stored_dtype: str) -> ComputeCurve:
        """The curve for this pair of dtypes; raises MachineError when the machine was not measured with it."""
        return find_curve(self.compute, compute_dtype=compute_dtype, stored_dtype=stored_dtype, measured_on=self.name)

    def to_toml(self) -> str:
        """Return the description as TOML; `from_toml` is its inverse."""
        import tomli_w  # not needed to run a model

        raw: dict[str, Any] = {
            "name": self.name,
            "memory_bytes": self.memory_bytes,
            "disk": {
                "read_bytes_per_s": self.read_bytes_per_s,
                "chunk_bytes": self.read_chunk_bytes,
                "threads": self.reader_threads,
                "slowdown_while_computing": self.read_slowdown,
                "read_latency_s": self.read_latency_s,
                "depths": [depth._asdict() for depth in self.disk_depths],
            },
            "processor": {
                "block_overhead_s": self.block_overhead_s,
                "pass_overhead_s": self.pass_overhead_s,
                "slowdown_while_reading": self.compute_slowdown,
                "curves": [curve.to_raw() for curve in self.compute],
            },
            "sources": dict(self.sources),
        }
        if self.memory_bytes_per_s is not None:
            raw["memory"] = {"bytes_per_s": self.memory_bytes_per_s}
        if self.host_to_device_bytes_per_s is not None:
            raw["link"] = {"host_to_device_bytes_per_s": self.host_to_device_bytes_per_s}
        if self.accelerators:
            raw["accelerators"] = [accelerator.to_raw() for accelerator in self.accelerators]
        return tomli_w.dumps(raw)

    @classmethod
    def from_toml(cls, text: str, *, origin: str) -> ProbedMachine:
        """Read a description; raises MachineError that names `origin` and what is wrong with it."""
        try:
            raw = TomlTable(tomllib.loads(text))
            disk, processor = raw.table("disk"), raw.table("processor")
            memory, link = raw.table("memory", {}), raw.table("link", {})
            return cls(
                name=raw.text("name"),
                memory_bytes=raw.whole("memory_bytes"),
                read_bytes_per_s=disk.number("read_bytes_per_s"),
                read_chunk_bytes=disk.whole("chunk_bytes"),
                reader_threads=disk.whole("threads"),
                read_slowdown=disk.number("slowdown_while_computing", 1.0),
                read_latency_s=disk.number("read_latency_s", 0.0),
                disk_depths=tuple(
                    DiskDepth(depth.whole("chunk_bytes"), depth.whole("threads"), depth.number("bytes_per_s"))
                    for depth in (disk.tables("depths") if "depths" in disk.raw else ())
                ),
                memory_bytes_per_s=memory.number("bytes_per_s") if "bytes_per_s" in memory.raw else None,
                host_to_device_bytes_per_s=(
                    link.number("host_to_device_bytes_per_s") if "host_to_device_bytes_per_s" in link.raw else None
                ),
                compute=tuple(ComputeCurve.from_raw(curve) for curve in processor.tables("curves")),
                block_overhead_s=processor.number("block_overhead_s"),
                pass_overhead_s=processor.number("pass_overhead_s"),
                compute_slowdown=processor.number("slowdown_while_reading", 1.0),
                accelerators=tuple(
                    ProbedAccelerator.from_raw(table)
                    for table in (raw.tables("accelerators") if "accelerators" in raw.raw else ())
                ),
                sources=raw.texts("sources"),
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
