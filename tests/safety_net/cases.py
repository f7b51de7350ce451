"""The commands whose answers are recorded: each needs nothing of the computer that it runs on.

`{checkpoints}` is where `checkpoints.py` writes, `{machines}` the folder here, `{data}` that of all tests. Every budget
that could come from the computer's own memory is given.
"""

from __future__ import annotations


def _plan(name: str, machine: str, options: str) -> str:
    return f"plan {{checkpoints}}/{name} --machine {{machines}}/{machine}.toml {options}"


_CHECKPOINTS = {
    # the CPU computes
    "llama-two-cores-1gb": _plan("llama-3gb", "two-cores", "--memory 1GB"),
    "llama-two-cores-one-slot": _plan("llama-3gb", "two-cores", "--memory 250MB"),
    "llama-two-cores-too-small": _plan("llama-3gb", "two-cores", "--memory 160MB"),
    "llama-two-cores-default-budget": _plan("llama-3gb", "two-cores", ""),
    "llama-two-cores-batch-prompt": _plan(
        "llama-3gb", "two-cores", "--memory 2500MB --batch 12 --prompt-tokens 500 --generate-tokens 64"
    ),
    "llama-two-cores-sequential-float32": _plan(
        "llama-3gb", "two-cores", "--memory 1500MB --strategy sequential --dtype float32"
    ),
    "llama-sixteen-cores-resident": _plan("llama-3gb", "sixteen-cores", "--memory 4GB --batch 4"),
    "llama-sixteen-cores-read-limit": _plan("llama-3gb", "sixteen-cores", "--memory 1GB --read-limit 500MB/s"),
    "gemma-two-cores-long-context": _plan(
        "gemma-3-12b", "two-cores", "--memory 6GB --prompt-tokens 4000 --generate-tokens 100"
    ),
    "gemma-sixteen-cores-4gb": _plan("gemma-3-12b", "sixteen-cores", "--memory 4GB --prompt-tokens 500"),
    "gemma-sixteen-cores-overlap": _plan("gemma-3-12b", "sixteen-cores", "--memory 16GB --strategy overlap --batch 3"),
    "mixtral-two-cores-too-small": _plan("mixtral-8x7b", "two-cores", "--memory 4GB"),
    "mixtral-sixteen-cores-30gb": _plan("mixtral-8x7b", "sixteen-cores", "--memory 30GB --prompt-tokens 500"),
    "gpt2-two-cores-2gb": _plan("gpt2-xl", "two-cores", "--memory 2GB"),
    "gpt2-sixteen-cores-batch": _plan("gpt2-xl", "sixteen-cores", "--memory 7500MB --batch 32 --prompt-tokens 200"),
    "gpt2-two-cores-context-refused": _plan("gpt2-xl", "two-cores", "--memory 2GB --prompt-tokens 2000"),
    # a GPU computes
    "llama-desktop-1gb": _plan("llama-3gb", "desktop", "--memory 1GB --host-memory 2GB"),
    "llama-desktop-resident": _plan("llama-3gb", "desktop", "--memory 8GB --host-memory 4GB --batch 16"),
    "llama-desktop-one-slot": _plan("llama-3gb", "desktop", "--memory 450MB --host-memory 8GB"),
    "llama-desktop-cpu-computes": _plan("llama-3gb", "desktop", "--device cpu --memory 1GB"),
    "llama-server-not-page-locked": _plan(
        "llama-3gb", "server", "--device cuda:1 --memory 1500MB --host-memory 1GB --prompt-tokens 500"
    ),
    "llama-server-cache-on-host": _plan(
        "llama-3gb", "server", "--memory 18GB --host-memory 60GB --batch 400 --prompt-tokens 300 --cache-on-host"
    ),
    "gemma-desktop-default-budget": _plan("gemma-3-12b", "desktop", "--prompt-tokens 500"),
    "gemma-desktop-cpu-layers": _plan("gemma-3-12b", "desktop", "--memory 8GB --host-memory 30GB --cpu-blocks"),
    "gemma-server-4gb": _plan("gemma-3-12b", "server", "--memory 4GB --host-memory 20GB"),
    "gemma-server-little-host": _plan("gemma-3-12b", "server", "--memory 10GB --host-memory 2GB --batch 8"),
    "gemma-server-too-small": _plan("gemma-3-12b", "server", "--memory 1GB --host-memory 20GB"),
    "mixtral-server-from-disk": _plan("mixtral-8x7b", "server", "--memory 40GB --host-memory 20GB"),
    "mixtral-server-batch": _plan(
        "mixtral-8x7b", "server", "--memory 60GB --host-memory 150GB --batch 64 --prompt-tokens 500"
    ),
    "gpt2-server-overlap": _plan("gpt2-xl", "server", "--memory 3GB --host-memory 2GB --strategy overlap"),
    "gpt2-desktop-bfloat16": _plan("gpt2-xl", "desktop", "--memory 3GB --host-memory 2GB --dtype bfloat16"),
    # both memories and the disk hold some: what is found depends on how far is searched
    "llama-desktop-searched": _plan("llama-3gb", "desktop", "--memory 600MB --host-memory 1200MB"),
    "gemma-desktop-searched": _plan("gemma-3-12b", "desktop", "--memory 5GB --host-memory 14GB"),
    "gemma-server-searched": _plan("gemma-3-12b", "server", "--memory 5GB --host-memory 6GB --cpu-blocks"),
    "gpt2-server-searched": _plan("gpt2-xl", "server", "--memory 2GB --host-memory 3GB --cpu-blocks"),
    "mixtral-server-searched": _plan(
        "mixtral-8x7b", "server", "--memory 30GB --host-memory 60GB --batch 64 --prompt-tokens 8"
    ),
}

