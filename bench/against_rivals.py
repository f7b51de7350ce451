"""Measure headrace and its rivals on one checkpoint, each under the same limits of all memory, page cache included.

    python bench/rivals/environments.py
    python bench/against_rivals.py --model DIR --total-bytes 1.6GiB,2.4GiB --batches 1,32 --out results.json

Every run is a fresh process in a memory control group of its own that starts from an empty page cache. In each round,
every configuration (limit and batch) is run by every rival, the order of the rivals turning by one from configuration
to configuration, so that a drift of the machine does not fall on one of them. What a rival needs once per checkpoint
(llama.cpp's GGUF, AirLLM's split files) is made beforehand and kept; DeepSpeed writes its swap files at every start,
which therefore counts as part of its start.

Needs root, for the control groups and for dropping the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory_cgroup import MemoryCgroup, MemoryCgroupError, why_unavailable

SCRIPTS = Path(__file__).resolve().parent / "rivals"
DEFAULT_ENVIRONMENTS = Path.home() / ".cache" / "headrace" / "bench-envs"
SUMMARIZED = (
    "decode_s_per_pass",
    "tokens_per_s",
    "start_to_first_token_s",
    "load_s",
    "prefill_s",
    "peak_bytes",
    "peak_anonymous_bytes",
    "agreement",
)
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True)
class Rival:
    """How one of the systems is run: its script, its environment, and what it needs beforehand."""

    script: str
    environment: str | None
    prepare: Callable[[Bench], list[str]] | None = None


@dataclass(frozen=True)
class Configuration:
    """What all rivals are asked to do."""

    total_bytes: int
    batch: int

    def label(self) -> str:
        """Short text for the table's head."""
        return f"{self.total_bytes / (1 << 30):.2f} GiB, batch {self.batch}"


class PrepareError(Exception):
    """What a rival needs beforehand could not be made; the text says why."""


@dataclass
class Bench:
    """The whole measurement, as the command line asks for it."""

    model: Path
    environments: Path
    headrace_python: Path
    work_dir: Path
    prompt_tokens: int
    generate: int
    seed: int
    timeout_s: float
    extra: dict[str, list[str]]

    def python(self, environment: str | None) -> Path:
        """Return the interpreter that runs a rival."""
        return self.headrace_python if environment is None else self.environments / environment / "bin" / "python"

    def prepared(self, kind: str) -> Path:
        """Where the once-made form of the checkpoint lies; the name tells checkpoints apart."""
        files = sorted(self.model.glob("*.safetensors"))
        facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return self.work_dir / "prepared" / f"{kind}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


