"""Kill a batch job at random moments, again and again, and look whether anything was lost, doubled or wrong.

python bench/kills.py --model DIR [--requests 200] [--kills 50]

Every start is killed (SIGKILL) after a random time, most of them while answers are being written; the last one runs to
its end. The answers are compared with those of a job that was never broken off.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_report
from job_requests import make_requests


def main() -> None:
    """Kill, finish, compare, and write bench/results/kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--memory", default="230MB")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    draw = random.Random(3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "in.jsonl"
        lines = make_requests(options.requests, answer_tokens=(2, 10))
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))

        def command(target: Path) -> list[str]:
            words = [sys.executable, "-m", "headrace", "batch", str(options.model), str(source), str(target)]
            return [*words, "--memory", options.memory, "--dtype", "float32", "--in-flight", "4", "--json"]

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "HEADRACE_HISTORY": ""}
        target, whole = folder / "out.jsonl", folder / "whole.jsonl"
        kills = torn = early = 0
        answered = []
        while kills < options.kills:
            lines_before = _lines(target)
            process = subprocess.Popen(command(target), env=environment, **quiet)
            # Half of the kills a moment after the first new answer, the others at any time, start-up included.
            if kills % 2:
                while _lines(target) <= lines_before and process.poll() is None:
                    time.sleep(0.002)
                time.sleep(draw.random() * 0.3)
            else:
                time.sleep(draw.random() * 12)
            if process.poll() is not None:
                print(f"the job ended after {kills} kills", file=sys.stderr)
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            data = target.read_bytes() if target.exists() else b""
            torn += bool(data) and not data.endswith(b"\n")
            early += _lines(target) == lines_before
            answered.append(_lines(target))
            print(kills, _lines(target), file=sys.stderr, flush=True)
        for path in (target, whole):
            subprocess.run(command(path), check=True, env=environment, **quiet)
        found, expected = _texts(target), _texts(whole)
    missing = len(expected) - len(found)
    wrong = sum(found[name] != text for name, text in expected.items() if name in found)
    text = (
        f"# {kills} kills of a job of {options.requests} requests, {options.model.name}\n\n"
        f"{early} of them before a new answer was written, {torn} left an unfinished line. Answers in the end: "
        f"{len(found)} of {len(expected)}; missing {missing}, answered twice 0 (an error otherwise), other than in an "
        f"unbroken job {wrong}."
    )
    record = {"kills": kills, "early": early, "torn": torn, "missing": missing, "wrong": wrong, "answered": answered}
    bench_report.write("kills", record, text, out=options.out)
    if missing or wrong:
        raise SystemExit(1)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _texts(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in path.read_text().splitlines():
        line = json.loads(row)
        if line["custom_id"] in found:
            raise SystemExit(f"{line['custom_id']} was answered twice")
        found[line["custom_id"]] = json.dumps(line["response"]["body"]["choices"])
    return found


if __name__ == "__main__":
    main()
