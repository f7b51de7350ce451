"""What every result says about where it comes from: machine, commit, versions, date; and how it is written down."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def provenance() -> dict[str, Any]:
    """Machine, commit, library versions and date of this run."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    flags = Path("/proc/cpuinfo").read_text()
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    names = ("torch", "transformers", "accelerate", "safetensors")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "src") else ""),
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "features": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name} " in flags],
        "memory": memory.split(":", 1)[1].strip(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def _git(*arguments: str) -> str:
    """What git says of the checkout that this file is in; nothing where there is no git, or no repository."""
    try:
        command = ["git", "-C", str(RESULTS.parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def write(name: str, record: dict[str, Any], text: str, *, out: Path | None = None, show: bool = True) -> None:
    """Write `name`.json and `name`.md under bench/results (or `out`) and print the text, unless not to `show` it."""
    directory = RESULTS if out is None else out
    directory.mkdir(parents=True, exist_ok=True)
    record = {**provenance(), **record}
    (directory / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    origin = (
        f"{record['processor']}, {record['cores']} cores ({', '.join(record['features'])}), {record['memory']}, kernel "
        f"{record['kernel']}; torch {record['versions']['torch']}, transformers {record['versions']['transformers']}; "
        f"commit {record['commit']}, {record['date']}."
    )
    (directory / f"{name}.md").write_text(f"{text}\n\n{origin}\n")
    if show:
        print(f"{text}\n\n{origin}")
