"""What a batch job says at its end: predicted next to measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace import __version__
from headrace.cli.run_report import machine_json, plan_json
from headrace.cli.table import Table
from headrace.units import format_bytes, format_count, format_number, format_seconds

if TYPE_CHECKING:
    from headrace.inference.batching.job_request import BatchJobRequest
    from headrace.inference.batching.start import BatchResult


def batch_json(request: BatchJobRequest, result: BatchResult) -> dict[str, Any]:
    """Build the object that `headrace batch --json` prints."""
    report: dict[str, Any] = {
        "input": str(request.input),
        "output": str(request.output),
        "requests": result.requests,
        "answered_before": result.answered_before,
        "refused": result.refused,
        "repaired_bytes": result.repaired_bytes,
        "headrace_version": __version__,
    }
    if result.handle is not None and result.packing is not None and result.forecast is not None:
        forecast = result.forecast
        report["plan"] = plan_json(result.handle)
        report["packing"] = {
            "sequences": result.packing.sequences,
            "pass_tokens": result.packing.pass_tokens,
            "kv_cache_positions": result.packing.positions,
        }
        report["predicted"] = {
            "total_s": forecast.total_s,
            "passes": forecast.passes,
            "tokens_per_pass": forecast.tokens_per_pass,
            "generated_tokens": forecast.generated_tokens,
            "generated_tokens_per_s": forecast.generated_per_s,
            "first_pass_s": forecast.first_pass_s,
        }
        report["machine"] = machine_json(result.handle)
        report["notes"] = list(result.notes)
    if result.tally is not None and result.handle is not None:
        tally = result.tally
        report["measured"] = {
            "load_s": result.load_s,
            "total_s": tally.seconds,
            "passes": tally.passes,
            "tokens_per_pass": tally.pass_tokens / tally.passes,
            "generated_tokens": tally.generated_tokens,
            "generated_tokens_per_s": tally.generated_tokens / tally.seconds,
            "full_pass_s": tally.full_pass_s,
            "prompt_tokens": tally.prompt_tokens,
            "shared_prompt_tokens": tally.shared_tokens,
            "answered": tally.requests,
            "errors": tally.errors,
            "bytes_read": result.handle.stream.counters.bytes_read,
            "stall_s": result.handle.stream.counters.stall_s,
            "peak_memory_bytes": result.peak_memory_bytes,
            "process_overhead_bytes": result.handle.overheads.process_bytes,
        }
    return report


def batch_table(result: BatchResult) -> Table:
    """Predicted and measured, side by side."""
    forecast, tally, handle = result.forecast, result.tally, result.handle
    assert forecast is not None
    assert tally is not None
    assert handle is not None
    beyond = result.peak_memory_bytes - handle.overheads.process_bytes
    rows = [
        ["time of the job", format_seconds(forecast.total_s), format_seconds(tally.seconds)],
        ["passes", format_count(forecast.passes), format_count(tally.passes)],
        ["tokens per pass", format_number(forecast.tokens_per_pass), format_number(tally.pass_tokens / tally.passes)],
        ["answer tokens", format_count(forecast.generated_tokens), format_count(tally.generated_tokens)],
        [
            "answer tokens per second",
            format_number(forecast.generated_per_s),
            format_number(tally.generated_tokens / tally.seconds),
        ],
        ["memory held", format_bytes(handle.plan.memory.total_bytes), format_bytes(beyond)],
    ]
    return Table(columns=("", "predicted", "measured"), rows=rows)


def batch_summary(request: BatchJobRequest, result: BatchResult) -> str:
    """One line at the end."""
    if result.tally is None:
        answered = result.requests - result.refused
        have = f"{answered} have an answer and {result.refused} an error" if result.refused else "all have an answer"
        return f"nothing was left to do: of {result.requests} requests {have} in {request.output}"
    tally = result.tally
    errors = result.refused + tally.errors
    return (
        f"{tally.requests} requests answered, {errors} with an error"
        + (f", {result.answered_before} answered before" if result.answered_before else "")
        + f"; {tally.prompt_tokens} prompt tokens, of which {tally.shared_tokens} were copied; "
        f"answers in {request.output}"
    )
