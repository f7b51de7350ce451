"""How near streaming comes to the best that fio reaches with direct reads of the same files, unthrottled.

    python bench/link.py --model DIR [--memory 1000MB]

Needs fio. In each round every fio setting and the streaming run take their turn; the figure is the median over the
rounds of (bytes per second while streaming / best fio setting of that round).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

import headrace
from bench_report import spread, table, write

FIO_SETTINGS = [(size, depth) for size in ("1M", "4M") for depth in (1, 4, 16)]


def fio_bytes_per_s(files: list[Path], block_size: str, depth: int, seconds: float) -> float:
    """One fio run: sequential direct reads over the files."""
    command = [
        "fio", "--name=read", f"--filename={':'.join(map(str, files))}", "--rw=read", f"--bs={block_size}",
        "--direct=1",
        "--ioengine=libaio", f"--iodepth={depth}", "--readonly", f"--runtime={seconds}", "--time_based",
        "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"])


def streamed_bytes_per_s(model: Any, ids: torch.Tensor, passes: int) -> tuple[float, float]:
    """Bytes per second over some steady passes, and bytes read per pass over bytes that do not fit."""
    import time

    handle = model.headrace
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        before, start = handle.stream.counters.bytes_read, time.perf_counter()
        for _ in range(passes):
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        read, elapsed = handle.stream.counters.bytes_read - before, time.perf_counter() - start
    return read / elapsed, read / passes / handle.plan.streamed_bytes_per_pass


def main() -> None:
    """Measure and write bench/results/link.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--memory", default="1000MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--fio-seconds", type=float, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if shutil.which("fio") is None:
        raise SystemExit("fio is not installed")
    files = sorted(options.model.glob("*.safetensors"))
    model = headrace.load(
        options.model, device="cpu", memory=options.memory, strategy="overlap", prompt_tokens=8, max_tokens=9
    )
    ids = torch.randint(3, 30_000, (1, 1))
    rates: dict[str, list[float]] = {f"fio {size} depth {depth}": [] for size, depth in FIO_SETTINGS}
    rates["headrace"] = []
    ratios, shares = [], []
    for _ in range(options.rounds):
        best = 0.0
        # Streaming between the two halves of fio's settings, so that neither has the quieter moments.
        for number, (size, depth) in enumerate(FIO_SETTINGS):
            if number == len(FIO_SETTINGS) // 2:
                rate, share = streamed_bytes_per_s(model, ids, options.passes)
                rates["headrace"].append(rate)
                shares.append(share)
            model.headrace.stream.check_integrity()
            fio = fio_bytes_per_s(files, size, depth, options.fio_seconds)
            rates[f"fio {size} depth {depth}"].append(fio)
            best = max(best, fio)
        ratios.append(rates["headrace"][-1] / best)
    model.close()
    rows = [
        [name, f"{statistics.median(values) / 1e9:.2f}", f"{min(values) / 1e9:.2f}-{max(values) / 1e9:.2f}"]
        for name, values in rates.items()
    ]
    text = "\n".join(
        [
            "# Link: bytes per second while streaming against fio's direct reads of the same files",
            "",
            table(["reader", "median GB/s", "min-max"], rows),
            "",
            f"Streaming over the best fio setting of the same round: **{statistics.median(ratios):.3f}** "
            f"({min(ratios):.3f}-{max(ratios):.3f}) in {options.rounds} rounds. Bytes read per pass over bytes that "
            f"do not fit: {statistics.median(shares):.4f} ({min(shares):.4f}-{max(shares):.4f}; a round may begin and "
            "end in the middle of a prefetched block).",
        ]
    )
    record = {"ratio": spread(ratios), "rates": {name: spread(values) for name, values in rates.items()}}
    write("link", record, text, out=options.out)


if __name__ == "__main__":
    main()
