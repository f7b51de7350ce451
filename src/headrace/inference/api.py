"""`headrace.load`, `headrace.plan`, `headrace.probe`: from a model directory and a budget to a model that runs."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.errors import HeadraceError, InvalidRequestError
from headrace.inference.assembly import assemble
from headrace.inference.model_source import resolve_model
from headrace.inference.skeleton import read_transformers_config
from headrace.inference.study import choose, compare, study
from headrace.planning.draft_length import DraftLength
from headrace.planning.estimate import Pace
from headrace.planning.job_forecast import PackedCosts, PassLoad, PassTimes
from headrace.planning.load_options import Options, make_options
from headrace.planning.model_spec import ModelSpec
from headrace.planning.plan import Plan
from headrace.planning.planner import Candidate
from headrace.planning.probed_machine import ProbedMachine
from headrace.streaming import probe as machine_probe
from headrace.streaming.checkpoint import Checkpoint
from headrace.streaming.system_memory import default_budget_bytes, keep_heap_small
from headrace.units import format_bytes

DRAFTS_STUDIED = (3, 7, 15, 31)
"""numbers of drafts with which a layer is timed"""
NO_COSTS = PackedCosts(turn_s=0.0, key_s=0.0, product_s=0.0, sample_s=0.0, bookkeeping_s=0.0)


def load(
    model: str | Path,
    *,
    memory: str | int | None = None,
    device: str = "cpu",
    strategy: str = "auto",
    dtype: str = "auto",
    batch: int = 1,
    prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    read_limit: str | float | None = None,
    machine: ProbedMachine | None = None,
    attention: str | None = None,
    poison: bool = False,
    trust_remote_code: bool = False,
    draft_tokens: int = 0,
) -> Any:
    """Return the transformers model in `model` with weights that stream within `memory` bytes.

    `batch`, `prompt_tokens` and `max_tokens` (prompt and new tokens together) say what the KV cache and the work
    space are planned for; generation beyond that is refused before it starts. `strategy` is auto, resident,
    sequential or overlap; `dtype` auto, float32, bfloat16 or float16. `read_limit` bounds the reader (bytes per
    second, or text such as 500MB/s). With `draft_tokens`, transformers' assisted
    generation (`prompt_lookup_num_tokens` or `assistant_model`) drafts as many tokens as pay, up to so many, for one
    sequence at a time. The model is a context manager; `model.headrace` holds plan, prediction, timeline and
    `close()`.

    Raises CheckpointError, UnsupportedModelError, BudgetError, InvalidRequestError.
    """
    started = time.perf_counter()
    if device != "cpu":
        raise InvalidRequestError(f"device {device!r} is not supported yet; headrace computes on the cpu so far")
    checkpoint = Checkpoint(resolve_model(model))
    options = make_options(
        checkpoint.spec,
        memory=memory,
        default_budget_bytes=default_budget_bytes,
        strategy=strategy,
        dtype=dtype,
        batch=batch,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        read_limit=read_limit,
        machine=machine,
        attention=attention,
        poison=poison,
        trust_remote_code=trust_remote_code,
        draft_tokens=draft_tokens,
    )
    return load_checkpoint(checkpoint, options, started=started)


def load_checkpoint(checkpoint: Checkpoint, options: Options, *, started: float | None = None) -> Any:
    """Measure, plan, take the memory, start the stream, and return the model. See `load`."""
    started = time.perf_counter() if started is None else started
    keep_heap_small()
    config = read_transformers_config(checkpoint.directory, trust_remote_code=options.trust_remote_code)
    drafts = [count for count in DRAFTS_STUDIED if count <= options.draft_tokens]
    studied = study(checkpoint, options, config, pass_tokens=[1 + count for count in drafts])
    candidate = choose(studied, options.strategy)
    model = assemble(
        checkpoint,
        config,
        candidate,
        studied,
        options,
        started=started,
    )
    if options.draft_tokens:
        model.headrace.draft_length = draft_length(checkpoint.spec, candidate.plan, studied.pace, options.draft_tokens)
    return model


def draft_length(spec: ModelSpec, plan: Plan, pace: Pace, most: int) -> DraftLength:
    """What chooses the number of drafts, from the pass times that the planner predicts."""
    times = PassTimes(spec, plan, replace(pace, layer=None), NO_COSTS, pass_tokens=1 + most)
    return DraftLength(pass_s=lambda tokens: times.seconds(PassLoad(tokens, tokens, 1, 0, 0)), most=most)


def plan(
    model: str | Path,
    *,
    memory: str | int | None = None,
    batch: int = 1,
    prompt_tokens: int = 16,
    generate_tokens: int = 32,
    strategy: str = "auto",
    dtype: str = "auto",
    read_limit: str | float | None = None,
) -> dict[str, Candidate | HeadraceError]:
    """Predict every strategy for this model on this machine: strategy name -> plan and prediction, or why not."""
    checkpoint = Checkpoint(resolve_model(model))
    try:
        options = make_options(
            checkpoint.spec,
            memory=memory,
            default_budget_bytes=default_budget_bytes,
            strategy=strategy,
            dtype=dtype,
            batch=batch,
            prompt_tokens=prompt_tokens,
            max_tokens=prompt_tokens + generate_tokens,
            read_limit=read_limit,
        )
        studied = study(checkpoint, options, read_transformers_config(checkpoint.directory))
    finally:
        checkpoint.close()
    return compare(studied, options.strategy)


def probe(directory: str | Path = ".") -> ProbedMachine:
    """Measure this machine and the disk that `directory` lies on."""
    return machine_probe.probe_machine(Path(directory))


def describe_plan(plan: Plan) -> str:
    """One line about a plan for people."""
    return (
        f"{plan.strategy.value}: {plan.resident_blocks} of {plan.num_blocks} blocks resident, {plan.slots} slots, "
        f"{format_bytes(plan.streamed_bytes_per_pass)} read per pass, {plan.compute_dtype}, "
        f"{format_bytes(plan.memory.total_bytes)} of {format_bytes(plan.budget_bytes)}"
    )
