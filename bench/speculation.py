"""What drafts gain: tokens per pass and speed with prompt lookup, with a draft model, and plain, for kinds of text.

python bench/speculation.py --model DIR [--draft DIR] [--share 0.5] [--read-limit 500MB/s] [--rounds 2]

Summarising, code editing and free chat; greedy, float32; the ways take turns. Texts must be the same in all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_report

ARTICLE = (
    "The mill stood at the end of the valley for two hundred years. Its wheel was driven by a headrace, a narrow "
    "channel that left the river a mile above the mill. When the summer was dry the miller closed the gate at night "
    "and let the pond fill, so that in the morning there was water for four hours of work. In the year of the great "
    "flood the gate broke, and the miller rebuilt it with his own hands from the oak of a fallen tree."
)
CODE = (
    "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n    return "
    "area(width, height) * depth\n\n\ndef surface(width, height, depth):\n    top = area(width, height)\n    side = "
    "area(height, depth)\n    front = area(width, depth)\n    return 2 * (top + side + front)\n"
)
PROMPTS = {
    "summarising": f"Summarise this text in three sentences, in its own words.\n\n{ARTICLE}",
    "code editing": f"Rename width to w in this code and give the whole code back.\n\n{CODE}",
    "free chat": "Tell me what you would do on a rainy Sunday in a town that you do not know.",
}


def main() -> None:
    """Measure, and write bench/results/speculation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--share", type=float, default=0.75)
    parser.add_argument("--read-limit", default="500MB/s")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    weights = sum(path.stat().st_size for path in options.model.glob("*.safetensors"))
    ways = {"plain": [], "lookup": ["--draft", "lookup"]}
    if options.draft is not None:
        ways["draft model"] = ["--draft", str(options.draft)]
    rows, record = [], []
    for kind, prompt in PROMPTS.items():
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, extra in ways.items():
                found[way].append(run(options, prompt, int(weights * options.share), extra))
        plain = statistics.median(speed(item) for item in found["plain"])
        for way, reports in found.items():
            fast = statistics.median(speed(item) for item in reports)
            drafts = reports[0].get("drafts", {})
            same = all(item["text"] == found["plain"][0]["text"] for item in reports)
            predicted = drafts.get("predicted_tokens_per_s", reports[0]["predicted"]["tokens_per_s"])
            rows.append(
                [
                    kind,
                    way,
                    f"{drafts.get('tokens_per_pass', 1.0):.2f}",
                    f"{drafts.get('acceptance', 0.0):.0%}" if drafts else "",
                    f"{fast:.2f}",
                    f"{predicted:.2f}",
                    f"{fast / plain:.2f}",
                    "yes" if same else "no",
                ]
            )
        record.append({"kind": kind, "found": found})
    columns = (
        "text", "way", "tokens per pass", "drafts right", "tokens/s", "predicted", "times plain", "same text",
    )  # fmt: skip
    text = (
        f"# Drafts, {options.model.name}, float32, {options.share:.0%} of the weights' bytes, {options.read_limit}\n\n"
        f"{bench_report.table(columns, rows)}"
    )
    bench_report.write("speculation", {"kinds": record}, text, out=options.out)


def run(options: argparse.Namespace, prompt: str, memory: int, extra: list[str]) -> dict[str, Any]:
    """One run; its JSON report."""
    command = [
        sys.executable,
        "-m",
        "headrace",
        "run",
        str(options.model),
        "--prompt",
        prompt,
        "--json",
        "--device",
        "cpu",
    ]
    command += ["--memory", str(memory), "--dtype", "float32", "--max-new-tokens", str(options.tokens)]
    command += ["--read-limit", options.read_limit, *extra]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HEADRACE_HISTORY": ""})
    if done.returncode:
        raise SystemExit(done.stderr)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def speed(report: dict[str, Any]) -> float:
    """Tokens per second after the first."""
    return float(report["measured"]["tokens_per_s"])


if __name__ == "__main__":
    main()
