"""What the rival scripts share: one command line, one clock and one report, so that their numbers can be compared.

Every script is run by the python of its own environment, therefore nothing but numpy is imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from prompts import prompt_ids, vocabulary_size


@dataclass(frozen=True)
class Task:
    """One run as the command line asks for it."""

    model: Path
    batch: int
    prompt_tokens: int
    generate: int
    seed: int
    memory_bytes: int
    work_dir: Path
    report: Path
    started_at: float
    dtype: str
    threads: int
    extra: argparse.Namespace

    def prompts(self) -> list[list[int]]:
        """Return the token ids of the prompts, the same for every rival."""
        return prompt_ids(vocabulary_size(self.model), batch=self.batch, length=self.prompt_tokens, seed=self.seed)


def process_start_time() -> float:
    """When this process was started, in seconds since the epoch (the kernel counts in ticks since the boot)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks_after_boot = int(fields[19])
    with open("/proc/uptime") as file:
        uptime = float(file.read().split()[0])
    return time.time() - uptime + ticks_after_boot / os.sysconf("SC_CLK_TCK")


def argument_parser(description: str | None, *, dtypes: tuple[str, ...]) -> argparse.ArgumentParser:
    """Make the command line that all rivals have in common; a script may add options before `parse_task`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a safetensors checkpoint")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--generate", type=int, default=6, help="new tokens per sequence; no early stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-bytes", type=int, default=0, help="the limit that the run is under; 0 for none")
    parser.add_argument("--work-dir", type=Path, required=True, help="where the rival may write")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--started-at", type=float, help="start of the process (epoch); default: ask the kernel")
    parser.add_argument("--dtype", choices=dtypes, default=dtypes[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser


def parse_task(parser: argparse.ArgumentParser) -> Task:
    """Read the command line; complains about sizes that no rival can run."""
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model}: no config.json there")
    if min(options.batch, options.prompt_tokens, options.generate, options.threads) < 1:
        parser.error("--batch, --prompt-tokens, --generate and --threads must be at least 1")
    options.work_dir.mkdir(parents=True, exist_ok=True)
    return Task(
        model=options.model,
        batch=options.batch,
        prompt_tokens=options.prompt_tokens,
        generate=options.generate,
        seed=options.seed,
        memory_bytes=options.memory_bytes,
        work_dir=options.work_dir,
        report=options.report,
        started_at=process_start_time() if options.started_at is None else options.started_at,
        dtype=options.dtype,
        threads=options.threads,
        extra=options,
    )


@dataclass
class PassClock:
    """Collects when the model was ready, when generating began and when each pass's tokens were known."""

    task: Task
    loaded_at: float = 0.0
    began_at: float = 0.0
    token_times: list[float] = field(default_factory=list)

    def loaded(self) -> None:
        """Note that the model can be called from now on."""
        self.loaded_at = time.time()

    def begin(self) -> None:
        """Note that generating begins."""
        self.began_at = time.time()

    def token(self) -> None:
        """Note that one more pass is over: its token of each sequence is known."""
        self.token_times.append(time.time())

    def write_report(
        self, *, rival: str, version: str, tokens: list[list[int]], settings: dict[str, object] | None = None
    ) -> None:
        """Write the report; an error if the passes are not as many as were asked for, as the times would not fit."""
        task = self.task
        if len(self.token_times) != task.generate or any(len(row) != task.generate for row in tokens):
            raise SystemExit(
                f"{rival}: {len(self.token_times)} passes and {[len(row) for row in tokens]} tokens, "
                f"where {task.generate} of each were asked for"
            )
        decode = [later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False)]
        # The first decode pass is left out: it still pays for one-time work (compiled kernels, filling of caches).
        per_pass = statistics.median(decode[1:] or decode) if decode else None
        report = {
            "rival": rival,
            "version": version,
            "dtype": task.dtype,
            "batch": task.batch,
            "prompt_tokens": task.prompt_tokens,
            "generate": task.generate,
            "threads": task.threads,
            "start_to_first_token_s": self.token_times[0] - task.started_at,
            "load_s": self.loaded_at - task.started_at,
            "prefill_s": self.token_times[0] - self.began_at,
            "decode_s_per_pass": per_pass,
            "decode_s": decode,
            "tokens_per_s": task.batch / per_pass if per_pass else None,
            "tokens": tokens,
            "settings": settings or {},
        }
        task.report.parent.mkdir(parents=True, exist_ok=True)
        task.report.write_text(json.dumps(report, indent=1))
