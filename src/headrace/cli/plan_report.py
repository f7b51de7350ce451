"""`headrace plan` for a checkpoint on a machine that was measured: the runtime's own planner, block by block."""

from __future__ import annotations

from typing import Any

from headrace import __version__
from headrace.cli.break_even import NO_BREAK_EVEN, break_even_of
from headrace.cli.output import Output, table, three_digits
from headrace.cli.planning_case import PlanningCase
from headrace.errors import BudgetError, HeadraceError
from headrace.model.stored_model import StoredModel
from headrace.planning.plan import EmbeddingPlacement, Placement, Plan, Strategy
from headrace.planning.prediction import DECODE_PASSES_SIMULATED, Candidate, prediction_interval
from headrace.planning.remedies import advice
from headrace.planning.scenario import Scenario
from headrace.planning.timeline import text_chart
from headrace.units import format_bytes, format_seconds

_HELD = ("fits", "blocks resident", "slots", "memory")
_HELD_ON_ACCELERATOR = ("where blocks live", "device + host")
"""columns between the strategy's name and its times"""

Compared = dict[Strategy, Candidate | BudgetError]


def recommended(compared: Compared) -> Candidate | None:
    """Return the fastest that fits, by the time of the whole workload."""
    fitting = [item for item in compared.values() if isinstance(item, Candidate)]
    return min(fitting, key=lambda item: item.prediction.total_s, default=None)


# -- JSON ---------------------------------------------------------------------------------------------------------


def plan_json(case: PlanningCase, compared: Compared, best: Candidate | None) -> dict[str, Any]:
    """Build the object that `headrace plan --json` prints."""
    model = case.scenario.model
    even = NO_BREAK_EVEN if best is None else break_even_of(case.scenario, best)
    return {
        "model": _model(model),
        "machine": {**case.machine, **_budgets(case.scenario)},
        "workload": case.scenario.workload.__dict__,
        "strategies": [_strategy(case.scenario, name, item) for name, item in compared.items()],
        "recommended": None if best is None else best.plan.strategy.value,
        "break_even": {
            "tokens_per_pass": even.tokens_per_pass,
            "kv_cache_bytes": even.kv_cache_bytes,
            "reachable_by": [way.name for way in even.ways],
            "how": [way.how for way in even.ways],
        },
        "advice": None if best is None else " ".join(advice(case.scenario, best)),
        "notes": list(case.notes),
        "headrace_version": __version__,
    }


def _budgets(scenario: Scenario) -> dict[str, int]:
    host = {} if scenario.on_cpu else {"host_budget_bytes": scenario.host_budget_bytes}
    return {"budget_bytes": scenario.budget_bytes, **host}


def _model(model: StoredModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "model_type": model.architecture.model_type,
        "parameters": model.parameters,
        "weights_bytes": model.weights_bytes,
        "stored_dtype": model.stored_dtype,
        "num_layers": model.num_layers,
        "num_blocks": len(model.blocks),
        "largest_block_bytes": max(block.size_bytes for block in model.blocks),
        "context_tokens": model.context_tokens,
    }


def _strategy(scenario: Scenario, name: str, item: Candidate | HeadraceError) -> dict[str, Any]:
    model = scenario.model
    no_price: dict[str, Any] = {"usd_per_750_words": None, "usd_per_million_tokens": None}
    if not isinstance(item, Candidate):
        unknown: dict[str, Any] = {
            **no_price,
            "low": {"prefill_s": None, "decode_s_per_pass": None},
            "high": {"prefill_s": None, "decode_s_per_pass": None},
        }
        times = dict.fromkeys(("prefill_s", "decode_s_per_pass", "tokens_per_s", "memory_bytes", "binds"))
        needed = getattr(item, "required_bytes", None)
        return {"name": name, "fits": False, **times, **unknown, "why_not": str(item), "required_bytes": needed}
    chosen, predicted = item
    ends = prediction_interval(item, scenario)
    return {
        "name": name,
        "fits": True,
        "prefill_s": predicted.prefill_s,
        "decode_s_per_pass": predicted.decode_s_per_pass,
        "tokens_per_s": predicted.tokens_per_s,
        "memory_bytes": _memory_by_tier(model, chosen),
        "binds": predicted.binds,
        **no_price,
        "low": {field: interval.low for field, interval in ends._asdict().items()},
        "high": {field: interval.high for field, interval in ends._asdict().items()},
        "why_not": None,
        "total_s": predicted.total_s,
        "load_s_per_pass": predicted.load_s_per_pass,
        "compute_s_per_pass": predicted.compute_s_per_pass,
        "possible_decode_s": predicted.possible_decode_s,
        "break_even_tokens_per_pass": predicted.break_even_tokens_per_pass,
        "resident_blocks": chosen.resident_blocks,
        "streamed_blocks": chosen.streamed_blocks,
        "slots": chosen.slots,
        "streamed_bytes_per_pass": chosen.streamed_bytes_per_pass,
        "kv_cache_bytes": chosen.memory.kv_cache_bytes,
        "compute_dtype": chosen.compute_dtype,
        **_on_accelerator(chosen),
    }


