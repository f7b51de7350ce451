"""What calibration measured, remembered, so that the next start of the same model on this machine need not measure.

It lies in the user's cache directory, a small file for each `circumstances`: all that speeds depend on but the lengths
of prompts and answers. A measurement serves work of its own lengths exactly, and work of half to twice those with its
prefill scaled along the measured curve. One that other work disturbed serves a short while only. Nothing here makes a
run fail: what cannot be read, or is not of this form, is measured again and written anew; a file appears whole or not
at all, so that of two processes the later one's stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn import functional

from headrace import __version__
from headrace.errors import HeadraceError
from headrace.inference.calibration import (
    QUICK_CURVE_TOKENS,
    Calibration,
    asked_scenario,
    calibrate,
    largest_shape,
)
from headrace.inference.loading import Loading
from headrace.inference.plain_values import from_plain, to_plain
from headrace.machine.machine_file import machine_to_toml
from headrace.paths import chosen_path
from headrace.planning.infeasible import minimum_bytes
from headrace.planning.rates import Rates
from headrace.planning.scenario import Scenario
from headrace.planning.scenarios import compute_dtypes
from headrace.planning.workload import JobMemory, Workload
from headrace.streaming.device_budget import note_what_there_is_not
from headrace.streaming.devices import maker_name
from headrace.streaming.torch_dtypes import TORCH_DTYPES
from headrace.units import format_age

VARIABLE = "HEADRACE_MEASURED"
"""Environment variable: the directory in place of the user's cache; set to nothing, nothing is remembered."""

