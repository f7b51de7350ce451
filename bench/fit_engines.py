"""Fit the constants of engines on a stated half of the published rows, and judge them on the other half.

    python bench/fit_engines.py MEASUREMENTS.csv

Rows whose id has an even CRC-32 are fitted on, the others judge (a stated split that does not follow the order in which
rows were collected); rows of time to the first token under load and of streaming are
never fitted on. The loss is the mean absolute logarithm of predicted over measured; coordinate descent over a few
constants per engine within physical bounds. Prints the constants, with the median
error of both halves and the spread that holds 85 % of all residuals.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import zlib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from headrace.accuracy.published import read_rows
from headrace.accuracy.published_case import Case, Excluded, case_of
from headrace.accuracy.published_metrics import figure_of
from headrace.machine.engine import Engine, engines
from headrace.machine.quantity import Quantity

BOUNDS = {
    "memory_share": (0.3, 0.95),
    "compute_share": (0.2, 1.0),
    "attention_share": (0.2, 0.9),
    "layer_overhead_s": (1e-6, 600e-6),
    "split_overhead_s": (0.0, 6000e-6),
    "across_overhead_s": (0.0, 600e-6),
    "pass_overhead_s": (0.05e-3, 40e-3),
    "token_overhead_s": (0.0, 500e-6),
    "quantised_share": (0.3, 1.0),
    "exchange_excess": (0.02, 1.5),
}
NEVER = {"zero-inference", "flexgen", "airllm", "umbrella", "moe-offload"}
PULL = 0.01
"""how much a constant is drawn to where it began, so that what no row tells about stays put"""


def main() -> int:
    """Fit and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", type=Path)
    arguments = parser.parse_args()
    cases: dict[str, list[Case]] = defaultdict(list)
    for row in read_rows(arguments.measurements):
        try:
            case = case_of(row)
        except Excluded:
            continue
        if row.metric != "ttft_serving" and case.family in {"resident", "tensor", "pipeline", "cpu"}:
            cases[case.engine.name].append(case)
    for name, members in sorted(cases.items()):
        if name in NEVER or name not in engines():
            continue
        report(name, members)
    return 0


def report(name: str, members: list[Case]) -> None:
    """Fit one engine and print it."""
    train = [case for case in members if fitted_on(case)] or members
    judge = [case for case in members if not fitted_on(case)]
    engine = fit(engines()[name], train)
    on_train, on_judge = residuals(engine, train), residuals(engine, judge)
    together = sorted(on_train + on_judge)
    low, high = spread(together)
    values = {field: getattr(engine, field).expected for field in BOUNDS}
    sys.stdout.write(
        f'    "{name}": _engine(  # {len(train)} rows fitted: median {error(on_train):.0%}; '
        f"{len(judge)} judged: {error(on_judge):.0%}\n"
        f'        "{name}",\n'
        f"        memory={values['memory_share']:.3f},\n        compute={values['compute_share']:.3f},\n"
        f"        attention={values['attention_share']:.2f},\n        quantised={values['quantised_share']:.2f},\n"
        f"        layer_us={values['layer_overhead_s'] * 1e6:.1f},\n"
        f"        split_us={values['split_overhead_s'] * 1e6:.1f},\n"
        f"        across_us={values['across_overhead_s'] * 1e6:.1f},\n"
        f"        pass_ms={values['pass_overhead_s'] * 1e3:.2f},\n"
        f"        token_us={values['token_overhead_s'] * 1e6:.1f},\n"
        f"        exchange={values['exchange_excess']:.2f},\n"
        f"        spread=({low:.2f}, {high:.2f}),\n    ),\n"
    )


def fitted_on(case: Case) -> bool:
    """Whether this row belongs to the half that constants are fitted on."""
    return zlib.crc32(case.row.id.encode()) % 2 == 0


def fit(engine: Engine, cases: list[Case]) -> Engine:
    """Coordinate descent with shrinking steps."""
    start = engine
    best = loss(engine, cases, start)
    step = 0.5
    while step > 0.02:
        improved = False
        for field, (low, high) in BOUNDS.items():
            for direction in (1 + step, 1 / (1 + step)):
                value = getattr(engine, field).expected
                moved = value * direction if value else high * 0.02 * (direction > 1)
                moved = min(max(moved, low), high)
                tried = replace(engine, **{field: Quantity.of(moved, "trial")})
                found = loss(tried, cases, start)
                if found < best - 1e-6:
                    engine, best, improved = tried, found, True
        if not improved:
            step /= 2
    return engine


def loss(engine: Engine, cases: list[Case], start: Engine) -> float:
    """Mean absolute log ratio, and a slight pull to the start."""
    pull = 0.0
    for field in BOUNDS:
        before, now = getattr(start, field).expected, getattr(engine, field).expected
        if before > 0 and now > 0:
            pull += abs(math.log(now / before))
    return statistics.fmean(abs(value) for value in residuals(engine, cases)) + PULL * pull / len(BOUNDS)


def residuals(engine: Engine, cases: list[Case]) -> list[float]:
    """Logarithms of measured over predicted time (of predicted over measured where the figure is a rate)."""
    sure = replace(engine, spread=Quantity.of(1.0, "fit"))
    found = []
    for case in cases:
        constants, value = figure_of(replace(case, engine=sure))
        predicted = value({name: constant.expected for name, constant in constants.items()})
        ratio = math.log(predicted / case.row.value)
        found.append(-ratio if case.row.unit != "tok/s" else ratio)
    return found


def error(values: list[float]) -> float:
    """Median absolute relative error."""
    return statistics.median(abs(math.exp(-value) - 1) for value in values) if values else math.nan


def spread(ordered: list[float]) -> tuple[float, float]:
    """Factors on time that hold 88 % of the residuals, at least 10 % either way."""
    cut = int(0.06 * len(ordered))
    low, high = math.exp(ordered[cut]), math.exp(ordered[-1 - cut])
    return min(low * 0.95, 0.9), max(high * 1.05, 1.1)


if __name__ == "__main__":
    sys.exit(main())
