"""Models of any transformers config at real size, streamed inside a memory cgroup beside transformers' own answer.

    python bench/any_model.py DIR [--shapes NAME ...] [--share 0.5] [--read-limit 300MB/s] [--repeat 3]

For each shape of SHAPES a checkpoint of random weights is written under DIR, in the names that transformers would save
(experts one by one where it saves them so), a tensor at a time. A child process runs it inside a cgroup whose limit is
the budget, what the process held beside it in a first run, and a margin: the kernel ends whatever takes more. Another
process, without a limit, computes the same with transformers' resident model; logits of the prefill and of every decode
pass are compared bit for bit. The reader is held to a rate that the disk always reaches, so that other work on the
machine disturbs less. `--config FILE` adds a config.json of any type.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

import headrace
from bench_report import spread, table, write
from disturbance import Others
from headrace.inference.api import describe_plan
from headrace.inference.skeleton import build_without_weights
from headrace.inference.transformers_seam import ties_of
from headrace.units import parse_size
from make_checkpoint import Named, write_tensors
from memory_cgroup import MemoryCgroup

MARGIN_BYTES = 48 << 20
"""page cache, page tables and what the kernel itself charges to the group"""
ROOMY_BYTES = 4 << 30
SAMPLE_S = 0.004

DEEPSEEK = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 18,
    "first_k_dense_replace": 1,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "vocab_size": 32768,
}
QWEN = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "vocab_size": 65536,
    "tie_word_embeddings": True,
}
BAMBA = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 14,
    "attn_layer_indices": [4, 9],
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "mamba_n_heads": 64,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "vocab_size": 32768,
}
GPT_OSS = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "sliding_window": 128,
    "vocab_size": 65536,
}
GEMMA = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 14,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 128,
    "vocab_size": 65536,
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek_v3": DEEPSEEK,
    "qwen3_5_text": QWEN,
    "bamba": BAMBA,
    "gpt_oss": GPT_OSS,
    "gemma3_text": GEMMA,
}
"""model type -> what differs from the defaults of its config; each some 2 GB in 16 bits"""


def saved_tensors(config: Any) -> Iterator[Named]:
    """Names and dimensions of the tensors that `save_pretrained` would leave of a model with this config."""
    model = build_without_weights(config, torch.bfloat16)
    tied = ties_of(model)
    state = {
        name: torch.empty(tensor.shape, device="meta")
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    for name, tensor in revert_weight_conversion(model, state).items():
        yield name, tuple(tensor.shape)


def make(directory: Path, config: Any) -> int:
    """Write the checkpoint, unless it is there; returns the bytes of its weights."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        fields = {**config.to_dict(), "dtype": "bfloat16"}
        tensors = list(saved_tensors(config))
        write_tensors(directory, tensors, fields, shard_bytes=1_000_000_000, seed=0, fast=True)
    return int(json.loads(index.read_text())["metadata"]["total_size"])


def prompt_of(options: argparse.Namespace) -> torch.Tensor:
    """The same random ids in every process."""
    return torch.randint(3, 30_000, (options.batch, options.prompt), generator=torch.Generator().manual_seed(7))


def generate(model: Any, options: argparse.Namespace) -> Any:
    """Decode greedily to the end; the logits of every pass as numbers of 16 or 32 bits."""
    ids = prompt_of(options)
    model.generation_config.eos_token_id = None
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=options.generate,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(answer.logits).float().numpy()


