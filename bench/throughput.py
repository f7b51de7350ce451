"""Tokens per second against sequences in flight: streamed at a part of the memory, and resident beside it.

python bench/throughput.py --model DIR [--flights 1,4,16,64,256] [--read-limit 700MB/s] [--share 0.5] [--dtype auto]

Each row is a job of `flight` requests that begin and end together, run by `headrace batch` once within `share` of
the weights' bytes at a steady read rate and once with everything resident. Figures are of full decode passes (medians).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench_report

PROMPT_TOKENS = 4


def run(options: argparse.Namespace, flight: int, strategy: str, memory: int, folder: Path) -> dict[str, Any]:
    """One job; its JSON report."""
    source, target = folder / f"in-{flight}.jsonl", folder / f"out-{flight}-{strategy}.jsonl"
    with source.open("w") as file:
        for number in range(flight):
            prompt = [3 + (number * 7 + place) % 1000 for place in range(PROMPT_TOKENS)]
            line = {"custom_id": str(number), "prompt": prompt, "max_tokens": options.tokens, "ignore_eos": True}
            file.write(json.dumps(line) + "\n")
    command = [sys.executable, "-m", "headrace", "batch", str(options.model), str(source), str(target)]
    command += [
        "--json",
        "--in-flight",
        str(flight),
        "--pass-tokens",
        str(PROMPT_TOKENS * flight),
        "--dtype",
        options.dtype,
    ]
    command += ["--memory", str(memory), "--strategy", strategy]
    if strategy != "resident":
        command += ["--read-limit", options.read_limit]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HEADRACE_HISTORY": ""})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    print(flight, strategy, found["measured"]["full_pass_s"], file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure, and write bench/results/throughput."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--flights", default="1,4,16,64,256")
    parser.add_argument("--read-limit", default="700MB/s")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    weights = sum(path.stat().st_size for path in options.model.glob("*.safetensors"))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for flight in (int(text) for text in options.flights.split(",")):
            streamed = run(options, flight, "overlap", int(weights * options.share), Path(name))
            resident = run(options, flight, "resident", int(weights * 1.2) + (3 << 30), Path(name))
            rows.append({"flight": flight, "streamed": streamed, "resident": resident})
    first_s = rows[0]["streamed"]["measured"]["full_pass_s"]
    lines, points = [], []
    for row in rows:
        flight = row["flight"]
        pass_s, resident_s = (row[kind]["measured"]["full_pass_s"] for kind in ("streamed", "resident"))
        forecast = row["streamed"]["predicted"]
        points.append({"flight": flight, "streamed_per_s": flight / pass_s, "resident_per_s": flight / resident_s})
        lines.append(
            [
                str(flight),
                f"{pass_s:.2f}",
                f"{flight / pass_s:.2f}",
                f"{first_s / pass_s:.2f}",
                f"{flight / resident_s:.2f}",
                f"{resident_s / pass_s:.2f}",
                f"{row['streamed']['measured']['total_s']:.1f}",
                f"{forecast['total_s']:.1f}",
                f"{row['streamed']['plan']['resident_blocks']}/{row['streamed']['plan']['num_blocks']}",
            ]
        )
    columns = (
        "in flight", "s per pass", "tokens/s", "of linear", "tokens/s resident", "of resident", "job s", "predicted s",
        "blocks kept",
    )  # fmt: skip
    title = (
        f"Sequences in flight, {options.model.name}, {options.share:.0%} of the weights' bytes, {options.read_limit}, "
    )
    text = f"# {title}{options.dtype}\n\n{bench_report.table(columns, lines)}"
    name = f"throughput-{options.dtype}"
    bench_report.write(name, {"rows": rows, "points": points}, text, out=options.out)
    _picture(points, (options.out or bench_report.RESULTS) / f"{name}.svg")


def _picture(points: list[dict[str, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    flights = [point["flight"] for point in points]
    axes.loglog(flights, [point["streamed_per_s"] for point in points], "o-", label="streamed")
    axes.loglog(flights, [point["resident_per_s"] for point in points], "s--", label="all resident")
    axes.loglog(flights, [points[0]["streamed_per_s"] * flight for flight in flights], ":", label="linear")
    axes.set_xlabel("sequences in flight")
    axes.set_ylabel("tokens per second")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
