"""Fit the constants of engines to published rows, and judge them on sources that are left out, each whole, in turn.

    python bench/fit_engines.py                    # writes machine/engines.toml and accuracy/cross_validated.toml
    python bench/fit_engines.py --cross-validate   # only prints the errors on sources left out

Every constant of an engine is drawn to that of `present`, which is physics and not fitted: the sum over the rows of
|log predicted / measured| / 0.1, a document of n rows weighing n^0.7, and of half the squared distance from `present`
in units of how far engines differ. Rows of streaming, experts and times to the first token are never fitted on.

Ranges: a constant spans what each document alone gives where two documents have three rows or more; with fewer it has
the range of `present`, widened to hold its value. The spread of every fitted engine is the narrowest that holds 92 % of
the left-out rows whose engine another document knows. A left-out row whose engine no other document knows is predicted
with `present`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headrace.accuracy.published import Row, read_rows
from headrace.accuracy.published_case import Case, Excluded, case_of
from headrace.accuracy.published_metrics import (
    FamilyAccuracy,
    PredictedRow,
    accuracy_by_family,
    accuracy_of,
    figure_of,
    predict_case,
    predict_row,
)
from headrace.errors import HeadraceError
from headrace.machine.engine import CONSTANTS, PRESENT, Engine, engines
from headrace.machine.quantity import Quantity
from headrace.machine.unit_text import write_number

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "headrace"
FITTED_FAMILIES = {"resident", "tensor", "pipeline", "cpu"}
AS_WRITTEN = {"zero-inference", "flexgen", "airllm", "umbrella", "moe-offload"}
"""engines of streaming: the link at its textbook rate and how the software is written, nothing fitted"""
FREE = {
    # constant: lowest, highest, how far engines differ (standard deviation of the logarithm)
    "memory_share": (0.3, 0.95, 0.15),
    "compute_share": (0.2, 1.0, 0.25),
    "attention_share": (0.2, 0.9, 0.35),
    "quantised_share": (0.3, 1.0, 0.3),
    "layer_overhead_s": (1e-6, 600e-6, 0.7),
    "split_overhead_s": (0.1e-6, 6000e-6, 1.35),
    "pass_overhead_s": (0.05e-3, 40e-3, 0.9),
    "token_overhead_s": (0.1e-6, 500e-6, 0.9),
    "exchange_excess": (0.02, 1.5, 0.9),
    "across_overhead_s": (0.1e-6, 600e-6, 0.9),
}
LOOSENESS = 2.5
"""of the pull: chosen so that the rows fitted on are met as well as before; half or twice of it moves the error on
left-out sources by a point"""
UNSEEN = 5e-6
"""seconds per sequence, and per layer across computers, that an engine is drawn to: `present` has none"""
ROW_ERROR = 0.1
DOCUMENT_POWER = 0.7
SMALL = 1e-4
"""rounds off the corner of |x|"""
INSIDE = 0.92
NAMES = tuple(FREE)
LOW, HIGH = (np.log([bounds[end] for bounds in FREE.values()]) for end in (0, 1))
PULL = np.array([bounds[2] for bounds in FREE.values()]) * LOOSENESS
PRIOR = np.log([getattr(PRESENT, name).expected or UNSEEN for name in NAMES])


class Sample:
    """A case whose time is asked for again and again with other constants of its engine."""

    def __init__(self, case: Case) -> None:
        free = replace(PRESENT, spread=Quantity.of(1.0, "none"))
        constants, self.figure = figure_of(replace(case, scenario=replace(case.scenario, engine=free)))
        self.case = case
        self.engine = case.scenario.engine.name
        self.document = document_of(case.row)
        self.values = {name: constant.expected for name, constant in constants.items()}
        self.depends = [(at, f"engine.{name}") for at, name in enumerate(NAMES) if f"engine.{name}" in constants]

    def tells(self, at: int) -> bool:
        """Whether the time depends on this constant."""
        return any(at == depended for depended, _ in self.depends)

    def off(self, logs: np.ndarray) -> float:
        """Logarithm of predicted over measured time."""
        for at, name in self.depends:
            self.values[name] = math.exp(logs[at])
        ratio = math.log(self.figure(self.values) / self.case.row.value)
        return -ratio if self.case.row.unit == "tok/s" else ratio


def main() -> int:
    """Cross-validate, then fit on all rows and write, unless only the former is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", type=Path, nargs="?", default=ROOT / "tests/data/published_measurements.csv")
    parser.add_argument("--cross-validate", action="store_true")
    arguments = parser.parse_args()
    rows = read_rows(arguments.measurements)
    samples = [
        Sample(case) for case in cases_of(rows) if case.family in FITTED_FAMILIES and case.engine.name not in AS_WRITTEN
    ]
    folds = {document: fold(samples, rows, document) for document in sorted({document_of(row) for row in rows})}
    spread = calibrated(samples, folds)
    for known in folds.values():
        for name, engine in known.items():
            if engine is not PRESENT and name not in AS_WRITTEN:
                known[name] = replace(engine, spread=spread)
    judged = left_out(rows, folds)
    report = cross_validation(arguments.measurements, judged, samples, folds)
    sys.stdout.write(report)
    if arguments.cross_validate:
        return 0
    found = {name: replace(fit(name, members), spread=spread) for name, members in by_engine(samples).items()}
    write_engines(SOURCE / "machine" / "engines.toml", {**engines(), **found})
    (SOURCE / "accuracy" / "cross_validated.toml").write_text(report)
    return 0


