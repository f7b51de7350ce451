"""What runs learned: predicted beside measured, kept as one line per run; errors by stage; constants learned.

Pure values: the command line reads and writes the file (`headrace.accuracy.history_file`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headrace.machine.compute_curve import ComputeCurve
from headrace.machine.machine import Machine
from headrace.machine.quantity import Quantity
from headrace.units import format_rate

FEWEST_RUNS = 3
"""as many runs teach a constant; fewer may be chance"""
LATEST_RUNS = 50


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run: what it was, what was predicted, what was measured. Seconds, bytes, bytes per second."""

    at: str
    """UTC, ISO 8601"""
    machine: str
    model: str
    active_parameters: float
    """matrix elements that a token is multiplied with, over all blocks"""
    stored_dtype: str
    compute_dtype: str
    strategy: str
    budget_bytes: int
    sequences: int
    prompt_tokens: int
    generated_tokens: int
    read_limited: bool
    binds: str
    predicted_prefill_s: float
    measured_prefill_s: float
    predicted_decode_s: float
    measured_decode_s: float
    """0 where there was no pass after the first two"""
    measured_read_bytes_per_s: float
    streamed_blocks: int
    headrace_version: str = ""
    busy: bool = False
    """whether other work had the CPUs meanwhile: such a run teaches nothing"""

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), allow_nan=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> RunRecord | None:
        """Read a line; None for one that is torn, of another kind, or from a version with other fields."""
        try:
            raw: Any = json.loads(line)
            known = dataclasses.fields(cls)
            added = {field.name: field.default for field in known if field.default is not dataclasses.MISSING}
            fields = {field.name: (added | raw)[field.name] for field in known}
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        for field in dataclasses.fields(cls):
            value = fields[field.name]
            if field.type == "str" and not isinstance(value, str):
                return None
            if field.type == "bool" and not isinstance(value, bool):
                return None
            if field.type in {"int", "float"} and (
                isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0
            ):
                return None
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class StageAccuracy:
    """Errors of one stage over some runs: |predicted / measured - 1|."""

    stage: str
    configuration: str
    n: int
    median_abs_error: float
    p90_abs_error: float
    worst: float


def accuracy(records: Iterable[RunRecord]) -> list[StageAccuracy]:
    """Errors of first and further passes, over all runs and by strategy and dtype."""
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        for stage, predicted, measured in (
            ("prefill", record.predicted_prefill_s, record.measured_prefill_s),
            ("decode", record.predicted_decode_s, record.measured_decode_s),
        ):
            if measured > 0:
                error = abs(predicted / measured - 1.0)
                errors[stage, "all"].append(error)
                errors[stage, f"{record.strategy}, {record.compute_dtype}, waits for {record.binds}"].append(error)
    return [
        StageAccuracy(
            stage=stage,
            configuration=configuration,
            n=len(found),
            median_abs_error=statistics.median(found),
            p90_abs_error=sorted(found)[math.ceil(0.9 * len(found)) - 1],
            worst=max(found),
        )
        for (stage, configuration), found in sorted(errors.items(), key=lambda item: (item[0][0], -len(item[1])))
    ]


def learn(machine: Machine, records: Sequence[RunRecord]) -> tuple[Machine, list[str]]:
    """Replace a calibrated machine's constants by what runs on it showed, and say which.

    The read rate is the median over runs that waited for the disk without a limit; a curve of arithmetic is scaled by
    the median over runs that waited for the CPU. At least FEWEST_RUNS of the latest LATEST_RUNS must speak.
    """
    own = [record for record in records if record.machine == machine.name and not record.busy][-LATEST_RUNS:]
    sentences = []
    rates = [
        record.measured_read_bytes_per_s
        for record in own
        if record.binds == "disk" and not record.read_limited and record.measured_read_bytes_per_s > 0
    ]
    disk = machine.require_disk()
    if len(rates) >= FEWEST_RUNS:
        learned = statistics.median(rates)
        sentences.append(
            f"learned from {len(rates)} runs: the disk reads {format_rate(learned)} "
            f"(probed: {format_rate(disk.bytes_per_s.expected)})"
        )
        rate = Quantity.of(learned, sentences[-1], low=min(rates), high=max(rates))
        machine = replace(machine, disk=replace(disk, bytes_per_s=rate))
    cpu = machine.processor if machine.host is None else machine.host
    curves = tuple(_taught_curve(curve, own, sentences) for curve in cpu.arithmetic.curves)
    arithmetic = replace(cpu.arithmetic, curves=curves)
    if machine.host is None:
        return replace(machine, processor=replace(machine.processor, arithmetic=arithmetic)), sentences
    return replace(machine, host=replace(machine.host, arithmetic=arithmetic)), sentences


def _taught_curve(curve: ComputeCurve, records: Sequence[RunRecord], sentences: list[str]) -> ComputeCurve:
    factors = [
        record.measured_decode_s / (record.active_parameters * curve.seconds_per_parameter(record.sequences))
        for record in records
        if record.binds == "compute"
        and (record.compute_dtype, record.stored_dtype) == (curve.compute_dtype, curve.stored_dtype)
        and record.measured_decode_s > 0
        and record.active_parameters > 0
    ]
    if len(factors) < FEWEST_RUNS:
        return curve
    factor = statistics.median(factors)
    sentences.append(
        f"learned from {len(factors)} runs: {curve.compute_dtype} products with {curve.stored_dtype} weights take "
        f"{factor:.2f} times what was probed"
    )
    return curve.scaled(factor)
