"""A planning case in which the processor computes, from memory that the disk feeds."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from headrace.cli.planning_case import Asked, PlanningCase, constants_of
from headrace.machine.machine import Machine
from headrace.model.stored_model import StoredModel
from headrace.planning.estimate import Pace, Prediction, predict
from headrace.planning.estimate_interval import PredictionInterval, prediction_interval
from headrace.planning.load_options import compute_dtypes, reserve_bytes, work_seconds
from headrace.planning.plan import Plan, Strategy, Workload
from headrace.planning.planner import Candidate, Request, minimum_bytes, plan_fastest, plan_strategy
from headrace.units import format_bytes, format_rate

if TYPE_CHECKING:
    from headrace.streaming.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class ProcessorCase(PlanningCase):
    """The runtime's planner for the processor, and what it is asked."""

    request: Request
    pace: Pace

    def plan(self, strategy: Strategy) -> Candidate:
        """Return the strategy's fastest plan."""
        return plan_strategy(self.request, strategy, self.pace)

    def with_budget(self, budget_bytes: int) -> Candidate:
        """Return the fastest plan under another budget."""
        return plan_fastest(replace(self.request, budget_bytes=budget_bytes), self.pace)

    def predict(self, plan: Plan) -> Prediction:
        """Predict without what the rehearsal of the asked workload found."""
        return predict(self.request.model, plan, replace(self.pace, layer=None))

    def least_bytes(self, workload: Workload) -> int:
        """Return the smallest budget for this work."""
        return minimum_bytes(replace(self.request, workload=workload))

    def bytes_for_all(self) -> int:
        """Return the smallest budget that holds all weights."""
        return minimum_bytes(self.request, Strategy.RESIDENT)

    def interval(self, candidate: Candidate) -> PredictionInterval:
        """Move the disk's rate and the time of computing."""
        return prediction_interval(self.request.model, candidate, self.pace, read_is_limited=self.read_is_limited)

    def describe_machine(self) -> str:
        """Name the disk's rate and the budget."""
        return (
            f"reads {format_rate(self.pace.read_bytes_per_s)}; headrace may hold "
            f"{format_bytes(self.request.budget_bytes)}"
        )


def measured_processor(checkpoint: Checkpoint, asked: Asked) -> ProcessorCase:
    """Measure this machine's disk and processor with the model."""
    from headrace.inference.skeleton import read_transformers_config
    from headrace.inference.study import study
    from headrace.streaming.system_memory import default_budget_bytes

    options = asked.options(checkpoint.model, default_budget_bytes)
    studied = study(checkpoint, options, read_transformers_config(checkpoint.directory))
    machine = {
        "name": platform.node() or "this machine",
        "processors": os.cpu_count(),
        "source": "measured just now with this model",
    }
    return ProcessorCase(
        request=studied.request,
        pace=studied.pace,
        notes=studied.notes,
        machine=machine | constants_of(checkpoint.model, studied.pace),
        read_is_limited=asked.read_limit is not None,
    )


def described_processor(model: StoredModel, asked: Asked, machine: Machine, *, origin: str) -> ProcessorCase:
    """Take the processor of a machine file, with the dtype that is faster there among those that fit."""
    free_bytes = machine.host_bytes
    options = asked.options(model, lambda: max(0, free_bytes - reserve_bytes(free_bytes)))
    budget_bytes, limit = options.budget_bytes, options.read_limit_bytes_per_s
    notes = []
    if asked.memory is None:
        reserve = format_bytes(reserve_bytes(free_bytes))
        notes = [f"budget: the machine's {format_bytes(free_bytes)} less {reserve} in reserve"]
    about = {"name": machine.name, "memory_bytes": machine.host_bytes, "source": origin}
    cases = []
    for name in compute_dtypes(model, asked.dtype):
        request = Request(model=model, workload=asked.workload, compute_dtype=name, budget_bytes=budget_bytes)
        pace = Pace.of(machine, compute_dtype=name, stored_dtype=model.stored_dtype, read_limit_bytes_per_s=limit)
        cases.append(
            ProcessorCase(
                request=request,
                pace=pace,
                notes=tuple(notes),
                machine=about | constants_of(model, pace),
                read_is_limited=limit is not None,
            )
        )
    fitting = [case for case in cases if case.least_bytes(asked.workload) <= budget_bytes]
    return min(fitting or cases, key=lambda case: work_seconds(case.pace.curve, asked.workload))
