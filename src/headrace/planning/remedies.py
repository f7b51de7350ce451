"""What would make a plan faster, found by planning again with one thing changed: parts, memory, the CPU's help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from headrace.planning.infeasible import budget_for_everything
from headrace.planning.memory import Arrangement, MemoryAccount
from headrace.planning.plan import Placement
from headrace.planning.planner import plan_fastest, plan_strategy
from headrace.planning.prediction import Candidate, predict
from headrace.planning.rates import Rates
from headrace.planning.scenario import Scenario
from headrace.units import format_bytes, format_seconds

WORTH_A_SENTENCE = 0.99
"""a change that leaves more than this share of the time is not worth a sentence"""

STEP_BYTES = 1 << 30


def advice(scenario: Scenario, best: Candidate) -> list[str]:
    """Sentences: what binds and what twice its speed would bring, more tokens per pass, more memory, the CPU."""
    return list(filter(None, _sentences(scenario, best)))


def _sentences(scenario: Scenario, best: Candidate) -> Iterator[str]:
    plan, predicted = best
    if predicted.load_s_per_pass == 0 and not plan.cpu_blocks:
        yield (
            f"{_device(scenario)} binds, and every weight is in memory: neither more memory nor a faster "
            f"{'disk' if scenario.on_cpu else 'link'} would help; more tokens per pass (a batch) would, as far as the "
            "arithmetic curve is flat."
        )
        return
    yield _what_binds(scenario, best)
    even = predicted.break_even_tokens_per_pass
    if predicted.binds not in {"compute", "cpu"} and even >= plan.workload.sequences + 1:
        yield f"More tokens in a pass are free up to {even:.0f} (a batch, drafts)."
    yield _more_device_memory(scenario).describe(best)
    if not scenario.on_cpu and Placement.DISK in plan.placements:
        yield _more_host_memory(scenario, best).describe(best)
    if predicted.binds == "link" and not scenario.allow_cpu and scenario.known_rates.cpu_layer is not None:
        yield _help_of_cpu(scenario, best)


def _device(scenario: Scenario) -> str:
    return "The CPU" if scenario.on_cpu else "The accelerator"


def _what_binds(scenario: Scenario, best: Candidate) -> str:
    plan, now, binds = best.plan, format_seconds(best.prediction.decode_s_per_pass), best.prediction.binds
    rates = scenario.known_rates
    if binds == "compute":
        return (
            f"{_device(scenario)} binds: what is loaded hides behind its arithmetic, so a faster disk or link would "
            "hardly help; faster arithmetic would."
        )
    if binds == "disk" or (binds == "both" and scenario.on_cpu):
        faster = _pass_at(scenario, best, _faster_disk(rates))
        return f"The disk binds: one of twice the speed would make a pass {faster} instead of {now}."
    if binds == "cpu":
        assert rates.cpu_layer is not None
        faster = _pass_at(scenario, best, replace(rates, cpu_layer=rates.cpu_layer.scaled(0.5)))
        return (
            f"The CPU binds, with the {plan.cpu_blocks} layers that it computes: one of twice the speed would make a "
            f"pass {faster} instead of {now}."
        )
    faster = _pass_at(scenario, best, _faster_link(rates))
    if binds == "link":
        return f"The link to {plan.device} binds: one of twice the speed would make a pass {faster} instead of {now}."
    from_disk = ""
    if Placement.DISK in plan.placements:
        from_disk = f", a disk of twice the speed {_pass_at(scenario, best, _faster_disk(rates))}"
    return (
        f"Loading and computing take turns: a link of twice the speed would make a pass {faster} instead of "
        f"{now}{from_disk}."
    )


def _pass_at(scenario: Scenario, best: Candidate, rates: Rates) -> str:
    """A pass at other rates, on an accelerator planned again: what another part did may now be too slow."""
    changed = scenario.at(rates)
    seconds = predict(best.plan, changed).decode_s_per_pass
    if not scenario.on_cpu:
        seconds = min(seconds, plan_strategy(changed, best.plan.strategy).prediction.decode_s_per_pass)
    return format_seconds(seconds)


def _faster_link(rates: Rates) -> Rates:
    return replace(
        rates,
        link_bytes_per_s=2 * rates.link_bytes_per_s,
        staged_bytes_per_s=min(2 * rates.staged_bytes_per_s, rates.memory_copy_bytes_per_s),
    )


def _faster_disk(rates: Rates) -> Rates:
    return replace(rates, read_bytes_per_s=2 * rates.read_bytes_per_s)


class MoreMemory(NamedTuple):
    """A memory whose budget could be larger."""

    name: str
    """as sentences call it: device memory"""
    option: str
    budget_bytes: int
    enough_bytes: int | None
    """the budget beyond which more would change nothing; None where no budget would be enough"""
    holds: str
    """what as much as that would hold"""
    block_bytes: int
    """of the largest block: a step that is smaller may hold no more than before"""
    planned: Callable[[int], Candidate]
    """the fastest plan under another budget"""

    def describe(self, best: Candidate) -> str:
        """Say what a step more would save of a pass; nothing where there is enough."""
        budget, enough = self.budget_bytes, self.enough_bytes
        step = max(STEP_BYTES, 2 * self.block_bytes)
        if enough is not None:
            step = min(step, enough - budget)
        if step <= 0:
            return ""
        now_s = best.prediction.decode_s_per_pass
        saved_s = now_s - self.planned(budget + step).prediction.decode_s_per_pass
        if saved_s < (1 - WORTH_A_SENTENCE) * now_s:
            return f"More {self.name} would save nothing worth having."
        if enough is not None and step == enough - budget:
            return (
                f"{format_bytes(step)} more {self.name} would hold {self.holds}: {format_seconds(now_s - saved_s)} per "
                f"pass ({self.option} {enough})."
            )
        saved_s *= STEP_BYTES / step
        return f"Each further GiB of {self.name} saves about {format_seconds(saved_s)} per pass."


def _more_device_memory(scenario: Scenario) -> MoreMemory:
    return MoreMemory(
        name="memory" if scenario.on_cpu else "device memory",
        option="--memory",
        budget_bytes=scenario.budget_bytes,
        enough_bytes=budget_for_everything(scenario),
        holds="everything",
        block_bytes=max(MemoryAccount(scenario).block_bytes),
        planned=lambda size: plan_fastest(replace(scenario, budget_bytes=size)),
    )


def _more_host_memory(scenario: Scenario, best: Candidate) -> MoreMemory:
    stored = zip(MemoryAccount(scenario).stored_bytes, best.plan.placements, strict=True)
    on_disk = [size for size, placement in stored if placement is Placement.DISK]
    return MoreMemory(
        name="host memory",
        option="--host-memory",
        budget_bytes=scenario.host_budget_bytes,
        enough_bytes=best.plan.host_memory.total_bytes + sum(on_disk),
        holds="what comes from the disk",
        block_bytes=max(on_disk),
        planned=lambda size: plan_fastest(replace(scenario, host_budget_bytes=size)),
    )


def _help_of_cpu(scenario: Scenario, best: Candidate) -> str:
    now_s = best.prediction.decode_s_per_pass
    one_layer = Arrangement((Placement.CPU, *[Placement.DISK] * (len(scenario.model.blocks) - 1)), 0)
    needed_bytes = MemoryAccount(scenario).host(one_layer).total_bytes
    if needed_bytes > scenario.host_budget_bytes:
        return (
            f"For --cpu-blocks the host's budget is too small: raise --host-memory to {format_bytes(needed_bytes)} for "
            "one layer."
        )
    plan, predicted = plan_fastest(replace(scenario, allow_cpu=True))
    if not plan.cpu_blocks or predicted.decode_s_per_pass > WORTH_A_SENTENCE * now_s:
        return "The CPU would be no help: it is too slow for layers of this model (--cpu-blocks)."
    return (
        f"With --cpu-blocks the CPU would compute {plan.cpu_blocks} layers where they lie: "
        f"{format_seconds(predicted.decode_s_per_pass)} per pass, as predicted; results may then differ in rounding."
    )
