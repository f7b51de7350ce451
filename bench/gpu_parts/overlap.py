"""How much of the shorter of loading and computing disappears behind the longer one, from one token to past break-even.

A pass of n tokens is n sequences of a token each, without a cache: what break-even is predicted for. By turns, on the
device's clock: load alone (the stream is drained), compute alone (everything resident), and both at once.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench_report import spread
from gpu_parts.exactness import Comparison, compare, comparison_table, exactness_goal, logits_of
from gpu_parts.outcome import Goal, Measured, Table, at_least
from gpu_parts.stage import Stage, single_tokens
from gpu_parts.timing import drain_cycles_s, pass_cycles_s, some_tokens

WANTED_EFFICIENCY = 0.95
WANTED_ERROR = 0.10
STUDIED_TOKENS = 8192
"""of the plan that says about where break-even is, so that it is measured there"""
PARTS_OF_BREAK_EVEN = (0.25, 0.5, 1.0, 1.5)
FEW_TOKENS = (1, 256)
TILE = 256
"""numbers of tokens are multiples of it, as products of matrices like them"""

CONTESTANTS = ("load", "compute", "both")
Seconds = dict[int, dict[str, list[float]]]
"""by tokens per pass and contestant"""


def measure_overlap(stage: Stage) -> Measured:
    """Overlap efficiency, break-even, and exactness of the main shape."""
    name, one = stage.case.main, single_tokens(1)
    most = stage.most_tokens(name)
    predicted = {}
    for count in (1, min(STUDIED_TOKENS, most)):
        work = single_tokens(count)
        memory = stage.least_bytes(name, "overlap", **work)
        found = stage.predict(name, strategy="overlap", memory=memory, **work)
        predicted[count] = found.break_even_tokens_per_pass
    counts = token_counts(predicted[max(predicted)], (stage.case.token_bounds[0], most))
    work = single_tokens(counts[-1])
    with (
        stage.load(
            name, what="streamed", memory=stage.least_bytes(name, "overlap", **work), strategy="overlap", **work
        ) as streamed,
        stage.load(
            name, what="resident", memory=stage.resident_bytes(name, **one), strategy="resident", **one
        ) as resident,  # for a token: passes of more use the room that the other one has
    ):
        predicted[counts[-1]] = streamed.headrace.prediction.break_even_tokens_per_pass
        dtype = streamed.headrace.plan.compute_dtype
        same = compare(logits_of(resident), streamed, dtype=dtype, reference="resident", compared="streamed")
        seconds = _by_turns(stage, streamed, resident, counts)
    return _report(name, seconds, predicted, same)


def token_counts(break_even: float, bounds: tuple[int, int]) -> list[int]:
    """Tokens per pass to measure: few, and from a quarter of the predicted break-even to one and a half times it."""
    low, high = bounds
    expected = min(max(break_even, low), high / PARTS_OF_BREAK_EVEN[-1])
    near = [part * expected for part in PARTS_OF_BREAK_EVEN]
    tile = TILE if low >= TILE else 1
    return sorted({count for count in FEW_TOKENS if count < near[0]} | {max(1, int(n / tile)) * tile for n in near})


def _by_turns(stage: Stage, streamed: Any, resident: Any, counts: Sequence[int]) -> Seconds:
    seconds: Seconds = {count: {kind: [] for kind in CONTESTANTS} for count in counts}
    passes = stage.case.passes
    for _ in stage.deadline.rounds(stage.case.rounds):
        for count in counts:
            ids, row = some_tokens(streamed, count, 1), seconds[count]
            row["load"] += drain_cycles_s(streamed, passes)
            row["compute"] += pass_cycles_s(resident, ids, passes)
            row["both"] += pass_cycles_s(streamed, ids, passes)
    streamed.headrace.stream.check_integrity()
    return seconds


def _report(name: str, seconds: Seconds, predicted: Mapping[int, float], same: Comparison) -> Measured:
    medians = {
        count: {kind: statistics.median(values) for kind, values in row.items()} for count, row in seconds.items()
    }
    efficiency = {count: max(row["load"], row["compute"]) / row["both"] for count, row in medians.items()}
    measured = crossing({count: row["compute"] - row["load"] for count, row in medians.items()})
    columns = ("tokens per pass", "load alone ms", "compute alone ms", "both ms", "efficiency")
    rows = [
        [str(count), *(f"{1e3 * row[kind]:.4g}" for kind in CONTESTANTS), f"**{efficiency[count]:.3f}**"]
        for count, row in medians.items()
    ]
    break_even = [
        [str(count), f"{tokens:.0f}", "none" if measured is None else f"{tokens / measured - 1:+.1%}"]
        for count, tokens in sorted(predicted.items())
    ]
    where = "outside of what was measured" if measured is None else f"**{measured:.0f}** tokens per pass"
    return Measured(
        tables=[
            Table(columns, rows),
            Table(("planned for tokens per pass", "break-even predicted", "off by"), break_even),
            comparison_table([same]),
        ],
        goals=[
            exactness_goal(f"streamed logits of the {name} shape equal resident ones, bit for bit", [same]),
            *efficiency_goals(name, efficiency, measured),
            *break_even_goals(name, predicted, measured),
        ],
        notes=[
            f"Break-even measured (compute alone crosses load alone, between measured points linearly): {where}. "
            f"Medians of {len(next(iter(seconds.values()))['both'])} passes."
        ],
        record={
            "shape": name,
            "rows": [
                {
                    "tokens": count,
                    **{f"{kind}_s": spread(values) for kind, values in row.items()},
                    "efficiency": efficiency[count],
                }
                for count, row in seconds.items()
            ],
            "break_even_measured": measured,
            "break_even_predicted": {str(count): tokens for count, tokens in predicted.items()},
            "comparisons": [same._asdict()],
        },
    )


def crossing(gaps: Mapping[int, float]) -> float | None:
    """Where a difference changes from negative to positive, interpolated linearly; None where it does not."""
    counts = sorted(gaps)
    for low, high in itertools.pairwise(counts):
        if gaps[low] < 0 <= gaps[high]:
            return low + (high - low) * -gaps[low] / (gaps[high] - gaps[low])
    return None


def efficiency_goals(name: str, efficiency: Mapping[int, float], break_even: float | None) -> list[Goal]:
    """The worst of what lies below break-even, the one nearest to it, and the worst of what lies above."""
    if break_even is None:
        return [at_least(f"overlap efficiency, {name}, the worst of all", WANTED_EFFICIENCY, min(efficiency.values()))]
    nearest = min(efficiency, key=lambda count: abs(math.log(count / break_even)))
    groups = {
        "below": [count for count in efficiency if count < nearest],
        "at": [nearest],
        "above": [count for count in efficiency if count > nearest],
    }
    return [
        at_least(
            f"overlap efficiency, {name}, {where} break-even ({', '.join(map(str, counts))} tokens)",
            WANTED_EFFICIENCY,
            min(efficiency[count] for count in counts),
        )
        for where, counts in groups.items()
        if counts
    ]


def break_even_goals(name: str, predicted: Mapping[int, float], measured: float | None) -> list[Goal]:
    """As planned for about as many tokens, and as planned for a single one."""
    if measured is None:
        return [Goal(f"break-even of the {name} shape measured", "between two points", "not there", reached=False)]
    nearest = min(predicted, key=lambda count: abs(math.log(count / measured)))
    goals = []
    for count in dict.fromkeys((nearest, 1)):
        error = predicted[count] / measured - 1
        what = f"break-even of the {name} shape, predicted for a plan of {count} tokens per pass"
        goals.append(Goal(what, f"within {WANTED_ERROR:.0%}", f"{error:+.1%}", abs(error) <= WANTED_ERROR))
    return goals
