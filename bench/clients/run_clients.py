"""Give a streamed model to the libraries that take a transformers model, and compare with a resident one.

python bench/clients/run_clients.py --model DIR [--share 0.6] [--directory ENVIRONMENTS] [CLIENT ...]

DIR is an instruction-tuned checkpoint with its tokenizer; `headrace demo` fetches one. An environment of its own is
built first (bench/rivals/environments.py, requirements/clients.txt). Every client runs in a process of its own
(client.py), once with the weights resident and once with `share` of their bytes as the budget, both in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(BENCH), str(BENCH / "rivals")]

from environments import DEFAULT_DIRECTORY, ENVIRONMENTS, InstallError, install, python_of  # noqa: E402

import bench_report  # noqa: E402  # found on the path made above

CLIENTS = {
    "lm-eval": "log-likelihoods of answers and of whole texts",
    "pipeline": "texts of a chat and of a batch of prompts",
    "outlines": "one of several answers, and JSON of a schema",
    "peft": "logits under a LoRA adapter, and without it again",
    "langchain-huggingface": "answers of a chain, at once and as a stream",
}


def main() -> None:
    """Run the clients and write bench/results/clients; the exit status is 1 unless all agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(CLIENTS)} (default: all)")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.6, help="budget as a share of the weights (default: 0.6)")
    parser.add_argument("--directory", type=Path, default=DEFAULT_DIRECTORY, help="of environments (%(default)s)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    unknown = sorted(set(options.clients) - set(CLIENTS))
    if unknown:
        parser.error(f"no such client: {', '.join(unknown)}; there are {', '.join(CLIENTS)}")
    options.directory.mkdir(parents=True, exist_ok=True)
    try:
        install(ENVIRONMENTS["clients"], options.directory, jobs=1)
    except InstallError as error:
        sys.exit(f"no environment for the clients: {error}")
    found = {name: run(options, name) for name in options.clients or CLIENTS}
    rows = [
        [name, one.get("version", ""), CLIENTS[name], "equal" if one["equal"] else f"**no**: {one['why']}"]
        for name, one in found.items()
    ]
    streamed = next((one["streamed"] for one in found.values() if "streamed" in one), "nothing")
    text = (
        f"# Libraries that take a transformers model, {options.model.name} in float32\n\n"
        f"Streamed ({streamed}) against resident.\n\n"
        + bench_report.table(["client", "version", "compared", "streamed and resident"], rows)
    )
    bench_report.write("clients", {"model": options.model.name, "clients": found}, text, out=options.out)
    sys.exit(0 if all(one["equal"] for one in found.values()) else 1)


def run(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """What the client's own process says; an error is its last line."""
    done = subprocess.run(
        [
            *(python_of(options.directory, "clients"), Path(__file__).with_name("client.py"), name),
            *(options.model, str(options.share)),
        ],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HEADRACE_HISTORY": "",
            "HEADRACE_DEVICE": "cpu",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(BENCH.parent / "src"),
        },
    )
    if done.returncode:
        return {"equal": False, "why": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    main()
