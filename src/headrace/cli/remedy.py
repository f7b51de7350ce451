"""What would make a plan faster, found by planning again with one thing changed."""

from __future__ import annotations

from dataclasses import replace

from headrace.cli.accelerator_case import AcceleratorCase
from headrace.cli.accelerator_remedy import accelerator_remedies
from headrace.cli.further_memory import FurtherMemory
from headrace.cli.planning_case import PlanningCase
from headrace.cli.processor_case import ProcessorCase
from headrace.planning.estimate import predict
from headrace.planning.planner import Candidate
from headrace.units import format_seconds


def remedy(case: PlanningCase, best: Candidate) -> str:
    """Say what holds this plan back and what each remedy would bring."""
    if isinstance(case, AcceleratorCase):
        return " ".join(accelerator_remedies(case, best))
    assert isinstance(case, ProcessorCase)
    return " ".join(_processor_remedies(case, best))


def _processor_remedies(case: ProcessorCase, best: Candidate) -> list[str]:
    now_s = best.prediction.decode_s_per_pass
    if best.prediction.load_s_per_pass == 0:
        return [
            "The processor binds, and every weight is in memory: more memory or a faster disk would not help; more "
            "tokens per pass (a batch) would, as far as the arithmetic curve is flat."
        ]
    sentences = []
    if best.prediction.binds == "compute":
        sentences.append(
            "The processor binds: reading hides behind it, so a faster disk would hardly help; faster arithmetic would."
        )
    else:
        faster = replace(case.pace, read_bytes_per_s=2 * case.pace.read_bytes_per_s)
        halved_s = predict(case.request.model, best.plan, faster).decode_s_per_pass
        sentences.append(
            f"The disk binds: one of twice the speed would make a pass {format_seconds(halved_s)} instead of "
            f"{format_seconds(now_s)}."
        )
        even = best.prediction.break_even_tokens_per_pass
        if even >= best.plan.workload.sequences + 1:
            sentences.append(f"More tokens in a pass are free up to {even:.0f} (a batch, drafts).")
    further = FurtherMemory(
        name="memory",
        option="--memory",
        budget_bytes=case.request.budget_bytes,
        enough_bytes=case.bytes_for_all(),
        holds="everything",
        block_bytes=max(block.read_bytes for block in case.request.model.blocks),
        planned=case.with_budget,
    )
    return [*sentences, *filter(None, [further.describe(best)])]
