"""`headrace plan`: predict every strategy, recommend one, say what binds and what would help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headrace import __version__
from headrace.cli.break_even import NO_BREAK_EVEN, break_even_of
from headrace.cli.command import Command
from headrace.cli.dependencies import require_run_libraries
from headrace.cli.options import (
    DtypeChoice,
    DtypeOption,
    JsonOption,
    MemoryOption,
    ModelArgument,
    ReadLimitOption,
    StrategyChoice,
    StrategyOption,
    existing_file,
)
from headrace.cli.output import Output, table, three_digits
from headrace.cli.planning_case import Asked, PlanningCase, from_description, measured_here
from headrace.cli.remedy import remedy
from headrace.errors import HeadraceError
from headrace.inference.model_source import resolve_model
from headrace.planning.estimate import DECODE_PASSES_SIMULATED
from headrace.planning.model_spec import ModelSpec
from headrace.planning.plan import EmbeddingPlacement, Strategy, Workload
from headrace.planning.planner import Candidate
from headrace.planning.probed_machine import ProbedMachine
from headrace.planning.timeline import text_chart
from headrace.units import format_bytes, format_rate, format_seconds

EXAMPLES = (
    "headrace plan ./my-model --memory 4GiB",
    "headrace plan ./my-model --memory 4GiB --batch 8 --prompt-tokens 500 --generate-tokens 200",
    "headrace plan ./my-model --machine machine.toml --json",
)

Compared = dict[str, Candidate | HeadraceError]


def plan(
    model: ModelArgument,
    *,
    machine: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Plan for the machine of this file (from headrace probe). Without it: measure this one now.",
        ),
    ] = None,
    memory: MemoryOption = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences at once.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each prompt.")] = 16,
    generate_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="New tokens of each sequence.")] = 32,
    strategy: StrategyOption = StrategyChoice.AUTO,
    dtype: DtypeOption = DtypeChoice.AUTO,
    read_limit: ReadLimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict every way to run a model, before running it.

    Names the fastest way that fits, what it waits for, the tokens per pass below which more tokens are free, and what
    would help.
    """
    asked = Asked(
        memory=memory,
        workload=Workload(sequences=batch, prompt_tokens=prompt_tokens, generate_tokens=generate_tokens),
        strategy=None if strategy is StrategyChoice.AUTO else Strategy(strategy.value),
        dtype=None if dtype is DtypeChoice.AUTO else dtype.value,
        read_limit=read_limit,
    )
    machine_file = existing_file(machine, option="--machine")
    described = None if machine_file is None else ProbedMachine.load(machine_file)
    output = Output(as_json=as_json)
    with output.reserved():
        if described is not None:
            case = from_description(resolve_model(model), asked, described, origin=str(machine_file))
        else:
            require_run_libraries("measuring this machine (without --machine FILE)")
            directory = resolve_model(model)
            with output.to_stderr.status("measuring the disk and one layer ..."):
                case = measured_here(directory, asked)
        compared = case.compare(asked.strategy)
        best = recommended(compared)
        if as_json:
            output.json(plan_json(case, compared, best))
        else:
            _show(output, case, compared, best)


def recommended(compared: Compared) -> Candidate | None:
    """Return the fastest that fits, by the time of the whole workload."""
    fitting = [item for item in compared.values() if isinstance(item, Candidate)]
    return min(fitting, key=lambda item: item.prediction.total_s, default=None)


# -- JSON ---------------------------------------------------------------------------------------------------------


def plan_json(case: PlanningCase, compared: Compared, best: Candidate | None) -> dict[str, Any]:
    """Build the object that `headrace plan --json` prints."""
    spec = case.request.spec
    even = NO_BREAK_EVEN if best is None else break_even_of(case, best)
    return {
        "model": _model(spec),
        "machine": {**case.machine, "budget_bytes": case.request.budget_bytes},
        "workload": case.request.workload.__dict__,
        "strategies": [_strategy(spec, name, item) for name, item in compared.items()],
        "recommended": None if best is None else best.plan.strategy.value,
        "break_even": {
            "tokens_per_pass": even.tokens_per_pass,
            "kv_cache_bytes": even.kv_cache_bytes,
            "reachable_by": [way.name for way in even.ways],
            "how": [way.how for way in even.ways],
        },
        "advice": None if best is None else remedy(case, best),
        "notes": list(case.notes),
        "headrace_version": __version__,
    }


