"""The local history of runs: where it lies, how a run is added, how it is read. It never makes a run fail."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from headrace import __version__
from headrace.accuracy.history import RunRecord

if TYPE_CHECKING:
    from headrace.cli.run_session import RunRequest, RunResult

VARIABLE = "HEADRACE_HISTORY"
_MOST_BYTES = 64 << 20


def history_path() -> Path | None:
    """Return the history's file; None where HEADRACE_HISTORY is set to nothing, which turns it off."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "headrace" / "history.jsonl"


def read_history() -> list[RunRecord]:
    """Return all runs that can be read, the oldest first; a file that is missing holds none."""
    path = history_path()
    if path is None:
        return []
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _MOST_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [record for line in lines if (record := RunRecord.from_line(line)) is not None]


def add_to_history(request: RunRequest, result: RunResult) -> str | None:
    """Append a run in one write; return a remark where that cannot be done."""
    path = history_path()
    if path is None:
        return None
    try:
        line = record_of(request, result).to_line().encode("utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)  # one write with O_APPEND: lines of two processes do not mix
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        return f"this run is not kept in the history: {error} ({VARIABLE}= turns it off)"
    return None


def _machine_name(device: str) -> str:
    """A GPU's runs teach nothing about the processor beside it."""
    name = platform.node() or "this machine"
    return name if device == "cpu" else f"{name} {device}"


def record_of(request: RunRequest, result: RunResult) -> RunRecord:
    """Write down what matters of a run."""
    handle, measured = result.handle, result.measured
    plan, model, predicted = handle.plan, handle.checkpoint.model, handle.prediction
    return RunRecord(
        at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=_machine_name(plan.device),
        model=model.name,
        active_parameters=float(sum(block.active_parameters for block in model.blocks)),
        stored_dtype=model.stored_dtype,
        compute_dtype=plan.compute_dtype,
        strategy=plan.strategy.value,
        budget_bytes=plan.budget_bytes,
        sequences=plan.workload.sequences,
        prompt_tokens=plan.workload.prompt_tokens,
        generated_tokens=sum(result.generated_tokens),
        read_limited=request.read_limit is not None,
        binds=predicted.binds,
        predicted_prefill_s=predicted.prefill_s,
        measured_prefill_s=measured.prefill_s,
        predicted_decode_s=predicted.decode_s_per_pass,
        measured_decode_s=measured.decode_s_per_pass or 0.0,
        measured_read_bytes_per_s=measured.read_bytes_per_s or 0.0,
        streamed_blocks=plan.streamed_blocks,
        headrace_version=__version__,
    )
