"""From the command to the first token, and to the plan: headrace's second start beside those of others, taking turns.

    python bench/start.py --model DIR [--share 0.5] [--rounds 7] [--evict]
        [--llama-python ENV/bin/python --gguf FILE]

headrace runs in `--share` of the weights' bytes. Its first start measures and is told apart; later ones find what it
measured in a directory of this benchmark's own. transformers is a script of a few lines that loads everything resident;
llama.cpp maps the GGUF file that `rivals/to_gguf.py` made of the same checkpoint. Python and its libraries lie in the
page cache, as after any earlier start; with `--evict` the model's files do not.

What is timed ends with the first byte of text, seen from outside (llama.cpp: with the first token, as its script says).
CPU seconds, user and system, are those of the whole process. They tell more than seconds where other work goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench_report

BENCH = Path(__file__).resolve().parent
PROMPT = "The capital of France is"


class Run(NamedTuple):
    """One process: seconds until the first byte on standard output, or until its report's token; CPU seconds of all."""

    first_s: float
    cpu_s: float


class Contestant(NamedTuple):
    """A command; `report`: the file in which it says when its first token came, where that is not when it printed."""

    name: str
    command: Sequence[str]
    report: Path | None = None


def timed(contestant: Contestant, evicted: Sequence[Path]) -> Run:
    """Run the command once; raises CalledProcessError where it fails."""
    for path in evicted:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [*contestant.command]
    if contestant.report is not None:
        command += ["--started-at", repr(time.time())]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.read(1)
    first_s = time.perf_counter() - start
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    if contestant.report is not None:
        first_s = json.loads(contestant.report.read_text())["start_to_first_token_s"]
    return Run(first_s, usage.ru_utime + usage.ru_stime)


def contestants(options: argparse.Namespace, work: Path, memory_bytes: int) -> list[Contestant]:
    """headrace's run and plan, and the rivals that were asked for."""
    model, headrace = str(options.model), [sys.executable, "-m", "headrace"]
    memory = ["--memory", str(memory_bytes)]
    run = [*headrace, "run", model, *memory, "--prompt", PROMPT, "--no-chat", "--max-new-tokens", "1", "--greedy"]
    found = [
        Contestant("headrace run", run),
        Contestant("headrace plan", [*headrace, "plan", model, *memory]),
        Contestant("transformers", [sys.executable, str(BENCH / "rivals/first_token_transformers.py"), model, PROMPT]),
    ]
    if options.gguf is not None:
        report = work / "llama.json"
        script = [str(options.llama_python), str(BENCH / "rivals/llama_cpp_mmap.py"), "--model", model]
        few = ["--gguf", str(options.gguf), "--prompt-tokens", "5", "--generate", "1"]
        found.append(Contestant("llama.cpp", [*script, *few, "--work-dir", str(work), "--report", str(report)], report))
    return found


def overhead_bytes(run: Contestant) -> int:
    """Resident bytes of interpreter and libraries before any weight, as a run reads them from the operating system."""
    done = subprocess.run([*run.command, "--json"], capture_output=True, check=True)
    return int(json.loads(done.stdout)["measured"]["process_overhead_bytes"])


def main() -> None:
    """Parse the command line, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.5, help="of the weights' bytes that headrace may hold")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--evict", action="store_true", help="drop the model's files from the page cache first")
    parser.add_argument("--llama-python", type=Path, help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="the checkpoint as rivals/to_gguf.py wrote it")
    parser.add_argument("--name", default="start", help="of the result's files")
    parser.add_argument("--out", type=Path, help="directory of the result, in place of bench/results")
    options = parser.parse_args()
    files = [*options.model.glob("*.safetensors"), *([options.gguf] if options.gguf else [])]
    weights_bytes = sum(path.stat().st_size for path in options.model.glob("*.safetensors"))
    memory_bytes = int(options.share * weights_bytes)
    evicted = files if options.evict else []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HEADRACE_MEASURED": f"{folder}/measured", "HEADRACE_HISTORY": "", "HEADRACE_DEVICE": "cpu"}
        others = contestants(options, Path(folder), memory_bytes)
        runs: dict[str, list[Run]] = {}
        for own in others:
            first = timed(own, evicted)
            runs[own.name] = []
            if own.name.startswith("headrace"):
                runs[f"{own.name}, first start"] = [first]
        for number in range(options.rounds):
            turn = number % len(others)
            for own in (*others[turn:], *others[:turn]):
                runs[own.name].append(timed(own, evicted))
        overhead = overhead_bytes(others[0])
    record = summary(runs)
    rows = [[name, *(_with_ends(own[what]) for what in Run._fields), *_ratios(own)] for name, own in record.items()]
    text = "\n\n".join(
        [
            f"Start to first token (or to the plan) of {options.model.name}, {weights_bytes / 1e9:.3g} GB of weights, "
            f"headrace in {options.share:.0%} of them; {options.rounds} rounds, taking turns, the model's files "
            f"{'not ' if options.evict else ''}in the page cache; median [least, most].",
            bench_report.table(["", "seconds", "CPU seconds", "ratio to transformers", "of CPU seconds"], rows),
            f"Interpreter and libraries before any weight: {overhead / 1e6:.0f} MB.",
        ]
    )
    about = {"model": options.model.name, "memory_bytes": memory_bytes, "evicted": options.evict}
    bench_report.write(
        options.name, {**about, "process_overhead_bytes": overhead, "runs": record}, text, out=options.out
    )


def summary(runs: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """Medians and spreads; ratios to transformers are medians over the rounds, each of one round."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in runs.items():
        found[name] = {field: bench_report.spread([getattr(run, field) for run in own]) for field in Run._fields}
        if len(own) == len(runs["transformers"]):
            pairs = list(zip(own, runs["transformers"], strict=True))
            for field in Run._fields:
                found[name][f"{field}_ratio"] = bench_report.spread(
                    [getattr(run, field) / getattr(plain, field) for run, plain in pairs]
                )
    return found


def _with_ends(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} [{spread['min']:.2f}, {spread['max']:.2f}]"


def _ratios(own: dict[str, Any]) -> list[str]:
    return [_with_ends(own[key]) if key in own else "" for key in ("first_s_ratio", "cpu_s_ratio")]


if __name__ == "__main__":
    main()
