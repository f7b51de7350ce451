"""Outcomes as Markdown and as one record: goals reached or missed with their figures, a table for each part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench_report import table
from gpu_parts.outcome import Goal, Outcome, State
from gpu_parts.stage import Promise

MADE_UP = (
    "**The accelerator is made up: it is host memory, and the processor computes. These figures mean nothing; the run "
    "shows that every part works.**"
)


def goals_of(outcomes: Iterable[Outcome], promises: Sequence[Promise]) -> list[Goal]:
    """Those of all parts, and that no load took more of the device's memory than it was allowed."""
    goals = [goal for one in outcomes if one.measured is not None for goal in one.measured.goals]
    if promises:
        kept = sum(promise.kept for promise in promises)
        goals.append(
            Goal(
                "peak of the device's memory within what each load was allowed",
                "every load",
                f"{kept} of {len(promises)}",
                kept == len(promises),
            )
        )
    return goals


def exit_code(outcomes: Sequence[Outcome], goals: Iterable[Goal]) -> int:
    """1 where a part failed, or something that must hold did not."""
    failed = any(one.state is State.FAILED for one in outcomes)
    return int(failed or any(goal.required and not goal.reached for goal in goals))


def report_text(
    header: str, *, made_up: bool, outcomes: Sequence[Outcome], promises: Sequence[Promise], notes: Sequence[str] = ()
) -> str:
    """The whole report."""
    lines = [f"# {header}", ""]
    lines += [MADE_UP, ""] if made_up else []
    lines += [line for note in notes for line in (note, "")]
    goals = goals_of(outcomes, promises)
    if goals:
        rows = [[g.what, g.wanted, g.found, "reached" if g.reached else "**missed**"] for g in goals]
        lines += ["## Goals", "", table(("goal", "wanted", "found", ""), rows), ""]
    for one in outcomes:
        lines += _part(one)
    if promises:
        lines += ["## Device memory: the allocator's peak against what was allowed", "", _promises(promises), ""]
    return "\n".join(lines).rstrip()


def _part(outcome: Outcome) -> list[str]:
    lines = [f"## {outcome.title} (`{outcome.name}`, {outcome.seconds:.0f} s)", ""]
    if outcome.state is not State.MEASURED:
        return [*lines, f"{outcome.state.value.capitalize()}: {outcome.reason}", ""]
    assert outcome.measured is not None
    for own in outcome.measured.tables:
        lines += [table(own.columns, own.rows), ""]
    for note in outcome.measured.notes:
        lines += [note, ""]
    return lines


def _promises(promises: Sequence[Promise]) -> str:
    rows = [
        [
            one.what,
            f"{one.budget_bytes / 1e6:,.1f}",
            f"{one.peak_bytes / 1e6:,.1f}",
            f"{one.peak_bytes / one.budget_bytes:.3f}",
            "kept" if one.kept else "**broken**",
        ]
        for one in promises
    ]
    return table(("load", "allowed MB", "peak MB", "peak / allowed", ""), rows)


def record_of(outcomes: Sequence[Outcome], promises: Sequence[Promise]) -> Mapping[str, Any]:
    """Everything, for the JSON file."""
    return {
        "parts": {
            one.name: {
                "state": one.state.value,
                "seconds": round(one.seconds, 2),
                **({"reason": one.reason} if one.reason else {}),
                **({} if one.measured is None else one.measured.record),
            }
            for one in outcomes
        },
        "goals": [goal._asdict() for goal in goals_of(outcomes, promises)],
        "promises": [{**one._asdict(), "kept": one.kept} for one in promises],
    }
