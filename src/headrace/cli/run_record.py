"""What the local history keeps of a run."""

from __future__ import annotations

import datetime
import platform

from headrace import __version__
from headrace.accuracy.history import RunRecord
from headrace.cli.run_session import RunRequest, RunResult


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
        read_limited=request.options.read_limit is not None,
        binds=predicted.binds,
        predicted_prefill_s=predicted.prefill_s,
        measured_prefill_s=measured.prefill_s,
        predicted_decode_s=predicted.decode_s_per_pass,
        measured_decode_s=measured.decode_s_per_pass or 0.0,
        measured_read_bytes_per_s=measured.read_bytes_per_s or 0.0,
        streamed_blocks=plan.streamed_blocks,
        headrace_version=__version__,
    )
