"""What a run says at its end: predicted next to measured, achieved next to possible; as one object or as a table."""

from __future__ import annotations

import datetime
import os
import platform
from typing import TYPE_CHECKING, Any

from headrace import __version__
from headrace.accuracy.history import RunRecord
from headrace.cli.run_session import DraftReport, RunRequest, RunResult
from headrace.cli.table import Table
from headrace.planning.plan import Placement
from headrace.units import format_bytes, format_number, format_rate, format_seconds

if TYPE_CHECKING:
    from headrace.inference.handle import Handle, Measured, Possible
    from headrace.planning.plan import Plan


def run_json(result: RunResult) -> dict[str, Any]:
    """Build the object that `headrace run --json` prints."""
    handle = result.handle
    report: dict[str, Any] = {
        "text": result.texts[0],
        "prompt_tokens": sum(result.prompt_tokens),
        "generated_tokens": sum(result.generated_tokens),
        "plan": plan_json(handle),
        "predicted": _predicted(handle),
        "measured": _measured(result.measured),
        "possible": _possible(handle),
        "machine": machine_json(handle),
        "notes": [*result.notes, *result.warnings],
        "headrace_version": __version__,
    }
    if result.drafted is not None:
        drafted = result.drafted
        report["drafts"] = {
            "kind": drafted.kind,
            **drafted.drafted._asdict(),
            "tokens_per_pass": drafted.drafted.tokens_per_pass,
            "acceptance": drafted.drafted.acceptance,
            "predicted_plain_tokens_per_s": drafted.plain_tokens_per_s,
            "predicted_tokens_per_s": drafted.predicted_tokens_per_s,
            "measured_tokens_per_s": drafted.measured_tokens_per_s,
        }
    if len(result.texts) > 1:
        report["texts"] = list(result.texts)
        report["prompt_tokens_each"] = list(result.prompt_tokens)
        report["generated_tokens_each"] = list(result.generated_tokens)
    return report


def plan_json(handle: Handle) -> dict[str, Any]:
    """The plan of a run."""
    plan, model = handle.plan, handle.checkpoint.model
    return {
        "strategy": plan.strategy.value,
        "num_blocks": plan.num_blocks,
        "resident_blocks": plan.resident_blocks,
        "streamed_blocks": plan.streamed_blocks,
        "slots": plan.slots,
        "memory_bytes": plan.memory.total_bytes,
        "budget_bytes": plan.budget_bytes,
        "streamed_bytes_per_pass": plan.streamed_bytes_per_pass,
        "weights_bytes": model.weights_bytes,
        "kv_cache_bytes": plan.memory.kv_cache_bytes,
        "compute_dtype": plan.compute_dtype,
        "embedding": plan.embedding.value,
        "device": plan.device,
        **({} if plan.uses_host_memory else _on_accelerator(plan)),
    }


def _on_accelerator(plan: Plan) -> dict[str, Any]:
    return {
        "places": [placement.value for placement in plan.placements],
        "host_stored_blocks": plan.placements.count(Placement.HOST),
        "disk_blocks": plan.placements.count(Placement.DISK),
        "cpu_blocks": plan.cpu_blocks,
        "host_memory_bytes": plan.host_memory.total_bytes,
        "host_budget_bytes": plan.host_budget_bytes,
        "cache_on_host": plan.cache_on_host,
    }


def _predicted(handle: Handle) -> dict[str, Any]:
    predicted = handle.prediction
    return {
        "prefill_s": predicted.prefill_s,
        "decode_s_per_pass": predicted.decode_s_per_pass,
        "tokens_per_s": predicted.tokens_per_s,
        "total_s": predicted.total_s,
        "load_s_per_pass": predicted.load_s_per_pass,
        "compute_s_per_pass": predicted.compute_s_per_pass,
        "binds": predicted.binds,
        "break_even_tokens_per_pass": predicted.break_even_tokens_per_pass,
    }


def _measured(measured: Measured) -> dict[str, Any]:
    beyond = measured.peak_memory_bytes - measured.process_overhead_bytes
    return {**measured._asdict(), "peak_beyond_overhead_bytes": beyond}


def _possible(handle: Handle) -> dict[str, float]:
    possible = handle.possible()._asdict()
    if handle.plan.uses_host_memory:
        del possible["copied_bytes_per_s"]
    return possible


def machine_json(handle: Handle) -> dict[str, Any]:
    """Where a run took place."""
    import torch

    return {
        "name": platform.node(),
        "architecture": platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "read_bytes_per_s": handle.scenario.known_rates.read_bytes_per_s,
    }


