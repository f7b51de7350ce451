"""The same job of requests for headrace and its rivals, each under the same limit of all memory, page cache included.

python bench/batch_against_rivals.py --model DIR [--requests 96] [--total-bytes 1717986918] [--batches 32,64,96]
    [--gguf FILE --llama-python PYTHON]

accelerate offloads to disk with the best of the fixed batches (`--batches`), llama.cpp maps its file and has as many
slots. Prompts have 8 to 48 tokens and answers 4 to 32, past any end token. Needs root, for the memory control group.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_report
from memory_cgroup import MemoryCgroup

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run every contestant by turns, and write bench/results/batch-rivals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--total-bytes", type=int, default=int(1.6 * (1 << 30)))
    parser.add_argument("--batches", default="32,64,96")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    draw = random.Random(5)
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    rows, record = [], []
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "in.jsonl"
        with source.open("w") as file:
            for number in range(options.requests):
                prompt = [draw.randrange(3, vocabulary) for _ in range(draw.randint(8, 48))]
                line = {"custom_id": str(number), "prompt": prompt, "max_tokens": draw.randint(4, 32)}
                file.write(json.dumps({**line, "ignore_eos": True}) + "\n")
        commands: list[tuple[str, list[str]]] = []
        words = [sys.executable, "-m", "headrace", "batch", str(options.model), str(source)]
        commands.append(("headrace", [*words, str(Path(name) / "out.jsonl"), "--json"]))
        for batch in options.batches.split(","):
            script = [sys.executable, str(HERE / "rivals" / "job_accelerate.py"), "--model", str(options.model)]
            commands.append((f"accelerate, batch {batch}", [*script, "--requests", str(source), "--batch", batch]))
            if options.gguf is not None:
                script = [str(options.llama_python), str(HERE / "rivals" / "job_llama_cpp.py")]
                script += ["--gguf", str(options.gguf), "--vocabulary", str(vocabulary), "--slots", batch]
                commands.append((f"llama.cpp, {batch} slots", [*script, "--requests", str(source)]))
        for label, command in commands:
            found = run(command, options.total_bytes)
            record.append({"label": label, **found})
            print(label, {key: found[key] for key in ("total_s", "wall_s", "failed")}, file=sys.stderr, flush=True)
    own = next(item for item in record if item["label"] == "headrace")
    for item in record:
        if item["failed"]:
            rows.append([item["label"], item["failed"], "", "", ""])
            continue
        rows.append(
            [
                item["label"],
                f"{item['total_s']:.1f}",
                f"{item['generated'] / item['total_s']:.2f}",
                f"{item['total_s'] / own['total_s']:.2f}" if not own["failed"] else "",
                f"{item['wall_s']:.1f}",
            ]
        )
    columns = ("", "s for the job", "answer tokens/s", "times headrace", "s with start")
    text = (
        f"# {options.requests} requests, {options.model.name}, {options.total_bytes / (1 << 30):.2f} GiB in all\n\n"
        f"{bench_report.table(columns, rows)}"
    )
    bench_report.write("batch-rivals", {"runs": record}, text, out=options.out)


def run(command: list[str], total_bytes: int) -> dict[str, Any]:
    """Run in a fresh group from an empty page cache."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    begun = time.perf_counter()
    with MemoryCgroup(total_bytes) as group:
        process = group.popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HEADRACE_HISTORY": "", "PYTHONPATH": ""},
        )
        output, errors = process.communicate()
        wall_s = time.perf_counter() - begun
        if process.returncode:
            why = f"killed for memory ({group.oom_kills()})" if group.oom_kills() else errors.strip()[-300:]
            return {"failed": why, "total_s": 0.0, "generated": 0, "wall_s": wall_s}
    found = json.loads(output[output.index("{") :])
    if "measured" in found:
        total_s, generated = found["measured"]["total_s"], found["measured"]["generated_tokens"]
        return {"failed": "", "total_s": total_s, "generated": generated, "wall_s": wall_s, "report": found}
    return {"failed": "", "wall_s": wall_s, **found}


if __name__ == "__main__":
    main()
