"""Predicted against measured decode time over combinations of budget and batch.

    python bench/prediction.py --model DIR [--read-limit 700MB/s] [--raw]

Each combination is a fresh process that loads, predicts, generates and measures, as `headrace run` does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import headrace
from bench_report import table, write


def one(model_directory: Path, memory: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one combination in this process."""
    prompt_tokens, new_tokens = options.prompt_tokens, options.generate
    model = headrace.load(
        model_directory,
        memory=memory,
        batch=batch,
        prompt_tokens=prompt_tokens,
        max_tokens=prompt_tokens + new_tokens,
        dtype=options.dtype,
        read_limit=None if options.raw else options.read_limit,
    )
    ids = torch.randint(3, 30_000, (batch, prompt_tokens))
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )
    handle = model.headrace
    measured, predicted = handle.measured(), handle.prediction
    model.close()
    return {
        "memory": memory,
        "batch": batch,
        "compute_dtype": handle.plan.compute_dtype,
        "strategy": handle.plan.strategy.value,
        "resident_blocks": handle.plan.resident_blocks,
        "slots": handle.plan.slots,
        "binds": predicted.binds,
        "prefill_s": [predicted.prefill_s, measured.prefill_s],
        "decode_s": [predicted.decode_s_per_pass, measured.decode_s_per_pass],
        "peak_beyond_overhead_bytes": measured.peak_memory_bytes - measured.process_overhead_bytes,
        "budget_bytes": handle.plan.budget_bytes,
    }


def main() -> None:
    """Measure and write bench/results/prediction-{steady,raw}.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--memories", default="1000MB,1700MB,2400MB,3400MB")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--generate", type=int, default=7)
    parser.add_argument("--read-limit", default="700MB/s")
    parser.add_argument("--raw", action="store_true", help="no limit on the reader")
    parser.add_argument("--name", help="of the result files")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("MEMORY", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.model, options.one[0], int(options.one[1]), options)))
        return
    records = []
    for memory in options.memories.split(","):
        for batch in options.batches.split(","):
            command = [sys.executable, *sys.argv, "--one", memory, batch]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{memory}, batch {batch}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            records.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{memory}, batch {batch}: {records[-1]['decode_s']}", file=sys.stderr)
    errors = {kind: [abs(r[kind][0] / r[kind][1] - 1) for r in records] for kind in ("decode_s", "prefill_s")}
    rows = [
        [
            r["memory"],
            str(r["batch"]),
            f"{r['compute_dtype']}, {r['strategy']}, {r['resident_blocks']} resident, {r['slots']} slots",
            r["binds"],
            *(f"{value:.3f}" for value in r["decode_s"]),
            f"{100 * (r['decode_s'][0] / r['decode_s'][1] - 1):+.1f} %",
            *(f"{value:.2f}" for value in r["prefill_s"]),
            f"{r['peak_beyond_overhead_bytes'] / 1e6:.0f} of {r['budget_bytes'] / 1e6:.0f}",
        ]
        for r in records
    ]
    condition = "raw disk" if options.raw else f"read rate limited to {options.read_limit}"
    text = "\n".join(
        [
            f"# Prediction against measurement, {condition}, {len(records)} combinations of budget and batch",
            "",
            table(
                ["budget", "batch", "plan", "binds", "decode predicted s", "measured s", "error", "prefill predicted s",
                 "measured s", "peak MB beyond overhead, of budget"],
                rows,
            ),
            "",
            f"Decode: median error {100 * statistics.median(errors['decode_s']):.1f} %, largest "
            f"{100 * max(errors['decode_s']):.1f} %. Prefill: median "
            f"{100 * statistics.median(errors['prefill_s']):.1f} %, largest {100 * max(errors['prefill_s']):.1f} %.",
        ]
    )  # fmt: skip
    name = options.name or ("prediction-raw" if options.raw else "prediction-steady")
    write(name, {"rows": records, "condition": condition}, text, out=options.out)


if __name__ == "__main__":
    main()
