"""The same checkpoint, prompt and batch with accelerate's cpu_offload, and DeepSpeed's ZeRO-Inference where it is."""

from __future__ import annotations

import importlib.util
import os
import statistics
from typing import Any

import accelerate
import torch
from transformers import AutoModelForCausalLM

from bench_report import spread
from gpu_parts.outcome import Goal, Measured, Table, at_least
from gpu_parts.stage import Stage
from gpu_parts.timing import generate, generate_s, some_tokens

WANTED_OVER_ACCELERATE = 5.0
WANTED_OVER_DEEPSPEED = 1.3
NEW_TOKENS = 4
ROUNDS = 2
PROMPT_TOKENS = 16


def measure_rivals(stage: Stage) -> Measured:
    """Whole generations by turns; everything streams from host memory in all of them."""
    stage.require_gpu("accelerate's cpu_offload")
    name = stage.case.main
    seconds, same = _against_accelerate(stage, name)
    rates = {who: NEW_TOKENS / statistics.median(values) for who, values in seconds.items()}
    ours = rates["headrace"]
    goals = [_over("accelerate's cpu_offload", name, WANTED_OVER_ACCELERATE, ours / rates["accelerate"])]
    notes = [
        f"{name}, bfloat16, batch 1, a prompt of {PROMPT_TOKENS} tokens and {NEW_TOKENS} new ones, prefill included; "
        f"the two take turns in {ROUNDS} rounds. Same tokens: {'yes' if same else 'NO'}."
    ]
    stage.settle()
    if importlib.util.find_spec("deepspeed") is None:
        notes.append("DeepSpeed ZeRO-Inference: not carried (it is not installed here).")
    else:
        try:
            seconds["deepspeed"] = _deepspeed_s(stage, name)
            rates["deepspeed"] = NEW_TOKENS / statistics.median(seconds["deepspeed"])
            goals.append(_over("DeepSpeed ZeRO-Inference", name, WANTED_OVER_DEEPSPEED, ours / rates["deepspeed"]))
        except Exception as error:  # a rival that fails loses its own row only
            notes.append(f"DeepSpeed ZeRO-Inference: failed here ({type(error).__name__}: {error}).")
    return Measured(
        tables=[
            Table(
                ("system", "tokens/s", "s per generation, min-max", "headrace is faster by"),
                [
                    [who, f"{rate:.3g}", f"{min(seconds[who]):.3g}-{max(seconds[who]):.3g}", f"{ours / rate:.2f}"]
                    for who, rate in rates.items()
                ],
            )
        ],
        goals=goals,
        notes=notes,
        record={
            "shape": name,
            "new_tokens": NEW_TOKENS,
            "generation_s": {who: spread(values) for who, values in seconds.items()},
            "same_tokens": same,
        },
    )


def _over(rival: str, name: str, wanted: float, ratio: float) -> Goal:
    return at_least(f"times faster than {rival}, {name} from host memory, batch 1", wanted, ratio)


def _against_accelerate(stage: Stage, name: str) -> tuple[dict[str, list[float]], bool]:
    offloaded: Any = AutoModelForCausalLM.from_pretrained(stage.rack.path(name), dtype=torch.bfloat16)
    offloaded = accelerate.cpu_offload(offloaded.eval(), execution_device=stage.device.torch_device)
    memory = stage.least_bytes(name, "overlap")
    seconds: dict[str, list[float]] = {"headrace": [], "accelerate": []}
    with stage.load(name, what="beside accelerate", memory=memory, strategy="overlap", counted=False) as model:
        prompt = some_tokens(model, 1, PROMPT_TOKENS)
        same = torch.equal(generate(model, prompt, 2), generate(offloaded, prompt, 2))
        for _ in stage.deadline.rounds(ROUNDS):
            seconds["headrace"].append(generate_s(stage.device, model, prompt, NEW_TOKENS))
            seconds["accelerate"].append(generate_s(stage.device, offloaded, prompt, NEW_TOKENS))
    return seconds, same


def _deepspeed_s(stage: Stage, name: str) -> list[float]:
    """ZeRO stage 3 in one process, parameters in page-locked host memory, a layer fetched ahead."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    deepspeed: Any = importlib.import_module("deepspeed")
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed(auto_mpi_discovery=False)
    shape = stage.rack.shape(name)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 2 * shape.hidden * shape.intermediate,
            "stage3_param_persistence_threshold": shape.hidden,
            "stage3_max_live_parameters": 10**9,
            "offload_param": {"device": "cpu", "pin_memory": True},
        },
        "steps_per_print": 10**9,
    }
    keep_alive = HfDeepSpeedConfig(config)
    model = AutoModelForCausalLM.from_pretrained(stage.rack.path(name), dtype=torch.bfloat16)
    module = deepspeed.initialize(model=model, config=config)[0].module.eval()
    prompt = torch.full((1, PROMPT_TOKENS), 5, device=stage.device.torch_device)
    generate(module, prompt, 2)
    found = [generate_s(stage.device, module, prompt, NEW_TOKENS) for _ in range(ROUNDS)]
    del keep_alive
    return found
