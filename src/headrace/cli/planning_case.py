"""One question to the planner: a model, a workload, a budget, and how fast the machine is.

The speeds come either from measuring this machine with this very model (half a second, needs torch), or from a
machine file that `headrace probe` wrote, here or elsewhere (needs no torch).
"""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from headrace.errors import BudgetError, HeadraceError, InvalidRequestError, MachineError
from headrace.planning.estimate import Pace
from headrace.planning.model_config import read_config
from headrace.planning.model_spec import ModelSpec, build_spec
from headrace.planning.plan import STORED_AS, Strategy, Workload
from headrace.planning.planner import Candidate, Request, minimum_bytes, plan_fastest, plan_strategy
from headrace.planning.probed_machine import ProbedMachine
from headrace.planning.tensor_index import TensorIndex
from headrace.streaming.system_memory import AUTO_RESERVE_MIN_BYTES, AUTO_RESERVE_SHARE
from headrace.units import format_bytes, parse_rate, parse_size


class Asked(NamedTuple):
    """The options of `headrace plan` as given; None where the default is wanted."""

    memory: str | None
    workload: Workload
    strategy: Strategy | None
    dtype: str | None
    read_limit: str | None


class PlanningCase(NamedTuple):
    """What the planner needs, and where its numbers come from."""

    request: Request
    pace: Pace
    notes: tuple[str, ...]
    machine: dict[str, Any]
    read_is_limited: bool = False
    """reading is held at a limit that the user gave, so that its rate is steady"""

    def compare(self, only: Strategy | None) -> dict[str, Candidate | HeadraceError]:
        """Every strategy's fastest plan, or the error that says why there is none."""
        found: dict[str, Candidate | HeadraceError] = {}
        for strategy in Strategy:
            if only is not None and strategy is not only:
                continue
            try:
                found[strategy.value] = plan_strategy(self.request, strategy, self.pace)
            except BudgetError as error:
                found[strategy.value] = error
        return found

    def with_budget(self, budget_bytes: int) -> Candidate:
        """Return the fastest plan under another budget."""
        return plan_fastest(replace(self.request, budget_bytes=budget_bytes), self.pace)

    def fits(self, *, sequences: int) -> bool:
        """Whether so many sequences at once could be run at all within the budget."""
        workload = replace(self.request.workload, sequences=sequences)
        return minimum_bytes(replace(self.request, workload=workload)) <= self.request.budget_bytes


def measured_here(directory: Path, asked: Asked) -> PlanningCase:
    """Measure this machine's disk and processor with the model in `directory`."""
    from headrace.inference.api import make_options, study
    from headrace.inference.skeleton import read_transformers_config
    from headrace.streaming.checkpoint import Checkpoint

    checkpoint = Checkpoint(directory)
    try:
        work = asked.workload
        options = make_options(
            checkpoint.spec,
            memory=asked.memory,
            dtype=asked.dtype or "auto",
            batch=work.sequences,
            prompt_tokens=work.prompt_tokens,
            max_tokens=work.context_tokens,
            read_limit=asked.read_limit,
        )
        studied = study(checkpoint, options, read_transformers_config(directory))
    finally:
        checkpoint.close()
    machine = {
        "name": platform.node() or "this machine",
        "processors": os.cpu_count(),
        "source": "measured just now with this model",
    }
    return PlanningCase(
        studied.request,
        studied.pace,
        studied.notes,
        machine | _constants(studied.request, studied.pace),
        read_is_limited=asked.read_limit is not None,
    )


def from_description(directory: Path, asked: Asked, machine: ProbedMachine, *, origin: str) -> PlanningCase:
    """Plan for the machine of a file, this one or another; the model is known by its headers alone."""
    spec = _read_spec(directory)
    _check_context(spec, asked.workload)
    if asked.memory is None:
        reserve = max(AUTO_RESERVE_MIN_BYTES, int(AUTO_RESERVE_SHARE * machine.memory_bytes))
        budget_bytes = max(0, machine.memory_bytes - reserve)
        notes = [f"budget: the machine's {format_bytes(machine.memory_bytes)} less {format_bytes(reserve)} in reserve"]
    else:
        budget_bytes = parse_size(asked.memory)
        notes = []
    limit = None if asked.read_limit is None else parse_rate(asked.read_limit)
    if spec.stored_dtype not in STORED_AS:
        raise MachineError(f"{spec.name} is stored as {spec.stored_dtype}, which no machine file has measurements of")
    stored = STORED_AS[spec.stored_dtype]
    names = [asked.dtype] if asked.dtype is not None else list(dict.fromkeys((stored, "float32")))
    cases = []
    for name in names:
        request = Request(spec=spec, workload=asked.workload, compute_dtype=name, budget_bytes=budget_bytes)
        pace = Pace.of(machine, compute_dtype=name, stored_dtype=spec.stored_dtype, read_limit_bytes_per_s=limit)
        about = {"name": machine.name, "memory_bytes": machine.memory_bytes, "source": origin}
        cases.append(
            PlanningCase(
                request, pace, tuple(notes), about | _constants(request, pace), read_is_limited=limit is not None
            )
        )
    fitting = [case for case in cases if minimum_bytes(case.request) <= budget_bytes]
    return min(fitting or cases, key=_work_seconds)


def _work_seconds(case: PlanningCase) -> float:
    """Seconds per weight of the whole work: how the faster of two dtypes is told."""
    work, curve = case.request.workload, case.pace.curve
    prefill = curve.seconds_per_parameter(work.sequences * work.prompt_tokens)
    return prefill + (work.generate_tokens - 1) * curve.seconds_per_parameter(work.sequences)


def _read_spec(directory: Path) -> ModelSpec:
    return build_spec(directory.resolve().name, read_config(directory), TensorIndex.from_directory(directory))


def _check_context(spec: ModelSpec, workload: Workload) -> None:
    if workload.context_tokens > spec.config.context_tokens:
        raise InvalidRequestError(
            f"{workload.prompt_tokens} + {workload.generate_tokens} tokens of context were asked for; {spec.name} "
            f"can do {spec.config.context_tokens} (prompt and new ones)"
        )


def _constants(request: Request, pace: Pace) -> dict[str, Any]:
    """List the speeds that the prediction rests on."""
    return {
        "read_bytes_per_s": pace.read_bytes_per_s,
        "compute_dtype": request.compute_dtype,
        "stored_dtype": request.spec.stored_dtype,
        "arithmetic": [
            {"tokens": point.tokens, "parameters_per_s": 1 / point.seconds_per_parameter} for point in pace.curve.points
        ],
        "block_overhead_s": pace.block_overhead_s,
        "pass_overhead_s": pace.pass_overhead_s,
    }