def cases_of(rows: Iterable[Row]) -> list[Case]:
    """Rows of engines that an error can be said of and that do not queue."""
    found = []
    for row in rows:
        try:
            case = case_of(row)
        except (Excluded, HeadraceError):
            continue
        if case.estimate_only is None and row.metric != "ttft_serving":
            found.append(case)
    return found


def document_of(row: Row) -> str:
    """The source as a whole: one table, page or collection, whatever its rows and files are."""
    whole = row.source.split("; id=")[0]
    return "AlexsJones/llmfit" if whole.startswith("AlexsJones/llmfit") else whole


def by_engine(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Group, the engines in the order of their names; those without constants of their own are left out."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sample.engine):
        if sample.engine in engines():
            found[sample.engine].append(sample)
    return dict(found)


def by_document(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Group."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.document].append(sample)
    return dict(found)


# -- fit ----------------------------------------------------------------------------------------------------------


def fit(name: str, samples: list[Sample]) -> Engine:
    """Constants with their ranges; its spread is left to `calibrated`."""
    logs = solved(samples)
    documents = by_document(samples)
    alone = [(members, solved(members)) for members in documents.values() if len(members) >= 3]
    source = (
        f"{len(samples)} rows of {len(documents)} documents" if len(documents) > 1 else f"{len(samples)} rows of one"
    )
    constants = {}
    for at, constant in enumerate(NAMES):
        present: Quantity = getattr(PRESENT, constant)
        value = math.exp(logs[at])
        ends = [math.exp(each[at]) for members, each in alone if any(sample.tells(at) for sample in members)]
        if len(ends) < 2:
            ends = [present.low, present.high]
        told = any(sample.tells(at) for sample in samples)
        constants[constant] = (
            Quantity(digits(value), digits(min(value, *ends)), digits(max(value, *ends)), source) if told else present
        )
    return replace(engines()[name], **constants, link_share=PRESENT.link_share)


def digits(value: float) -> float:
    """Three significant ones."""
    return float(f"{value:.3g}")


def solved(samples: list[Sample]) -> np.ndarray:
    """Logarithms of the constants: least absolute errors drawn to `present`, by damped, reweighted least squares."""
    counts = Counter(sample.document for sample in samples)
    weights = np.array([counts[sample.document] ** (DOCUMENT_POWER - 1) for sample in samples]) / ROW_ERROR

    def loss(off: np.ndarray, logs: np.ndarray) -> float:
        return float((weights * np.sqrt(off**2 + SMALL)).sum() + (((logs - PRIOR) / PULL) ** 2).sum() / 2)

    def offs(logs: np.ndarray) -> np.ndarray:
        return np.array([sample.off(logs) for sample in samples])

    logs, off = PRIOR.copy(), offs(PRIOR)
    best, damping = loss(off, logs), 1e-2
    for _ in range(40):
        slopes = np.zeros((len(samples), len(NAMES)))
        for at in range(len(NAMES)):
            moved = logs.copy()
            step = 0.02 if logs[at] + 0.02 <= HIGH[at] else -0.02
            moved[at] += step
            slopes[:, at] = (offs(moved) - off) / step
        scaled = slopes.T * (weights / np.sqrt(off**2 + SMALL))
        curvature = scaled @ slopes + np.diag(PULL**-2.0)
        uphill = scaled @ off + (logs - PRIOR) / PULL**2
        before = best
        for _ in range(8):
            move = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), -uphill)
            tried = np.clip(logs + np.clip(move, -0.7, 0.7), LOW, HIGH)
            tried_off = offs(tried)
            if (tried_loss := loss(tried_off, tried)) < best - 1e-6:
                logs, off, best, damping = tried, tried_off, tried_loss, max(damping / 6, 1e-4)
                break
            damping *= 4
        if before - best < 1e-4 * max(1.0, best):
            break
    return logs