def resident(directory: Path, options: argparse.Namespace) -> None:
    """In this process: transformers' own model, all of it in memory."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    np.save(directory / "resident.npy", generate(model, options))


def streamed(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """In this process: load, predict, generate, measure."""
    others = Others()
    with headrace.load(
        directory,
        device="cpu",
        memory=options.budget,
        dtype="bfloat16",
        batch=options.batch,
        prompt_tokens=options.prompt,
        max_tokens=options.prompt + options.generate,
        read_limit=options.read_limit,
        fresh=True,
    ) as model:
        logits = generate(model, options)
        handle = model.headrace
        measured, predicted, plan = handle.measured(), handle.prediction, handle.plan
    np.save(directory / "streamed.npy", logits)
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    mapped = sum(int(words[1]) << 10 for words in lines if words and words[0] in ("RssFile:", "RssShmem:"))
    return {
        "plan": describe_plan(plan),
        "memory": plan.memory._asdict(),
        "planned_bytes": plan.memory.total_bytes,
        "binds": predicted.binds,
        "load_s": measured.load_s,
        "prefill_s": [predicted.prefill_s, measured.prefill_s],
        "decode_s": [predicted.decode_s_per_pass, measured.decode_s_per_pass],
        "held_bytes": measured.peak_memory_bytes - measured.process_overhead_bytes,
        "overhead_bytes": measured.process_overhead_bytes,
        # Pages of files are shared with other processes and come late; without them it is what the cgroup is charged.
        "anonymous_overhead_bytes": measured.process_overhead_bytes - mapped,
        "others_processors": others.processors(),
        "notes": handle.notes,
    }


def child(role: str, directory: Path, options: argparse.Namespace, limit_bytes: int | None) -> dict[str, Any]:
    """Run a role of this script in a process of its own, inside a cgroup where there is a limit."""
    command = [sys.executable, __file__, str(directory), "--role", role]
    for name in ("batch", "prompt", "generate", "budget", "read_limit"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    peak, over = 0, threading.Event()
    with nullcontext() if limit_bytes is None else MemoryCgroup(limit_bytes, name="any-model") as group:
        start = subprocess.Popen if group is None else group.popen
        process = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        def watch() -> None:
            nonlocal peak
            while group is not None and not over.wait(SAMPLE_S):
                peak = max(peak, group.anonymous_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        out, error = process.communicate()
        over.set()
        watcher.join()
        kills = 0 if group is None else group.oom_kills()
    if process.returncode:
        return {"failed": f"status {process.returncode}, {kills} killed for memory: {error[-1500:]}", "kills": kills}
    answer: dict[str, Any] = json.loads(out.splitlines()[-1]) if role == "streamed" else {}
    return {**answer, "limit_bytes": limit_bytes, "peak_anonymous_bytes": peak, "kills": kills}


def one_model(directory: Path, config: Any, options: argparse.Namespace) -> dict[str, Any]:
    """All of one model: checkpoint, resident answer, a roomy run, runs under the limit."""
    weights_bytes = make(directory, config)
    options.budget = int(options.share * weights_bytes)
    record = {
        **{name: getattr(options, name) for name in ("share", "batch", "prompt", "generate", "read_limit")},
        "model_type": config.model_type,
        "weights_bytes": weights_bytes,
        "budget_bytes": options.budget,
    }
    say(f"{directory.name}: {weights_bytes / 1e9:.2f} GB, budget {options.budget / 1e9:.2f} GB")
    runs: list[dict[str, Any]] = []
    record["runs"] = runs
    overhead = parse_size(options.overhead) if options.overhead else ROOMY_BYTES
    for _ in range(options.repeat + (0 if options.overhead else 1)):
        runs.append(child("streamed", directory, options, options.budget + overhead + MARGIN_BYTES))
        say(runs[-1])
        if "failed" in runs[-1]:
            break
        if not options.overhead:
            overhead = max(run["anonymous_overhead_bytes"] for run in runs)
    if options.compare and "failed" not in runs[-1]:
        failed = child("resident", directory, options, None).get("failed")
        record["equal"] = failed or compare(directory)
        say(record["equal"])
    return record


def compare(directory: Path) -> dict[str, Any]:
    """The logits that the two processes left."""
    own, want = (np.load(directory / f"{name}.npy") for name in ("streamed", "resident"))
    return {
        "passes": len(want),
        "passes_equal": int(sum(np.array_equal(a, b) for a, b in zip(own, want, strict=True))),
        "finite": bool(np.isfinite(want).all()),
        "largest_difference": float(np.abs(own - want).max()),
        "spread_of_logits": float(want.std()),
    }


def describe(records: list[dict[str, Any]]) -> str:
    """The table."""
    rows = []
    for record in records:
        runs = [run for run in record["runs"] if "failed" not in run]
        equal = record.get("equal")
        if not runs or len(runs) < len(record["runs"]):
            rows.append([record["model_type"], *["-"] * 8, record["runs"][-1]["failed"].splitlines()[-1]])
            continue
        held = max(run["peak_anonymous_bytes"] - run["anonymous_overhead_bytes"] for run in runs)
        rows.append(
            [
                record["model_type"],
                f"{record['batch']} x {record['prompt']} + {record['generate']}",
                f"{record['weights_bytes'] / 1e9:.2f} GB",
                runs[-1]["plan"].split(", ")[0],
                f"{record['budget_bytes'] / 1e6:.0f} MB",
                f"{held / 1e6:.0f} MB",
                *(error_of(runs, key) for key in ("decode_s", "prefill_s")),
                f"{statistics.median(run['others_processors'] for run in runs):.2f}",
                f"{equal['passes_equal']} of {equal['passes']} passes equal" if isinstance(equal, dict) else str(equal),
            ]
        )
    columns = ["model type", "sequences x prompt + new", "weights", "plan", "budget", "most held", "decode"]
    columns += ["first pass", "others' processors", "logits"]
    limits = ", ".join(sorted({record["read_limit"] for record in records}))
    return (
        f"# Any model at real size, under a memory cgroup, reader limited to {limits}\n\n"
        "Most held: anonymous memory charged to the cgroup at its peak, less what the process held before any weight; "
        "the last run of each was under a limit of budget, that overhead and "
        f"{MARGIN_BYTES >> 20} MiB. Decode and first pass: predicted / measured seconds, medians over the runs; the "
        "error of the medians (least to greatest of single runs). Others' processors: how many of this machine's other "
        f"work kept busy meanwhile. Logits: against transformers' resident model, bit for bit.\n\n"
        + table(columns, rows)
    )


def error_of(runs: list[dict[str, Any]], key: str) -> str:
    """Predicted and measured, medians, and how far apart."""
    predicted, measured = (statistics.median(run[key][side] for run in runs) for side in (0, 1))
    errors = spread([run[key][0] / run[key][1] - 1 for run in runs])
    error = predicted / measured - 1
    return f"{predicted:.2f} / {measured:.2f}, {error:+.1%} ({errors['min']:+.1%} to {errors['max']:+.1%})"


def say(what: Any) -> None:
    """Tell how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line; run all models, or one role of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--config", type=Path, nargs="*", default=[], help="config.json of further models")
    parser.add_argument("--share", type=float, default=0.5, help="budget over bytes of the weights")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=192)
    parser.add_argument("--generate", type=int, default=8)
    parser.add_argument("--read-limit", default="300MB/s")
    parser.add_argument("--repeat", type=int, default=2, help="runs under the limit")
    parser.add_argument("--overhead", help="what the process holds beside the budget; not given: found in a first run")
    parser.add_argument("--compare", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="where results go; default bench/results")
    parser.add_argument("--name", default="any-model")
    parser.add_argument("--notes", default="")
    parser.add_argument("--role", choices=("resident", "streamed"), help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if options.role == "resident":
        resident(options.directory, options)
    elif options.role == "streamed":
        print(json.dumps(streamed(options.directory, options)))
    else:
        run_all(options)


def run_all(options: argparse.Namespace) -> None:
    """Run the models that are asked for, and write down all that the directory holds results of."""
    configs = {name: AutoConfig.for_model(name, **ENDS, **SHAPES[name]) for name in options.shapes}
    configs |= {path.parent.name: AutoConfig.from_pretrained(path.parent) for path in options.config}
    for name, config in configs.items():
        record = one_model(options.directory / name, config, options)
        (options.directory / name / "record.json").write_text(json.dumps(record))
    records = [json.loads(path.read_text()) for path in sorted(options.directory.glob("*/record.json"))]
    text = describe(records) + (f"\n\n{options.notes}" if options.notes else "")
    write(options.name, {"rows": records, "notes": options.notes}, text, out=options.out)


if __name__ == "__main__":
    main()
