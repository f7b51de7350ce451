"""Predictions against published measurements: a table by family, written to bench/results.

    python bench/published.py [MEASUREMENTS.csv]

Without a file the 658 rows in tests/data are taken. Nothing is timed: the result depends on the code alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import zlib
from collections import Counter, defaultdict
from pathlib import Path

from headrace.accuracy.published import read_rows
from headrace.accuracy.published_case import FAMILIES, Excluded, case_of
from headrace.accuracy.published_metrics import PredictedRow, accuracy_by_family, predict_row
from headrace.cli.published_report import report_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def main() -> int:
    """Predict, write published.json and published.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", type=Path, nargs="?", default=ROOT / "tests/data/published_measurements.csv")
    arguments = parser.parse_args()
    rows = [predict_row(row) for row in read_rows(arguments.measurements)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    RESULTS.mkdir(exist_ok=True)
    whole = {"commit": commit.strip(), **report_json(rows, accuracy_by_family(rows))}
    (RESULTS / "published.json").write_text(json.dumps(whole, indent=1) + "\n")
    (RESULTS / "published.md").write_text(markdown(rows, commit.strip()))
    sys.stdout.write((RESULTS / "published.md").read_text())
    return 0


def markdown(rows: list[PredictedRow], commit: str) -> str:
    """Lay the errors out by family, by engine (fitted and judged halves apart), and list what is not counted."""
    lines = [
        "# Predicted against published measurements",
        "",
        f"{len(rows)} rows, commit {commit}. Error: |predicted / measured - 1|. `python bench/published.py` makes it.",
        "",
        "| family | rows | excluded | median error | 90th percentile | inside the interval |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for item in accuracy_by_family(rows):
        lines.append(
            f"| {item.family} | {item.n} | {item.excluded} | {percent(item.median_abs_error)} | "
            f"{percent(item.p90_abs_error)} | {percent(item.inside_interval)} |"
        )
    inside = [item.inside for item in rows if item.inside is not None]
    lines += ["", f"Inside their interval: {percent(sum(inside) / len(inside))} of {len(inside)} rows with one.", ""]
    lines += by_engine(rows)
    reasons = Counter(item.excluded for item in rows if item.excluded is not None)
    lines += ["", "## Not counted among the errors", ""]
    lines += [f"- {count}: {reason}" for reason, count in reasons.most_common()]
    lines += ["", "## Farthest off", "", "| row | what | predicted (low - high) | measured |", "|---|---|--:|--:|"]
    worst = sorted((item for item in rows if item.error is not None), key=lambda item: -(item.error or 0))[:20]
    for item in worst:
        row, found = item.row, item.predicted
        if found is not None:
            lines.append(
                f"| {row.id} | {row.model}, {row.hardware.split(',')[0]}, {row.strategy}, {row.engine}, batch "
                f"{row.batch_text}, {row.metric} | {found.expected:.3g} ({found.low:.3g} - {found.high:.3g}) | "
                f"{row.value:g} {row.unit} |"
            )
    return "\n".join(lines) + "\n"


def by_engine(rows: list[PredictedRow]) -> list[str]:
    """Median errors of decode rows by engine: the half that constants were fitted on, and the half that judges."""
    halves: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for item in rows:
        if item.error is None or item.family not in FAMILIES[1:5]:
            continue
        try:
            name = case_of(item.row).engine.name
        except Excluded:
            continue
        halves[name][zlib.crc32(item.row.id.encode()) % 2].append(item.error)
    lines = [
        "## Engines: fitted on half of the rows, judged on the other",
        "",
        "| engine | fitted | median error | judged | median error |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, (fitted, judged) in sorted(halves.items()):
        lines.append(f"| {name} | {len(fitted)} | {middle(fitted)} | {len(judged)} | {middle(judged)} |")
    every = [[error for halves_of in halves.values() for error in halves_of[half]] for half in (0, 1)]
    lines.append(f"| all | {len(every[0])} | {middle(every[0])} | {len(every[1])} | {middle(every[1])} |")
    return lines


def middle(errors: list[float]) -> str:
    """Median as text."""
    return percent(statistics.median(errors)) if errors else ""


def percent(share: float | None) -> str:
    """Share as text."""
    return "" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    sys.exit(main())
