"""One question to the planner: a model, a workload, a budget, and how fast the machine is.

The speeds come either from measuring this machine with this very model (half a second, needs torch), or from a
machine file that `headrace probe` wrote, here or elsewhere (needs no torch).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from headrace.errors import BudgetError, HeadraceError
from headrace.planning.estimate import Pace
from headrace.planning.load_options import Options, compute_dtypes, make_options, reserve_bytes, work_seconds
from headrace.planning.model_config import read_config
from headrace.planning.model_spec import ModelSpec, build_spec
from headrace.planning.plan import Strategy, Workload
from headrace.planning.planner import Candidate, Request, minimum_bytes, plan_fastest, plan_strategy
from headrace.planning.probed_machine import ProbedMachine
from headrace.planning.tensor_index import TensorIndex
from headrace.units import format_bytes


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
    from headrace.inference.skeleton import read_transformers_config
    from headrace.inference.study import study
    from headrace.streaming.checkpoint import Checkpoint
    from headrace.streaming.system_memory import default_budget_bytes

    checkpoint = Checkpoint(directory)
    try:
        options = _options(checkpoint.spec, asked, default_budget_bytes)
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
    free_bytes = machine.memory_bytes
    options = _options(spec, asked, lambda: max(0, free_bytes - reserve_bytes(free_bytes)))
    budget_bytes, limit = options.budget_bytes, options.read_limit_bytes_per_s
    notes = []
    if asked.memory is None:
        reserve = format_bytes(reserve_bytes(free_bytes))
        notes = [f"budget: the machine's {format_bytes(free_bytes)} less {reserve} in reserve"]
    cases = []
    for name in compute_dtypes(spec, asked.dtype):
        request = Request(spec=spec, workload=asked.workload, compute_dtype=name, budget_bytes=budget_bytes)
        pace = Pace.of(machine, compute_dtype=name, stored_dtype=spec.stored_dtype, read_limit_bytes_per_s=limit)
        about = {"name": machine.name, "memory_bytes": machine.memory_bytes, "source": origin}
        cases.append(
            PlanningCase(
                request, pace, tuple(notes), about | _constants(request, pace), read_is_limited=limit is not None
            )
        )
    fitting = [case for case in cases if minimum_bytes(case.request) <= budget_bytes]
    return min(fitting or cases, key=lambda case: work_seconds(case.pace.curve, asked.workload))


def _read_spec(directory: Path) -> ModelSpec:
    return build_spec(directory.resolve().name, read_config(directory), TensorIndex.from_directory(directory))


def _options(spec: ModelSpec, asked: Asked, default_budget_bytes: Callable[[], int]) -> Options:
    """Check what was asked for; raises InvalidRequestError for what this model cannot do."""
    return make_options(
        spec,
        memory=asked.memory,
        default_budget_bytes=default_budget_bytes,
        dtype=asked.dtype or "auto",
        batch=asked.workload.sequences,
        prompt_tokens=asked.workload.prompt_tokens,
        max_tokens=asked.workload.context_tokens,
        read_limit=asked.read_limit,
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