def _model(spec: ModelSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "model_type": spec.config.architecture.model_type,
        "parameters": spec.parameters,
        "weights_bytes": spec.weights_bytes,
        "stored_dtype": spec.stored_dtype,
        "num_layers": spec.config.num_layers,
        "num_blocks": len(spec.blocks),
        "largest_block_bytes": max(block.size_bytes for block in spec.blocks),
        "context_tokens": spec.config.context_tokens,
    }


def _strategy(spec: ModelSpec, name: str, item: Candidate | HeadraceError) -> dict[str, Any]:
    unknown: dict[str, Any] = {
        "usd_per_750_words": None,
        "usd_per_million_tokens": None,
        "low": {"prefill_s": None, "decode_s_per_pass": None},
        "high": {"prefill_s": None, "decode_s_per_pass": None},
    }
    if not isinstance(item, Candidate):
        times = dict.fromkeys(("prefill_s", "decode_s_per_pass", "tokens_per_s", "memory_bytes", "binds"))
        needed = getattr(item, "required_bytes", None)
        return {"name": name, "fits": False, **times, **unknown, "why_not": str(item), "required_bytes": needed}
    chosen, predicted = item
    return {
        "name": name,
        "fits": True,
        "prefill_s": predicted.prefill_s,
        "decode_s_per_pass": predicted.decode_s_per_pass,
        "tokens_per_s": predicted.tokens_per_s,
        "memory_bytes": {"host": chosen.memory.total_bytes, "disk": _bytes_on_disk(spec, item)},
        "binds": predicted.binds,
        **unknown,
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
    }


def _bytes_on_disk(spec: ModelSpec, item: Candidate) -> int:
    """Bytes of weights that stay on the disk while the model runs: streamed blocks, and a table read row by row."""
    table_bytes = 0 if spec.tied or item.plan.embedding is not EmbeddingPlacement.ROWS else spec.embedding.size_bytes
    blocks = zip(spec.blocks, item.plan.resident, strict=True)
    return table_bytes + sum(block.size_bytes for block, stays in blocks if not stays)


# -- for people ---------------------------------------------------------------------------------------------------


def _show(output: Output, case: PlanningCase, compared: Compared, best: Candidate | None) -> None:
    spec, work = case.request.spec, case.request.workload
    output.text(
        f"{spec.name}: {spec.parameters / 1e9:.3g} billion parameters, {format_bytes(spec.weights_bytes)} of weights "
        f"in {len(spec.blocks)} blocks; {work.sequences} x ({work.prompt_tokens} + {work.generate_tokens}) tokens, "
        f"computed in {case.request.compute_dtype}\n"
        f"{case.machine['name']}: reads {format_rate(case.pace.read_bytes_per_s)}; headrace may hold "
        f"{format_bytes(case.request.budget_bytes)}\n\n"
    )
    columns = (
        "strategy",
        "fits",
        "blocks resident",
        "slots",
        "memory",
        "first pass",
        "per pass",
        "tokens/s",
        "waits for",
    )
    output.show(table(columns, [_row(name, item, best) for name, item in compared.items()]))
    for name, item in compared.items():
        if isinstance(item, HeadraceError):
            output.text(f"{name}: {item}\n")
    if best is None:
        return
    output.text(f"{break_even_of(case, best).describe()}\n{remedy(case, best)}\n\n")
    chart = text_chart(best.prediction.timeline, pass_index=(DECODE_PASSES_SIMULATED + 1) // 2)
    output.text(f"one pass of {best.plan.strategy.value}, as predicted:\n{chart}\n")


def _row(name: str, item: Candidate | HeadraceError, best: Candidate | None) -> list[str]:
    if not isinstance(item, Candidate):
        return [name, "no", *[""] * 7]
    chosen, predicted = item
    return [
        f"{name} *" if item is best else name,
        "yes",
        f"{chosen.resident_blocks} of {chosen.num_blocks}",
        str(chosen.slots),
        format_bytes(chosen.memory.total_bytes),
        format_seconds(predicted.prefill_s),
        format_seconds(predicted.decode_s_per_pass),
        three_digits(predicted.tokens_per_s),
        "both in turn" if predicted.binds == "both" else predicted.binds,
    ]


PLAN = Command("plan", plan, EXAMPLES)