def run_preparation(command: list[str | Path]) -> None:
    """Run a conversion without a limit; PrepareError with its last line of output if it fails."""
    done = subprocess.run([os.fspath(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise PrepareError(last_lines(done.stderr or done.stdout))


def prepare_gguf(bench: Bench) -> list[str]:
    """llama.cpp's form of the checkpoint, with the weights' own 16 bits."""
    target = bench.prepared("gguf").with_suffix(".gguf")
    if not target.is_file():
        run_preparation([bench.python("llama_cpp"), SCRIPTS / "to_gguf.py", bench.model, target])
    return ["--gguf", str(target)]


def prepare_airllm(bench: Bench) -> list[str]:
    """AirLLM's form of the checkpoint: a file per layer. It insists on a tokenizer, though none is used here."""
    if not (bench.model / "tokenizer.json").is_file():
        raise PrepareError("AirLLM opens no checkpoint without a tokenizer (see make_checkpoint.py --tokenizer-from)")
    target = bench.prepared("airllm")
    if not target.is_dir():
        unfinished = target.with_name(target.name + ".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        command: list[str | Path] = [bench.python("airllm"), SCRIPTS / "airllm_run.py", "--prepare"]
        command += ["--model", bench.model, "--shards", unfinished]
        command += ["--work-dir", bench.work_dir / "run", "--report", bench.work_dir / "none.json"]
        run_preparation(command)
        unfinished.rename(target)
    return ["--shards", str(target)]


RIVALS = {
    "headrace": Rival("headrace_run.py", None),
    "transformers-mmap": Rival("transformers_mmap.py", "huggingface"),
    "accelerate-disk": Rival("accelerate_disk.py", "huggingface"),
    "llama.cpp-mmap": Rival("llama_cpp_mmap.py", "llama_cpp", prepare_gguf),
    "deepspeed-nvme": Rival("deepspeed_nvme.py", "deepspeed"),
    "airllm": Rival("airllm_run.py", "airllm", prepare_airllm),
}


def parse_bytes(text: str) -> int:
    """`1.6GiB`, `900MB` or a plain number of bytes."""
    match = re.fullmatch(r"([0-9.]+)\s*([a-z]*)", text.strip().lower())
    try:
        return int(float(match[1]) * UNITS[match[2]])  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1.6GiB or 900MB") from None


def list_of(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Make an argument type for comma-separated values."""

    def parse(text: str) -> list[Any]:
        return [convert(part) for part in text.split(",") if part.strip()]

    return parse


def extra_arguments(text: str) -> tuple[str, list[str]]:
    """`RIVAL:--option value` of the command line."""
    name, _, options = text.partition(":")
    if name not in RIVALS or not options.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not RIVAL:OPTIONS with a rival of {', '.join(RIVALS)}")
    return name, options.split()


def last_lines(text: str, count: int = 3) -> str:
    """Return the end of a program's output on one line, where its error message usually is."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-count:])[-500:]


def drop_page_cache() -> None:
    """Let every run find the files uncached; dirty pages are written first, as those cannot be dropped."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


@contextlib.contextmanager
def sampled_anonymous_peak(group: MemoryCgroup) -> Iterator[list[int]]:
    """Watch the group's memory other than page cache; the list's only item is the most seen.

    The group's own peak says little of systems that map their weights: page cache fills any limit.
    """
    peak = [0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.25):
            peak[0] = max(peak[0], group.anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def measure(bench: Bench, name: str, configuration: Configuration, arguments: list[str]) -> dict[str, Any]:
    """One run under the limit; returns its report, or what became of it."""
    rival = RIVALS[name]
    run_dir = bench.work_dir / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    report_path, log_path = run_dir / "report.json", run_dir / "log.txt"
    command = [bench.python(rival.environment), SCRIPTS / rival.script, "--model", bench.model]
    command += ["--batch", configuration.batch, "--prompt-tokens", bench.prompt_tokens, "--generate", bench.generate]
    command += ["--seed", bench.seed, "--memory-bytes", configuration.total_bytes, "--work-dir", run_dir / "work"]
    command += ["--report", report_path, *arguments, *bench.extra.get(name, [])]
    drop_page_cache()
    result: dict[str, Any] = {}
    with MemoryCgroup(configuration.total_bytes) as group, open(log_path, "w") as log:
        with sampled_anonymous_peak(group) as anonymous_peak:
            started_at = time.time()
            process = group.popen(
                [str(part) for part in [*command, "--started-at", repr(started_at)]],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
            try:
                status = process.wait(bench.timeout_s)
            except subprocess.TimeoutExpired:
                status = None
                group.kill()
                process.wait()
        result["wall_s"] = time.time() - started_at
        result["peak_bytes"] = group.peak_bytes()
        result["peak_anonymous_bytes"] = anonymous_peak[0]
        result["oom_kills"] = group.oom_kills()
    if status == 0 and report_path.is_file():
        report: dict[str, Any] = json.loads(report_path.read_text())
        return {"outcome": "ok"} | result | report
    if result["oom_kills"]:
        return {"outcome": "killed: out of memory"} | result
    if status is None:
        return {"outcome": f"timeout after {bench.timeout_s:g} s"} | result
    reason = last_lines(log_path.read_text(errors="replace"))
    return {"outcome": f"failed with status {status}", "reason": reason} | result


def machine_description() -> dict[str, Any]:
    """Describe what the numbers depend on besides the programs."""
    cpu_info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        cpu_info.setdefault(key.strip(), value.strip())
    memory_kib = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1])  # type: ignore[index]
    return {
        "cpu": cpu_info.get("model name", platform.processor()),
        "cpu_flags": cpu_info.get("flags", cpu_info.get("Features", "")),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_kib << 10,
        "kernel": platform.release(),
        "architecture": platform.machine(),
    }


def commit() -> str:
    """Return the commit of this repository, marked where files differ from it; empty outside of one."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=SCRIPTS,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def agreement(run: dict[str, Any], earlier: list[dict[str, Any]], configuration: Configuration) -> dict[str, Any]:
    """Return the share of generated tokens that are those of the first run that succeeded on the same prompts.

    Below 1 is no error by itself: roundings differ, and where two tokens are nearly as likely they decide.
    """
    if run["outcome"] != "ok":
        return {}
    first = next(
        (other for other in earlier if other["outcome"] == "ok" and other["batch"] == configuration.batch), run
    )
    ours = [token for row in run["tokens"] for token in row]
    theirs = [token for row in first["tokens"] for token in row]
    return {"agreement": sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)}


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread over the rounds of one rival in one configuration."""
    good = [run for run in runs if run["outcome"] == "ok"]
    summary: dict[str, Any] = {"rounds": len(runs), "ok": len(good), "outcomes": sorted({r["outcome"] for r in runs})}
    for key in SUMMARIZED:
        values = [run[key] for run in good if run.get(key) is not None]
        if values:
            summary[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return summary


def table(names: list[str], configurations: list[Configuration], results: dict[str, Any]) -> str:
    """Write the summary as a Markdown table: seconds per token and sequence, start to first token, peaks."""
    lines = ["| system | " + " | ".join(configuration.label() for configuration in configurations) + " |"]
    lines.append("| --- |" + " --- |" * len(configurations))
    for name in names:
        cells: list[str] = []
        if skipped := results["skipped"].get(name):
            cells = [f"skipped: {skipped}", *["skipped"] * (len(configurations) - 1)]
        for configuration in configurations[len(cells) :]:
            summary = results["summary"].get(name, {}).get(configuration.label())
            cells.append(cell(summary) if summary else "not run")
        lines.append(f"| {name} | " + " | ".join(text.replace("|", "/") for text in cells) + " |")
    return "\n".join(lines)


def cell(summary: dict[str, Any]) -> str:
    """One cell of the table."""
    if not summary["ok"]:
        return ", ".join(summary["outcomes"])
    text = ""
    if decode := summary.get("decode_s_per_pass"):
        tokens = summary["tokens_per_s"]["median"]
        text += f"{decode['median']:.3f} s/pass ({decode['min']:.3f}-{decode['max']:.3f}), {tokens:.2f} tokens/s; "
    text += f"first token {summary['start_to_first_token_s']['median']:.1f} s; "
    text += f"peak {summary['peak_bytes']['median'] / (1 << 30):.2f} GiB"
    text += f" ({summary['peak_anonymous_bytes']['median'] / (1 << 30):.2f} anonymous)"
    if summary["agreement"]["min"] < 1:
        text += f"; {summary['agreement']['min']:.0%} of the tokens as the first system's"
    if summary["ok"] < summary["rounds"]:
        text += f"; {summary['ok']} of {summary['rounds']} rounds, else {', '.join(summary['outcomes'])}"
    return text


def why_skipped(bench: Bench, name: str) -> str | None:
    """Return the reason if a rival's environment isn't there."""
    rival = RIVALS[name]
    if rival.environment is None:
        probe = subprocess.run([bench.headrace_python, "-c", "import headrace"], capture_output=True, text=True)
        return None if not probe.returncode else f"{bench.headrace_python}: {last_lines(probe.stderr, 1)}"
    status_path = bench.environments / "environments.json"
    status = json.loads(status_path.read_text()).get(rival.environment, {}) if status_path.is_file() else {}
    if not status.get("installed", True):
        return f"not installable here: {status.get('reason')}"
    if not bench.python(rival.environment).exists():
        return f"no environment {rival.environment} in {bench.environments} (bench/rivals/environments.py makes it)"
    return None


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--envs", type=Path, default=DEFAULT_ENVIRONMENTS, help="default: %(default)s")
    parser.add_argument(
        "--headrace-python", type=Path, default=Path(sys.executable), help="interpreter that has headrace"
    )
    parser.add_argument("--work-dir", type=Path, help="scratch, on the disk to measure (default: beside the model)")
    parser.add_argument("--total-bytes", type=list_of(parse_bytes), default=[parse_bytes("1.6GiB")])
    parser.add_argument("--batches", type=list_of(int), default=[1])
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--generate", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rivals", type=list_of(str), default=list(RIVALS), help=f"default: {','.join(RIVALS)}")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds per run (default: %(default)s)")
    parser.add_argument(
        "--option",
        type=extra_arguments,
        action="append",
        default=[],
        metavar="RIVAL:OPTIONS",
        help="further options of one rival's script, such as 'deepspeed-nvme:--buffers 3'",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all runs")
    options = parser.parse_args()
    unknown = sorted(set(options.rivals) - set(RIVALS))
    if unknown:
        parser.error(f"no such rival: {', '.join(unknown)}; there are {', '.join(RIVALS)}")
    if not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model}: no config.json there")
    if reason := why_unavailable():
        parser.error(reason)
    if not os.access("/proc/sys/vm/drop_caches", os.W_OK):
        parser.error("the page cache cannot be dropped: run as root")
    return options


def main() -> None:
    """Run all rounds, writing the results after each run, and print the table."""
    options = parse_arguments()
    extra: dict[str, list[str]] = {}
    for name, words in options.option:
        extra.setdefault(name, []).extend(words)
    model = options.model.resolve()
    bench = Bench(
        model=model,
        environments=options.envs.absolute(),
        # Not resolved: through a link into a virtual environment the interpreter would lose its packages.
        headrace_python=options.headrace_python.absolute(),
        work_dir=(options.work_dir or model.parent / "rivals-work").resolve(),
        prompt_tokens=options.prompt_tokens,
        generate=options.generate,
        seed=options.seed,
        timeout_s=options.timeout,
        extra=extra,
    )
    bench.work_dir.mkdir(parents=True, exist_ok=True)
    configurations = [Configuration(total, batch) for total in options.total_bytes for batch in options.batches]
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine_description(),
        "model": {
            "name": model.name,
            "config": json.loads((model / "config.json").read_text()),
            "weight_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        },
        "prompt_tokens": bench.prompt_tokens,
        "generate": bench.generate,
        "seed": bench.seed,
        "timeout_s": bench.timeout_s,
        "options": extra,
        "versions": {},
        "skipped": {},
        "runs": [],
        "summary": {},
    }
    arguments: dict[str, list[str]] = {}
    for name in options.rivals:
        reason = why_skipped(bench, name)
        if reason is None:
            try:
                prepare = RIVALS[name].prepare
                arguments[name] = prepare(bench) if prepare else []
            except PrepareError as error:
                reason = str(error)
        if reason is not None:
            results["skipped"][name] = reason
            print(f"{name}: skipped: {reason}", file=sys.stderr)
    try:
        run_rounds(bench, options, configurations, arguments, results)
    finally:
        shutil.rmtree(bench.work_dir / "run", ignore_errors=True)
    print(table(options.rivals, configurations, results))


def run_rounds(
    bench: Bench,
    options: argparse.Namespace,
    configurations: list[Configuration],
    arguments: dict[str, list[str]],
    results: dict[str, Any],
) -> None:
    """All runs, interleaved; the results file is whole after each, so that an interruption loses one run at most."""
    names = list(arguments)
    for round_index in range(options.rounds):
        for index, configuration in enumerate(configurations):
            turn = (round_index * len(configurations) + index) % max(len(names), 1)
            for name in names[turn:] + names[:turn]:
                run = measure(bench, name, configuration, arguments[name])
                run = {"rival": name, "round": round_index, "limit_bytes": configuration.total_bytes} | run
                run |= agreement(run, results["runs"], configuration)
                run |= {"rival": name, "batch": configuration.batch, "configuration": configuration.label()}
                results["runs"].append(run)
                if "version" in run:
                    results["versions"][name] = run["version"]
                results["summary"].setdefault(name, {})[configuration.label()] = summarize(
                    [
                        other
                        for other in results["runs"]
                        if other["rival"] == name and other["configuration"] == configuration.label()
                    ]
                )
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(results, indent=1))
                speed = f", {run['decode_s_per_pass']:.3f} s/pass" if run.get("decode_s_per_pass") else ""
                reason = f": {run['reason']}" if "reason" in run else ""
                print(
                    f"round {round_index + 1}, {configuration.label()}, {name}: {run['outcome']}{speed}{reason}",
                    file=sys.stderr,
                    flush=True,
                )


if __name__ == "__main__":
    try:
        main()
    except MemoryCgroupError as error:
        sys.exit(f"against_rivals: {error}")