def run_table(result: RunResult) -> Table:
    """Predicted, measured and possible, side by side."""
    handle = result.handle
    predicted, measured, possible = handle.prediction, result.measured, handle.possible()
    rows = [
        ["first pass", format_seconds(predicted.prefill_s), format_seconds(measured.prefill_s), ""],
    ]
    if measured.decode_s_per_pass:
        possible_s = possible.decode_s_per_pass
        possible_tokens_per_s = measured.tokens_per_s * measured.decode_s_per_pass / possible_s
        rows += [
            [
                "each further pass",
                format_seconds(predicted.decode_s_per_pass),
                format_seconds(measured.decode_s_per_pass),
                format_seconds(possible_s),
            ],
            [
                "tokens per second",
                format_number(predicted.tokens_per_s),
                format_number(measured.tokens_per_s),
                format_number(possible_tokens_per_s),
            ],
        ]
    if handle.plan.streamed_blocks:
        rows.append(_travel_row(handle, measured, possible))
    beyond = measured.peak_memory_bytes - measured.process_overhead_bytes
    budget = handle.plan.budget_bytes
    rows.append(
        [
            "memory held",
            format_bytes(handle.plan.memory.total_bytes),
            format_bytes(beyond),
            f"{format_bytes(budget)} allowed",
        ]
    )
    if not handle.plan.uses_host_memory:
        rows.append(_host_memory_row(handle.plan, measured))
    return Table(columns=("", "predicted", "measured", "possible"), rows=rows)


def _travel_row(handle: Handle, measured: Measured, possible: Possible) -> list[str]:
    """How fast weights came: from the disk, or over the link to an accelerator."""
    expected = handle.plan.streamed_bytes_per_pass / handle.prediction.decode_s_per_pass
    if handle.plan.uses_host_memory:
        words, seen, limit = "read from the disk", measured.read_bytes_per_s, possible.read_bytes_per_s
    else:
        words, seen, limit = "copied to the device", measured.copied_bytes_per_s, possible.copied_bytes_per_s
    return [words, format_rate(expected), format_rate(seen), format_rate(limit)]


def _host_memory_row(plan: Plan, measured: Measured) -> list[str]:
    """What the host holds for an accelerator; the driver's own share, which grows while it runs, is in it."""
    held = measured.peak_host_memory_bytes - measured.host_overhead_bytes
    return [
        "memory held on the host",
        format_bytes(plan.host_memory.total_bytes),
        format_bytes(held),
        f"{format_bytes(plan.host_budget_bytes)} allowed",
    ]


WAITS = {"disk": "the disk", "compute": "the CPU", "both": "loading and computing, in turn", "link": "the link"}


def waits_for(binds: str, *, accelerator: bool) -> str:
    """Say in words what a pass waits for."""
    if accelerator:
        return {**WAITS, "compute": "the accelerator", "cpu": "the CPU's own blocks"}[binds]
    return {**WAITS, "both": "the disk and the CPU, in turn"}[binds]


def draft_summary(drafted: DraftReport) -> str:
    """One line about drafts."""
    seen = drafted.drafted
    return (
        f"drafts: {seen.tokens_per_pass:.2f} tokens per pass, {seen.accepted} of {seen.drafted} drafted tokens right; "
        f"{format_number(drafted.measured_tokens_per_s)} tokens/s, with so many right predicted "
        f"{format_number(drafted.predicted_tokens_per_s)}, without drafts {format_number(drafted.plain_tokens_per_s)}"
    )


def run_summary(result: RunResult) -> str:
    """One line below the table."""
    measured, handle = result.measured, result.handle
    on_device = not handle.plan.uses_host_memory
    waits = waits_for(handle.prediction.binds, accelerator=on_device)
    peak = (
        f"peak on {handle.plan.device} {format_bytes(measured.peak_memory_bytes)} (by its allocator's counter), of the "
        f"process on the host {format_bytes(measured.peak_host_memory_bytes)}"
        if on_device
        else f"peak of the whole process {format_bytes(measured.peak_memory_bytes)}, of which interpreter and "
        f"libraries {format_bytes(measured.process_overhead_bytes)} (from the operating system)"
    )
    return (
        f"{sum(result.generated_tokens)} tokens after {sum(result.prompt_tokens)}, {result.notes[-1]}; "
        f"a pass waits for {waits}; {format_bytes(measured.bytes_read)} read; {peak}"
    )


def _machine_name(device: str) -> str:
    """Runs on a GPU teach nothing about the CPU."""
    name = platform.node() or "this machine"
    return name if device == "cpu" else f"{name} {device}"


def record_of(request: RunRequest, result: RunResult) -> RunRecord:
    """What the local history keeps of a run."""
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
        busy=bool(result.warnings),
    )
