"""How much of the shorter of loading and computing disappears behind the longer one.

    python bench/overlap.py --model DIR [--dtype float32] [--read-limit 1GB/s] [--memory 2000MB]

For each number of tokens per pass, interleaved in one process, medians over the rounds:
  load alone      the stream is drained block by block, nothing is computed
  compute alone   the same pass with all weights resident (a second model in the same process)
  overlap         a pass while the stream runs; efficiency = pass / max(load alone, compute alone)
  sequential      the same with overlap off: load, compute, drop
Pass times are cycles, start to start, in the steady state; the read rate is bounded by the reader's own limit, so
that the link is the same in every row.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import headrace
from bench_report import spread, table, write


def cycle_seconds(model: Any, ids: torch.Tensor, passes: int) -> list[float]:
    """Seconds from the start of one pass to the start of the next, one pass run beforehand."""
    starts = []
    with torch.inference_mode():
        for _ in range(passes + 2):
            starts.append(time.perf_counter())
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return [later - earlier for earlier, later in itertools.pairwise(starts)]


def drain_seconds(model: Any, passes: int) -> list[float]:
    """Seconds per pass when every block is waited for and given back at once."""
    stream = model.headrace.stream
    starts = []
    for _ in range(passes + 2):
        starts.append(time.perf_counter())
        for index in range(model.headrace.plan.num_blocks):
            stream.wait(index)
            stream.release(index)
    return [later - earlier for earlier, later in itertools.pairwise(starts)]


def main() -> None:
    """Measure and write bench/results/overlap-DTYPE.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--read-limit", default="1GB/s")
    parser.add_argument("--memory", default="2000MB")
    parser.add_argument("--tokens", default="1,8,32,128")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    counts = [int(text) for text in options.tokens.split(",")]
    common: dict[str, Any] = {"device": "cpu", "dtype": options.dtype}
    common |= {"prompt_tokens": max(counts), "max_tokens": max(counts) + 1}
    limited = {**common, "memory": options.memory, "read_limit": options.read_limit}
    resident = headrace.load(options.model, memory="16GB", strategy="resident", **common)
    overlapped = headrace.load(options.model, strategy="overlap", **limited)
    sequential = headrace.load(options.model, strategy="sequential", **limited)
    seconds: dict[int, dict[str, list[float]]] = {
        count: {"load": [], "compute": [], "overlap": [], "sequential": []} for count in counts
    }
    predicted = {}
    for count in counts:
        one = {**limited, "prompt_tokens": 2, "max_tokens": 3, "batch": count, "strategy": "overlap"}
        with headrace.load(options.model, **one) as model:
            predicted[count] = model.headrace.prediction
    for _ in range(options.rounds):
        for count in counts:
            ids = torch.randint(3, 30_000, (1, count))
            row = seconds[count]
            row["load"] += drain_seconds(overlapped, options.passes)
            row["compute"] += cycle_seconds(resident, ids, options.passes)
            row["overlap"] += cycle_seconds(overlapped, ids, options.passes)
            row["sequential"] += cycle_seconds(sequential, ids, options.passes)
    rows, records = [], []
    medians = {}
    for count in counts:
        middle = {name: statistics.median(values) for name, values in seconds[count].items()}
        medians[count] = middle
        bound = max(middle["load"], middle["compute"])
        records.append(
            {
                "tokens": count,
                **{f"{name}_s": spread(values) for name, values in seconds[count].items()},
                "overlap_ratio": middle["overlap"] / bound,
                "sequential_ratio": middle["sequential"] / bound,
                "predicted_break_even": predicted[count].break_even_tokens_per_pass,
            }
        )
        rows.append(
            [
                str(count),
                *(f"{middle[name]:.3f}" for name in ("load", "compute", "overlap")),
                f"**{middle['overlap'] / bound:.3f}**",
                f"{middle['sequential']:.3f}",
                f"{middle['sequential'] / bound:.3f}",
            ]
        )
    measured = measured_break_even(medians)
    plan = overlapped.headrace.plan
    text = "\n".join(
        [
            f"# Overlap, {options.dtype}, {plan.resident_blocks} of {plan.num_blocks} blocks resident, "
            f"{plan.streamed_bytes_per_pass / 1e9:.2f} GB per pass at {options.read_limit}",
            "",
            table(
                ["tokens per pass", "load alone s", "compute alone s", "overlap s", "ratio", "sequential s", "ratio"],
                rows,
            ),
            "",
            f"Break-even tokens per pass: measured {measured}, predicted (layer timed at each number of tokens) "
            + ", ".join(f"{predicted[count].break_even_tokens_per_pass:.0f} at {count}" for count in counts)
            + f". Medians of {options.rounds} x {options.passes} passes, interleaved.",
        ]
    )
    for model in (resident, overlapped, sequential):
        model.close()
    record = {"rows": records, "break_even_measured": measured, "settings": vars(options) | {"model": "", "out": ""}}
    write(f"overlap-{options.dtype}", record, text, out=options.out)


def measured_break_even(medians: dict[int, dict[str, float]]) -> str:
    """Where compute alone crosses load alone, interpolated linearly between the measured numbers of tokens."""
    counts = sorted(medians)
    gaps = {count: medians[count]["compute"] - medians[count]["load"] for count in counts}
    if gaps[counts[0]] >= 0:
        return f"below {counts[0]}"
    for low, high in itertools.pairwise(counts):
        if gaps[high] >= 0:
            return f"{low + (high - low) * -gaps[low] / (gaps[high] - gaps[low]):.0f}"
    return f"above {counts[-1]}"


if __name__ == "__main__":
    main()