KEPT_S = 30 * 86400.0
KEPT_BUSY_S = 900.0
"""what was measured beside other work is worth measuring again soon"""
ALIKE = 2.0
"""work whose prompts and answers are no more than so many times as long, or as short, is served as well"""
MOST_KEPT = 32
FEW_ROWS = 64
_LIBRARIES = ("torch", "transformers")
_THREADING = ("OMP_", "KMP_", "MKL_", "GOMP_", "DNNL_", "ONEDNN_", "ATEN_")
"""beginnings of the variables that say how products use the CPU"""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was found of one workload: what a `Scenario` holds beyond the question, and sentences."""

    at_s: float
    """seconds since 1970"""
    workload: Workload
    compute_dtype: str
    copies_weights: bool
    pinned: bool
    chunk_bytes: int
    ring_chunks: int
    rates: Rates
    busy: float
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    """of other work, when it was measured"""

    @classmethod
    def of(cls, calibration: Calibration, warnings: tuple[str, ...]) -> Measurement:
        """What was measured just now."""
        scenario = calibration.scenario
        return cls(
            at_s=time.time(),
            workload=scenario.workload,
            compute_dtype=scenario.compute_dtype,
            copies_weights=scenario.copies_weights,
            pinned=scenario.pinned,
            chunk_bytes=scenario.chunk_bytes,
            ring_chunks=scenario.ring_chunks,
            rates=scenario.known_rates,
            busy=scenario.busy,
            notes=calibration.notes[len(calibration.warnings) :],
            warnings=warnings,
        )

    @property
    def age_s(self) -> float:
        """Seconds since it was measured."""
        return time.time() - self.at_s

    @property
    def is_current(self) -> bool:
        """Whether it is young enough; one from the future comes from another clock."""
        return 0 <= self.age_s < (KEPT_BUSY_S if self.busy else KEPT_S)

    def unlike(self, work: Workload) -> float:
        """By which factor its prompts or answers are longer or shorter than those of `work`; 1 for the same."""
        own = self.workload
        pairs = ((own.prompt_tokens, work.prompt_tokens), (own.generate_tokens, work.generate_tokens))
        return max(max(pair) / min(pair) for pair in pairs)

    def answer(self, asked: Scenario) -> Scenario:
        """The question with what was measured."""
        curve, own, work = self.rates.known_curve, self.workload, asked.workload
        factor = curve.seconds_per_parameter(work.sequences * work.prompt_tokens) / curve.seconds_per_parameter(
            own.sequences * own.prompt_tokens
        )
        return replace(
            asked,
            compute_dtype=self.compute_dtype,
            copies_weights=self.copies_weights,
            pinned=self.pinned,
            chunk_bytes=self.chunk_bytes,
            ring_chunks=self.ring_chunks,
            rates=self.rates.with_prefill(factor),
            busy=self.busy,
        )


def calibrated(loading: Loading, *, pass_tokens: Sequence[int] = (), packed: JobMemory | None = None) -> Calibration:
    """What `calibrate` finds, from an earlier start where it serves; `LoadOptions.fresh` measures again.

    Raises BudgetError before anything is measured where nothing could fit.
    """
    directory = measured_directory()
    if directory is None:
        return calibrate(loading, pass_tokens=pass_tokens, packed=packed)
    known = _Known(directory, circumstances(loading, pass_tokens=pass_tokens, packed=packed))
    here = note_what_there_is_not(loading.device, loading.options.budget_bytes)
    if not loading.options.asked.fresh:
        found = _found(known, asked_scenario(loading, packed), loading)
        if found is not None:
            measurement, scenario = found
            _multiply_once(loading, scenario)
            warnings = (*here, *measurement.warnings)
            age = f"speeds were measured {format_age(measurement.age_s)} (--fresh measures again)"
            return Calibration(scenario, (*warnings, age, *measurement.notes), warnings, measurement.age_s)
    calibration = calibrate(loading, pass_tokens=pass_tokens, packed=packed)
    if not _holds_in_general(calibration.scenario, loading):
        return calibration
    remark = known.add(Measurement.of(calibration, calibration.warnings[len(here) :]))
    return calibration if remark is None else calibration._replace(notes=(*calibration.notes, remark))


def measured_directory() -> Path | None:
    """Where measurements lie; None where nothing is to be remembered, or there is no home."""
    return chosen_path(VARIABLE, "XDG_CACHE_HOME", "~/.cache", "measured")


def circumstances(
    loading: Loading, *, pass_tokens: Sequence[int] = (), packed: JobMemory | None = None
) -> dict[str, Any]:
    """All that measured speeds depend on, in plain values: versions, machine, checkpoint, options."""
    checkpoint, options, reader, device = loading.checkpoint, loading.options, loading.reader, loading.device
    machine, memory = options.asked.machine, device.memory()
    config = (checkpoint.directory / "config.json").read_bytes()
    return {
        "versions": {
            "headrace": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
        "machine": {
            **_cpu(),
            "cpus": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "threading": {name: text for name, text in sorted(os.environ.items()) if name.startswith(_THREADING)},
            "memory_bytes": psutil.virtual_memory().total,
            "device": device.name,
            "device_name": maker_name(device),
            "device_bytes": None if memory is None else memory.total_bytes,
        },
        "checkpoint": {
            "directory": str(checkpoint.directory.resolve()),
            "config": hashlib.sha256(config).hexdigest(),
            "files": [[str(file.path), *file[1:]] for file in checkpoint.index.files],
        },
        "options": {
            "sequences": options.workload.sequences,
            "dtype": options.dtype,
            "attention": options.asked.attention,
            "reader": [reader.chunk_bytes, reader.reader_threads, reader.read_limit_bytes_per_s],
            "machine": None if machine is None else hashlib.sha256(machine_to_toml(machine).encode()).hexdigest(),
            "cpu_blocks": options.asked.cpu_blocks,
            "cache_on_host": options.asked.cache_on_host,
            "pass_tokens": sorted(pass_tokens),
            "packed": packed is not None,
        },
    }


def _cpu() -> dict[str, str]:
    """What this CPU is and can do, as Linux says of the first one; and the kernel that runs it."""
    found = {"kernel": platform.release()}
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        name, flags = (re.search(rf"^{field}\s*: (.*)$", text, re.MULTILINE) for field in ("model name", "flags"))
        found["cpu"] = "" if name is None else name[1]
        found["flags"] = "" if flags is None else hashlib.sha256(flags[1].encode()).hexdigest()
    return found


class _Known:
    """The file of one set of circumstances."""

    def __init__(self, directory: Path, about: dict[str, Any]) -> None:
        self._about = about
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self._path = directory / f"{digest[:32]}.json"

    def measurements(self) -> list[Measurement]:
        """Those that are current; none where the file is missing, damaged or of another form."""
        try:
            raw = json.loads(self._path.read_bytes())
            if raw["circumstances"] != self._about:
                return []
            found = [from_plain(Measurement, plain) for plain in raw["measurements"]]
        except (OSError, ValueError, TypeError, KeyError, RecursionError, HeadraceError):
            return []
        return [own for own in found if own.is_current]

    def add(self, measurement: Measurement) -> str | None:
        """Keep this one in place of what was measured for the same work; return a remark where that cannot be done."""
        others = [own for own in self.measurements() if own.workload != measurement.workload]
        kept = sorted([*others, measurement], key=lambda own: own.at_s)[-MOST_KEPT:]
        text = json.dumps({"circumstances": self._about, "measurements": [to_plain(own) for own in kept]}, indent=1)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, written = tempfile.mkstemp(dir=self._path.parent, prefix=".", suffix=".json")
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    file.write(text)
                Path(written).replace(self._path)
            except BaseException:
                Path(written).unlink()
                raise
        except OSError as error:
            return f"what was measured is not kept for the next start: {error} ({VARIABLE}= keeps nothing)"
        return None


def _found(known: _Known, asked: Scenario, loading: Loading) -> tuple[Measurement, Scenario] | None:
    """What serves this work best of what is known; None where it would not fit in what was measured."""
    work = asked.workload
    serving = [own for own in known.measurements() if own.unlike(work) <= ALIKE]
    if not serving:
        return None
    measurement = min(serving, key=lambda own: (own.unlike(work), -own.at_s))
    scenario = measurement.answer(asked)
    fits = minimum_bytes(scenario, loading.options.strategy) <= scenario.budget_bytes
    return (measurement, scenario) if fits else None


def _multiply_once(loading: Loading, scenario: Scenario) -> None:
    """Let the library take what it keeps from its first product on, as measuring does, before memory is counted.

    The CPU's matrix is of zeros, which take no memory before they are written; another device's is small.
    """
    rows, columns = largest_shape(loading.checkpoint.model)
    device, work = loading.device, scenario.workload
    if not device.uses_host_memory:
        rows = min(rows, FEW_ROWS)
    with torch.inference_mode():
        weight = torch.zeros(rows, columns, dtype=TORCH_DTYPES[scenario.compute_dtype], device=device.torch_device)
        tokens = min(QUICK_CURVE_TOKENS[-1], work.sequences * work.prompt_tokens)
        functional.linear(weight.new_zeros(tokens, columns), weight)
    device.synchronize()


def _holds_in_general(scenario: Scenario, loading: Loading) -> bool:
    """Whether a small budget did not decide what was measured, so that it holds for any."""
    if scenario.allow_cpu and scenario.known_rates.cpu_layer is None:
        return False
    names = compute_dtypes(scenario.model, loading.options.dtype) if scenario.on_cpu else ()
    others = (replace(scenario, compute_dtype=name) for name in names)
    return all(minimum_bytes(other, loading.options.strategy) <= scenario.budget_bytes for other in others)
