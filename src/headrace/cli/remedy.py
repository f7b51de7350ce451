"""What would make a plan faster, found by planning again with one thing changed."""

from __future__ import annotations

from dataclasses import replace

from headrace.cli.planning_case import PlanningCase
from headrace.errors import BudgetError
from headrace.planning.estimate import predict
from headrace.planning.plan import Strategy
from headrace.planning.planner import Candidate, plan_strategy
from headrace.units import format_bytes, format_seconds

STEP_BYTES = 1 << 30


def remedy(case: PlanningCase, best: Candidate) -> str:
    """Say what holds this plan back and what each remedy would bring."""
    now_s = best.prediction.decode_s_per_pass
    if best.prediction.load_s_per_pass == 0:
        return (
            "The processor binds, and every weight is in memory: more memory or a faster disk would not help; more "
            "tokens per pass (a batch) would, as far as the arithmetic curve is flat."
        )
    sentences = []
    if best.prediction.binds == "compute":
        sentences.append(
            "The processor binds: reading hides behind it, so a faster disk would hardly help; faster arithmetic would."
        )
    else:
        faster = replace(case.pace, read_bytes_per_s=2 * case.pace.read_bytes_per_s)
        halved_s = predict(case.request.spec, best.plan, faster).decode_s_per_pass
        sentences.append(
            f"The disk binds: one of twice the speed would make a pass {format_seconds(halved_s)} instead of "
            f"{format_seconds(now_s)}."
        )
        even = best.prediction.break_even_tokens_per_pass
        if even >= best.plan.workload.sequences + 1:
            sentences.append(f"More tokens in a pass are free up to {even:.0f} (a batch, drafts).")
    sentences.append(_more_memory(case, best))
    return " ".join(sentence for sentence in sentences if sentence)


def _more_memory(case: PlanningCase, best: Candidate) -> str:
    budget = case.request.budget_bytes
    needed = _bytes_for_all(case)
    step = STEP_BYTES if needed is None else min(STEP_BYTES, needed - budget)
    if step <= 0:
        return ""
    now_s = best.prediction.decode_s_per_pass
    saved_s = now_s - case.with_budget(budget + step).prediction.decode_s_per_pass
    if saved_s < 0.01 * now_s:
        return "More memory would save nothing worth having."
    if needed is not None and step == needed - budget:
        return (
            f"{format_bytes(step)} more memory would hold everything: {format_seconds(now_s - saved_s)} per pass "
            f"(--memory {needed})."
        )
    return f"Each further GiB of memory saves about {format_seconds(saved_s)} per pass."


def _bytes_for_all(case: PlanningCase) -> int | None:
    """Return the smallest budget that holds all weights."""
    try:
        plan_strategy(replace(case.request, budget_bytes=1), Strategy.RESIDENT, case.pace)
    except BudgetError as error:
        return error.required_bytes
    return None
