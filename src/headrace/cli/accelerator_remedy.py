"""What would make a plan on an accelerator faster: its parts, more memory on either side, the processor's help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from headrace.cli.accelerator_case import AcceleratorCase
from headrace.cli.further_memory import FurtherMemory
from headrace.planning.accelerator_memory import Arrangement
from headrace.planning.accelerator_pace import AcceleratorPace
from headrace.planning.estimate import LayerTimes
from headrace.planning.plan import Placement
from headrace.planning.planner import Candidate
from headrace.units import format_bytes, format_seconds

_WORTH = 0.99
"""a change that leaves more than this share of the time is not worth a sentence"""


def accelerator_remedies(case: AcceleratorCase, best: Candidate) -> list[str]:
    """Sentences: what binds and what twice its speed would bring, more tokens per pass, more memory, the processor."""
    return list(filter(None, _sentences(case, best)))


def _sentences(case: AcceleratorCase, best: Candidate) -> Iterator[str]:
    plan, predicted = best
    if predicted.load_s_per_pass == 0 and not plan.cpu_blocks:
        yield (
            "The accelerator binds, and every weight is in its memory: more memory or a faster link would not help; "
            "more tokens per pass (a batch) would, as far as the arithmetic curve is flat."
        )
        return
    yield _what_binds(case, best)
    even = predicted.break_even_tokens_per_pass
    if predicted.binds not in {"compute", "cpu"} and even >= plan.workload.sequences + 1:
        yield f"More tokens in a pass are free up to {even:.0f} (a batch, drafts)."
    yield _device_memory(case).describe(best)
    if Placement.DISK in plan.places:
        yield _host_memory(case, best).describe(best)
    if predicted.binds == "link" and not case.request.allow_cpu and case.pace.processor_layer is not None:
        yield _help_of_processor(case, best)


def _what_binds(case: AcceleratorCase, best: Candidate) -> str:
    plan, now, binds = best.plan, format_seconds(best.prediction.decode_s_per_pass), best.prediction.binds
    if binds == "compute":
        return (
            "The accelerator binds: what travels hides behind its arithmetic, so a faster link or disk would hardly "
            "help; faster arithmetic would."
        )
    if binds == "disk":
        faster = _pass_at(case, best, _faster_disk(case.pace))
        return f"The disk binds: one of twice the speed would make a pass {faster} instead of {now}."
    if binds == "cpu":
        faster = _pass_at(case, best, _faster_processor(case.pace))
        return (
            f"The processor binds, with the {plan.cpu_blocks} layers that it computes: one of twice the speed "
            f"would make a pass {faster} instead of {now}."
        )
    faster = _pass_at(case, best, _faster_link(case.pace))
    if binds == "link":
        return f"The link to {plan.device} binds: one of twice the speed would make a pass {faster} instead of {now}."
    from_disk = ""
    if Placement.DISK in plan.places:
        from_disk = f", a disk of twice the speed {_pass_at(case, best, _faster_disk(case.pace))}"
    return (
        f"Loading and computing take turns: a link of twice the speed would make a pass {faster} instead of "
        f"{now}{from_disk}."
    )


def _pass_at(case: AcceleratorCase, best: Candidate, pace: AcceleratorPace) -> str:
    """A pass at another pace, planned again within the same strategy: what another part did may now be too slow."""
    changed = replace(case, pace=pace)
    return format_seconds(
        min(
            changed.predict_at(pace, best.plan).decode_s_per_pass,
            changed.plan(best.plan.strategy).prediction.decode_s_per_pass,
        )
    )


def _faster_link(pace: AcceleratorPace) -> AcceleratorPace:
    return replace(
        pace,
        link_bytes_per_s=2 * pace.link_bytes_per_s,
        staged_bytes_per_s=min(2 * pace.staged_bytes_per_s, pace.memory_copy_bytes_per_s),
    )


def _faster_disk(pace: AcceleratorPace) -> AcceleratorPace:
    return replace(pace, device=replace(pace.device, read_bytes_per_s=2 * pace.device.read_bytes_per_s))


def _faster_processor(pace: AcceleratorPace) -> AcceleratorPace:
    layer = pace.processor_layer
    assert layer is not None
    return replace(pace, processor_layer=LayerTimes(prefill_s=layer.prefill_s / 2, decode_s=layer.decode_s / 2))


def _device_memory(case: AcceleratorCase) -> FurtherMemory:
    request = case.request
    return FurtherMemory(
        name="device memory",
        option="--memory",
        budget_bytes=request.budget_bytes,
        enough_bytes=case.bytes_for_all(),
        holds="everything",
        block_bytes=max(request.blocks.device),
        planned=case.with_budget,
    )


def _host_memory(case: AcceleratorCase, best: Candidate) -> FurtherMemory:
    request, beside = case.request, best.plan.accelerator
    assert beside is not None
    on_disk = [size for size, place in zip(request.blocks.host, beside.places, strict=True) if place is Placement.DISK]
    return FurtherMemory(
        name="host memory",
        option="--host-memory",
        budget_bytes=request.host_budget_bytes,
        enough_bytes=beside.host.total_bytes + sum(on_disk),
        holds="what comes from the disk",
        block_bytes=max(on_disk),
        planned=case.with_host_budget,
    )


def _help_of_processor(case: AcceleratorCase, best: Candidate) -> str:
    request, now_s = case.request, best.prediction.decode_s_per_pass
    one_layer = Arrangement((Placement.CPU, *[Placement.DISK] * (len(request.blocks.host) - 1)), 0)
    least_bytes = request.host_memory(one_layer).total_bytes
    if least_bytes > request.host_budget_bytes:
        return (
            f"For --cpu-blocks the host's budget is too small: with one layer it would hold "
            f"{format_bytes(least_bytes)} (--host-memory)."
        )
    plan, predicted = case.with_processor()
    if not plan.cpu_blocks or predicted.decode_s_per_pass > _WORTH * now_s:
        return "The processor would be no help: it is too slow for layers of this model (--cpu-blocks)."
    return (
        f"With --cpu-blocks the processor would compute {plan.cpu_blocks} layers where they lie: "
        f"{format_seconds(predicted.decode_s_per_pass)} per pass, as predicted; results may then differ in rounding."
    )