def _on_accelerator(plan: Plan) -> dict[str, Any]:
    """What a plan says of the link's two sides, by the names that a run's report has for it."""
    if plan.uses_host_memory:
        return {}
    return {
        "device": plan.device,
        "host_stored_blocks": plan.placements.count(Placement.HOST),
        "disk_blocks": plan.placements.count(Placement.DISK),
        "cpu_blocks": plan.cpu_blocks,
        "embedding": plan.embedding.value,
        "cache_on_host": plan.cache_on_host,
    }


def _memory_by_tier(model: StoredModel, plan: Plan) -> dict[str, int]:
    """Bytes held in each memory, and bytes of weights that stay on the disk: blocks, and a table read row by row."""
    table_bytes = 0 if model.tied or plan.embedding is not EmbeddingPlacement.ROWS else model.table_bytes
    blocks = zip(model.blocks, plan.placements, strict=True)
    disk = table_bytes + sum(block.size_bytes for block, place in blocks if place is Placement.DISK)
    return {**plan.bytes_by_tier, "disk": disk}


# -- for people ---------------------------------------------------------------------------------------------------


def show_plan(output: Output, case: PlanningCase, compared: Compared, best: Candidate | None) -> None:
    """Print the comparison for people."""
    model, work = case.scenario.model, case.scenario.workload
    output.text(
        f"{model.name}: {model.parameters / 1e9:.3g} billion parameters, {format_bytes(model.weights_bytes)} of "
        f"weights in {len(model.blocks)} blocks; {work.sequences} x ({work.prompt_tokens} + {work.generate_tokens}) "
        f"tokens, computed in {case.scenario.compute_dtype}\n"
        f"{case.machine['name']}: {case.describe_machine()}\n\n"
    )
    on_accelerator = not case.scenario.on_cpu
    held = _HELD_ON_ACCELERATOR if on_accelerator else _HELD
    columns = ("strategy", *held, "first pass", "per pass (low - high)", "tokens/s", "waits for")
    output.show(table(columns, [_row(case, name, item, best) for name, item in compared.items()]))
    for name, item in compared.items():
        if isinstance(item, HeadraceError):
            output.text(f"{name}: {item}\n")
    if best is not None:
        output.text(f"{break_even_of(case.scenario, best).describe()}\n{' '.join(advice(case.scenario, best))}\n\n")
        chart = text_chart(best.prediction.timeline, pass_index=(DECODE_PASSES_SIMULATED + 1) // 2)
        output.text(f"one pass of {best.plan.strategy.value}, as predicted:\n{chart}\n")
    for note in case.notes:
        output.text(f"note: {note}\n")


def _row(case: PlanningCase, name: str, item: Candidate | HeadraceError, best: Candidate | None) -> list[str]:
    on_accelerator = not case.scenario.on_cpu
    if not isinstance(item, Candidate):
        return [name, "does not fit", *[""] * 5] if on_accelerator else [name, "no", *[""] * 7]
    plan, predicted = item
    span = prediction_interval(item, case.scenario).decode_s_per_pass
    memory = format_bytes(plan.memory.total_bytes)
    if plan.uses_host_memory:
        held = ["yes", f"{plan.resident_blocks} of {plan.num_blocks}", str(plan.slots), memory]
    else:
        held = [where_blocks_live(plan), f"{memory} + {format_bytes(plan.host_memory.total_bytes)}"]
    return [
        f"{name} *" if item is best else name,
        *held,
        format_seconds(predicted.prefill_s),
        f"{format_seconds(span.expected)} ({format_seconds(span.low)} - {format_seconds(span.high)})",
        three_digits(predicted.tokens_per_s),
        _waits_for(predicted.binds, on_accelerator=on_accelerator),
    ]


def where_blocks_live(plan: Plan) -> str:
    """Count an accelerator's blocks by place; those that the CPU computes are the cpu's."""
    words = {Placement.DEVICE: "device", Placement.HOST: "host", Placement.DISK: "disk", Placement.CPU: "cpu"}
    counts = {place: plan.placements.count(place) for place in words}
    return ", ".join(f"{counts[place]} {word}" for place, word in words.items() if counts[place])


def _waits_for(binds: str, *, on_accelerator: bool) -> str:
    if binds == "compute" and on_accelerator:
        return "accelerator"
    return "both in turn" if binds == "both" else binds
