"""One question to the planner: a model, a workload, budgets, and how fast the machine is.

Whether the processor computes (`processor_case.py`) or an accelerator (`accelerator_case.py`), and whether the speeds
were measured just now or come from a machine file (`case_origin.py`), the answer is compared and shown in one way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from headrace.errors import BudgetError, HeadraceError
from headrace.model.stored_model import StoredModel
from headrace.planning.accelerator_memory import AcceleratorRequest
from headrace.planning.accelerator_pace import AcceleratorPace
from headrace.planning.estimate import Pace, Prediction
from headrace.planning.estimate_interval import PredictionInterval
from headrace.planning.load_options import Options, make_options
from headrace.planning.plan import Plan, Strategy, Workload
from headrace.planning.planner import Candidate, Request


class Asked(NamedTuple):
    """The options of `headrace plan` as given; None where the default is wanted."""

    memory: str | None
    workload: Workload
    strategy: Strategy | None
    dtype: str | None
    read_limit: str | None
    device: str = "auto"
    host_memory: str | None = None
    cpu_blocks: bool = False
    cache_on_host: bool = False

    def options(
        self,
        model: StoredModel,
        default_budget_bytes: Callable[[], int],
        default_host_budget_bytes: Callable[[], int] | None = None,
    ) -> Options:
        """Check what was asked for; `default_host_budget_bytes` is None where the processor computes.

        The strategy is left open: one that does not fit is answered, not refused. Raises InvalidRequestError for what
        this model or this device cannot do.
        """
        return make_options(
            model,
            memory=self.memory,
            default_budget_bytes=default_budget_bytes,
            dtype=self.dtype or "auto",
            batch=self.workload.sequences,
            prompt_tokens=self.workload.prompt_tokens,
            max_tokens=self.workload.context_tokens,
            read_limit=self.read_limit,
            host_memory=self.host_memory,
            default_host_budget_bytes=default_host_budget_bytes,
            cpu_blocks=self.cpu_blocks,
            cache_on_host=self.cache_on_host,
        )


@dataclass(frozen=True, kw_only=True)
class PlanningCase(ABC):
    """What the planner needs, and where its numbers come from."""

    request: Request | AcceleratorRequest
    pace: Pace | AcceleratorPace
    notes: tuple[str, ...]
    machine: dict[str, Any]
    """of the machine what JSON shows"""
    read_is_limited: bool = False
    """reading is held at a limit that the user gave, so that its rate is steady"""

    @abstractmethod
    def plan(self, strategy: Strategy) -> Candidate:
        """Return the strategy's fastest plan; raises BudgetError where none fits."""

    @abstractmethod
    def with_budget(self, budget_bytes: int) -> Candidate:
        """Return the fastest plan under another budget of the computing device's memory."""

    @abstractmethod
    def predict(self, plan: Plan) -> Prediction:
        """Predict what the plan does, its workload changed perhaps, by the curves of arithmetic alone."""

    @abstractmethod
    def least_bytes(self, workload: Workload) -> int:
        """Return the smallest budget in which this work could be done; raises BudgetError where none would do."""

    @abstractmethod
    def bytes_for_all(self) -> int | None:
        """Return the smallest budget that holds all weights, and everything beside them; None where none would do."""

    @abstractmethod
    def describe_machine(self) -> str:
        """How fast the machine moves bytes, and what headrace may hold of it, in half a sentence."""

    @abstractmethod
    def interval(self, candidate: Candidate) -> PredictionInterval:
        """How far the candidate's prediction may be off."""

    def compare(self, only: Strategy | None) -> dict[str, Candidate | HeadraceError]:
        """Every strategy's fastest plan, or the error that says why there is none."""
        found: dict[str, Candidate | HeadraceError] = {}
        for strategy in Strategy:
            if only is not None and strategy is not only:
                continue
            try:
                found[strategy.value] = self.plan(strategy)
            except BudgetError as error:
                found[strategy.value] = error
        return found

    def fits(self, *, sequences: int) -> bool:
        """Whether so many sequences at once could be run at all within the budget."""
        try:
            least_bytes = self.least_bytes(replace(self.request.workload, sequences=sequences))
        except BudgetError:
            return False
        return least_bytes <= self.request.budget_bytes


def constants_of(model: StoredModel, pace: Pace) -> dict[str, Any]:
    """List the speeds that a prediction rests on, as JSON shows them: the disk's and the computing device's."""
    curve = pace.curve
    return {
        "read_bytes_per_s": pace.read_bytes_per_s,
        "compute_dtype": curve.compute_dtype,
        "stored_dtype": model.stored_dtype,
        "arithmetic": [
            {"tokens": point.tokens, "parameters_per_s": 1 / point.seconds_per_parameter} for point in curve.points
        ],
        "block_overhead_s": pace.block_overhead_s,
        "pass_overhead_s": pace.pass_overhead_s,
    }