_CATALOGUE = {
    "gpt-3-8xa100": "plan gpt-3 --machine 8xa100-80 --batch 64",
    "gpt-3-one-a100": "plan gpt-3 --machine a100 --batch 16 --sampling best-of:4",
    "gpt-3-1000-times": "plan 'gpt-3*1000' --machine 32x72xgb300",
    "llama-405b-int4-rtx-4090": "plan llama-3.1-405b --machine rtx-4090 --weights int4 --prompt-tokens 500",
    "llama-405b-two-nodes": "plan llama-3.1-405b --machine 2x8xh100 --batch 16 --prompt-tokens 2000",
    "llama-70b-8xh100": "plan llama-3.1-70b --machine 8xh100 --batch 32 --prompt-tokens 500 --generate-tokens 500",
    "llama-70b-drafts": "plan llama-3.1-70b --machine rtx-4090 --draft-tokens 4 --acceptance 0.8 --host-memory 60GB",
    "llama-8b-rtx-4090": "plan llama-3.1-8b --machine rtx-4090 --kv-bits 8",
    "llama-8b-tensor-refused": "plan llama-3.1-8b --machine rtx-4090 --strategy tensor",
    "llama-8b-m2-max": "plan llama-3.1-8b --machine m2-max --weights q4_k_m --batch 2",
    "mixtral-rtx-4090": "plan mixtral-8x7b --machine rtx-4090 --expert-hit-rate 0.5 --prompt-tokens 500",
    "deepseek-v3-8xh200": "plan deepseek-v3 --machine 8xh200 --batch 64 --prompt-tokens 500",
    "phi-3-l4-small": "plan phi-3-mini --machine l4 --memory 3GB --prompt-tokens 500",
    "gemma-tpu": "plan gemma-3-27b --machine 4xtpu-v5e --batch 8",
    # the two kinds of model and machine crossed
    "gpt-2-xl-two-cores": "plan gpt-2-xl --machine {machines}/two-cores.toml --memory 2GB",
    "llama-8b-sixteen-cores": "plan llama-3.1-8b --machine {machines}/sixteen-cores.toml --batch 4",
    "llama-8b-desktop": "plan llama-3.1-8b --machine {machines}/desktop.toml --memory 8GB --host-memory 20GB",
    "llama-70b-server-second-gpu": "plan llama-3.1-70b --machine {machines}/server.toml --device cuda:1 --weights int4",
    "llama-3gb-8xh100": "plan {checkpoints}/llama-3gb --machine 8xh100 --batch 64",
    "mixtral-config-h100": "plan {checkpoints}/mixtral-8x7b/config.json --machine h100 --batch 4",
    "gemma-checkpoint-int4-desktop": (
        "plan {checkpoints}/gemma-3-12b --machine {machines}/desktop.toml --weights int4 --memory 4GB "
        "--host-memory 30GB"
    ),
}

_OTHER = {
    "fleet-gpt-3": "fleet gpt-3 --machine 8xh100 --copies 1e6 --tokens-per-second 10 --slo 25 --max-first-token 2",
    "fleet-offline": "fleet llama-3.3-70b --machine 8xb200 --copies '8 billion' --tokens-per-second 10 --slo none",
    "fleet-one-copy": "fleet gpt-3 --machine 8xa100-80 --copies 1 --tokens-per-second 5 --training-tokens 300e9",
    "claims": "claims",
    "claim-set": "claims copies-llama70b --set 'readers=1 billion'",
    "accuracy-published": "accuracy --published {data}/published_measurements.csv",
    "model-deepseek-v3": "models deepseek-v3",
    "machine-8xh100": "machines 8xh100",
}


def _with_lengths(command: str) -> str:
    """The answers were recorded for 16 and 32 tokens where a command says nothing else."""
    said = command.split()
    lengths = (("--prompt-tokens", 16), ("--generate-tokens", 32))
    return " ".join([command, *(f"{option} {tokens}" for option, tokens in lengths if option not in said)])


CASES = {name: _with_lengths(command) for name, command in {**_CHECKPOINTS, **_CATALOGUE}.items()} | _OTHER