# -- judge --------------------------------------------------------------------------------------------------------


def fold(samples: list[Sample], rows: list[Row], document: str) -> dict[str, Engine]:
    """Engines that `document` names, as the other documents have them; PRESENT where none does."""
    named = {sample.engine for sample in samples if sample.document == document}
    named |= {case.engine.name for case in cases_named(rows, document)}
    rest = by_engine(sample for sample in samples if sample.document != document)
    found = {}
    for name in sorted(named & set(engines())):
        if name == "zero-inference":
            found[name] = as_others_tell(rows, document)
        elif name not in AS_WRITTEN:
            found[name] = fit(name, rest[name]) if name in rest else PRESENT
    return found


def cases_named(rows: list[Row], document: str) -> list[Case]:
    """Everything of one document that names an engine, times to the first token included."""
    found = []
    for row in rows:
        if document_of(row) == document:
            try:
                found.append(case_of(row))
            except (Excluded, HeadraceError):
                continue
    return found


def as_others_tell(rows: list[Row], document: str) -> Engine:
    """How ZeRO-Inference is written, as the rows of the other documents say: the best of eight ways."""
    others = [case for case in cases_of(rows) if case.family == "stream" and document_of(case.row) != document]
    others = [case for case in others if case.engine.name == "zero-inference"]
    known = engines()["zero-inference"]
    if not others:
        return PRESENT
    ways = [
        replace(known, overlaps_hops=hops, overlaps_copies=copies, quantised_share=share)
        for hops, copies, share in itertools.product(
            (True, False), (True, False), (PRESENT.quantised_share, known.quantised_share)
        )
    ]

    def error(engine: Engine) -> float:
        return sum(
            abs(math.log(predict_case(replace(case, engine=engine)).expected / case.row.value)) for case in others
        )

    return min(ways, key=error)


def calibrated(samples: list[Sample], folds: dict[str, dict[str, Engine]]) -> Quantity:
    """Return the factors on time, the nearest to one another, that bring enough left-out rows inside."""
    faster, slower, reach = [], [], []
    for sample in samples:
        engine = folds[sample.document].get(sample.engine, PRESENT)
        if engine is PRESENT or sample.case.family == "cpu":  # a host's own spread covers its rows
            continue
        found = predict_case(replace(sample.case, engine=replace(engine, spread=Quantity.of(1.0, "none"))))
        sign = -1 if sample.case.row.unit == "tok/s" else 1
        off = sign * math.log(sample.case.row.value / found.expected)
        ends = sorted(sign * math.log(end / found.expected) for end in (found.low, found.high))
        reach.append((off, -ends[0], ends[1]))
        faster.append(math.sqrt(max(0.0, off**2 - ends[0] ** 2)) if off < 0 else 0.0)
        slower.append(math.sqrt(max(0.0, off**2 - ends[1] ** 2)) if off > 0 else 0.0)
    narrowest = math.inf
    low = high = 0.0
    shares = np.arange(0.8, 1.0, 0.005)
    for down, up in itertools.product(np.quantile(faster, shares), np.quantile(slower, shares)):
        inside = [-math.hypot(less, down) <= off <= math.hypot(more, up) for off, less, more in reach]
        if sum(inside) >= INSIDE * len(inside) and down + up < narrowest:
            narrowest, low, high = float(down + up), float(down), float(up)
    source = f"holds {INSIDE:.0%} of {len(reach)} rows of sources left out whose engine another source knows"
    return Quantity(1.0, math.floor(math.exp(-low) * 100) / 100, math.ceil(math.exp(high) * 100) / 100, source)


