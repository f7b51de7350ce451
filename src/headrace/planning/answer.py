"""The answer to a scenario: every strategy, the recommended one, what it costs, break-even, advice.

Text, JSON, Python and pages all show this one object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from headrace.machine.quantity import Interval
from headrace.planning.advice import advice
from headrace.planning.break_even import BreakEven, break_even, break_even_tokens
from headrace.planning.planner import Compared, recommended
from headrace.planning.prediction import Candidate, PredictionInterval, is_simulated, prediction_interval
from headrace.planning.price import Price, price
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy


@dataclass(frozen=True, kw_only=True)
class PlanAnswer:
    """What the planner says of a scenario."""

    scenario: Scenario
    compared: Compared
    notes: tuple[str, ...] = ()
    machine_name: str = ""
    accelerator: str = ""
    """name of the measured device that computes, where that is not the CPU"""
    source: str = ""
    """where the machine's numbers come from: a file, a catalogue, a measurement"""
    token_multiplier: float = 1.0
    """tokens computed for each token that the user gets (best of n, revisions)"""

    @cached_property
    def best(self) -> Candidate | None:
        """The recommended plan; None where nothing fits."""
        return recommended(self.compared)

    @property
    def candidates(self) -> dict[Strategy, Candidate]:
        """The strategies that fit."""
        return {name: item for name, item in self.compared.items() if isinstance(item, Candidate)}

    @cached_property
    def intervals(self) -> Mapping[Strategy, PredictionInterval]:
        """How far each prediction may be off."""
        return {name: prediction_interval(item, self.scenario) for name, item in self.candidates.items()}

    @cached_property
    def prices(self) -> Mapping[Strategy, Price]:
        """Dollars and joules of each, as far as the machine's description knows them."""
        machine = self.scenario.machine
        if machine is None:
            return {}
        return {
            name: price(
                machine,
                item.plan,
                self.intervals[name].total_s,
                binds=item.prediction.binds,
                token_multiplier=self.token_multiplier,
            )
            for name, item in self.candidates.items()
        }

    @cached_property
    def break_even(self) -> BreakEven | None:
        """Of the recommended plan, or of streaming everything where that keeps its weights."""
        return break_even(self.scenario, self.best)

    def break_even_of(self, item: Candidate) -> Interval | None:
        """Tokens per pass at which this plan computes as long as it loads; None where it streams nothing."""
        if is_simulated(item.plan, self.scenario):
            tokens = item.prediction.break_even_tokens_per_pass
            return Interval(tokens, tokens, tokens) if tokens else None
        arrangement = item.plan.arrangement
        return break_even_tokens(self.scenario, arrangement) if arrangement.streamed_share > 0 else None

    @cached_property
    def advice(self) -> tuple[str, ...]:
        """What holds the recommended plan back, and what would help."""
        return () if self.best is None else tuple(advice(self.scenario, self.best))