def left_out(rows: list[Row], folds: dict[str, dict[str, Engine]]) -> list[PredictedRow]:
    """Predict every row with the engines that the other documents give; what has no engine is as it was."""
    found = []
    for row in rows:
        try:
            case = case_of(row)
            engine = folds[document_of(row)].get(case.engine.name)
            if engine is not None and case.family != "moe":
                if case.family == "cpu":
                    engine = replace(engine, spread=case.engine.spread)
                predicted = predict_case(replace(case, engine=engine))
                found.append(
                    PredictedRow(row=row, family=case.family, predicted=predicted, excluded=case.estimate_only)
                )
                continue
        except (Excluded, HeadraceError):
            pass
        found.append(predict_row(row))
    return found


# -- write --------------------------------------------------------------------------------------------------------


def cross_validation(
    measurements: Path, judged: list[PredictedRow], samples: list[Sample], folds: dict[str, dict[str, Engine]]
) -> str:
    """Lay out `accuracy/cross_validated.toml`."""
    counted = [sample for sample in samples if sample.case.family != "cpu"]
    unknown = {
        sample.case.row.id for sample in counted if folds[sample.document].get(sample.engine, PRESENT) is PRESENT
    }
    known = {sample.case.row.id for sample in counted} - unknown
    lines = [
        "# Written by bench/fit_engines.py: errors of published rows whose whole source was left out of the fit.",
        f'measurements_sha256 = "{hashlib.sha256(measurements.read_bytes()).hexdigest()}"',
    ]
    groups = [("family", item) for item in accuracy_by_family(judged)]
    for name, ids in (("engine known from another source", known), ("engine not known otherwise", unknown)):
        groups.append(("group", accuracy_of(name, [item for item in judged if item.row.id in ids])))
    for kind, item in groups:
        lines += ["", f"[[{kind}]]", *(f"{name} = {json.dumps(value)}" for name, value in fields_of(item).items())]
    return "\n".join(lines) + "\n"


def fields_of(item: FamilyAccuracy) -> dict[str, Any]:
    """Numbers with four digits; what is None is left out."""
    found = vars(item).items()
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in found if value is not None
    }


def write_engines(path: Path, found: dict[str, Engine]) -> None:
    """Write `machine/engines.toml`: names and switches as they stand, constants as fitted."""
    named = {raw["name"]: raw["named"] for raw in tomllib.loads(path.read_text())["engine"]}
    lines = [
        "# Engines by the names that sources give, written by bench/fit_engines.py (which says how). Names,",
        "# switches and the engines of streaming are kept as they stand. `source` holds where a constant names none.",
    ]
    for name, engine in found.items():
        source = engine.memory_share.source
        lines += [
            "",
            "[[engine]]",
            f'name = "{name}"',
            f"named = {json.dumps(named[name])}",
            f"source = {json.dumps(source)}",
        ]
        lines += [
            f"{switch} = {json.dumps(getattr(engine, switch))}" for switch in ("overlaps_hops", "overlaps_copies")
        ]
        lines += [f"{constant} = {entry(constant, getattr(engine, constant), source)}" for constant in CONSTANTS]
    path.write_text("\n".join(lines) + "\n")


def entry(name: str, constant: Quantity, source: str) -> str:
    """One constant as a table of its own."""
    kind = "time" if name.endswith("_s") else "share"
    ends = {"expected": constant.expected, "low": constant.low, "high": constant.high}
    parts = [f"{end} = {written(value, kind)}" for end, value in ends.items()]
    if constant.source != source:
        parts.append(f"source = {json.dumps(constant.source)}")
    return "{ " + ", ".join(parts) + " }"


def written(value: float, kind: str) -> str:
    """A share as a number, a time as a text with its unit."""
    if kind == "share":
        return repr(digits(value))
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= factor:
            return f'"{value / factor:.3g}{unit}"'
    return f'"{write_number(value, kind)}"' if value else '"0s"'


if __name__ == "__main__":
    sys.exit(main())
