"""Run one block of this very model, alone, and time it: the surest way to know what a pass will cost.

The planner's curve knows the machine; the rehearsal knows this model's shapes, attention and small operations on it.
It builds the same transformers model with a single layer, gives it the first block's real weights, and times that
layer at the run's own number of tokens, for a prefill pass and for a decode pass at full context. Peak memory: one
block, the conversion buffer and one layer's work space, all given back.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from headrace.inference.block_weights import BlockWeights, ConversionBuffer
from headrace.inference.kv_cache import build_cache
from headrace.inference.skeleton import build_skeleton, single_layer_config
from headrace.inference.weight_names import recipes_of
from headrace.planning.estimate import LayerTimes
from headrace.planning.model_spec import HEAD_CHUNK_ROWS
from headrace.planning.plan import Workload
from headrace.streaming.arena import Arena
from headrace.streaming.checkpoint import Checkpoint, torch_dtype

PREFILL_TOKENS_MAX = 512
"""Longer prefills are scaled up from this many tokens: beyond it products take time in proportion."""

DECODE_REPETITIONS = 5


class Rehearsed(NamedTuple):
    """Seconds of one layer, of a pass beside its blocks, and of one row-element of the head."""

    layer: LayerTimes
    pass_overhead_s: float
    head_seconds_per_parameter: float


def rehearse(
    checkpoint: Checkpoint,
    config: Any,
    workload: Workload,
    dtype: torch.dtype,
    *,
    conversion_bytes: int,
    copy_misaligned: bool,
    attention: str | None,
) -> Rehearsed:
    """Time the first layer of the checkpoint under this workload."""
    block = checkpoint.spec.blocks[0]
    model = build_skeleton(single_layer_config(config), dtype, attention=attention)
    base = model.base_model
    architecture = checkpoint.spec.config.architecture
    prefix = f"{architecture.layers}.0."
    layer = model.get_submodule(prefix[:-1])
    recipes = {
        name.removeprefix(prefix): recipe
        for name, recipe in recipes_of(model, block.tensors).items()
        if name.startswith(prefix)
    }
    fixed = checkpoint.read_tensors(checkpoint.spec.fixed)
    for name, recipe in recipes_of(model, checkpoint.spec.fixed).items():
        module_name, _, own_name = name.rpartition(".")
        value = fixed[recipe.ingredients[0].entry.name].to(dtype)
        model.get_submodule(module_name).register_parameter(own_name, torch.nn.Parameter(value, requires_grad=False))
    arena = Arena(block.footprint_bytes)
    piece = arena.take(block.footprint_bytes)
    checkpoint.read_block(block, piece)
    buffer = ConversionBuffer(conversion_bytes)
    weights = BlockWeights(layer, recipes, block.layout.positions, dtype, buffer, copy_misaligned)
    weights.enter(piece, stays=True)
    spans: list[tuple[float, float]] = []
    layer.register_forward_pre_hook(lambda *_: spans.append((time.perf_counter(), 0.0)))
    layer.register_forward_hook(lambda *_: spans.append((spans.pop()[0], time.perf_counter())))

    prompt_tokens = min(workload.prompt_tokens, PREFILL_TOKENS_MAX)
    sequences = max(1, min(workload.sequences, PREFILL_TOKENS_MAX // prompt_tokens))
    width = checkpoint.spec.config.hidden_size if architecture.model_type != "opt" else config.word_embed_proj_dim

    def run(sequences: int, tokens: int, past_tokens: int) -> tuple[float, float]:
        """Seconds of the layer and of everything beside it, for one pass."""
        hidden = torch.randn(sequences, tokens, width).to(dtype)
        cache = build_cache(model.config, capacity_tokens=past_tokens + tokens)
        if past_tokens:
            spec = checkpoint.spec.config
            states = torch.zeros(sequences, spec.num_kv_heads, past_tokens, spec.head_dim, dtype=dtype)
            cache.update(states, states, 0)
        start = time.perf_counter()
        base(inputs_embeds=hidden, past_key_values=cache, use_cache=True)
        whole = time.perf_counter() - start
        inside = spans[-1][1] - spans[-1][0]
        return inside, whole - inside

    with torch.inference_mode():
        run(1, 1, 0)
        repetitions = 2 if sequences * prompt_tokens > 64 else DECODE_REPETITIONS
        prefill_s = min(run(sequences, prompt_tokens, 0)[0] for _ in range(repetitions))
        prefill_s *= workload.sequences * workload.prompt_tokens / (sequences * prompt_tokens)
        past = workload.prompt_tokens + workload.generate_tokens // 2
        decode = [run(workload.sequences, 1, past) for _ in range(DECODE_REPETITIONS)]
        head_s = _head_seconds(checkpoint, workload.sequences, dtype)
    arena.close()
    return Rehearsed(
        LayerTimes(prefill_s=prefill_s, decode_s=statistics.median(inside for inside, _ in decode)),
        statistics.median(beside for _, beside in decode),
        head_s,
    )


def _head_seconds(checkpoint: Checkpoint, tokens: int, dtype: torch.dtype) -> float:
    """Seconds per element of the head's matrix at `tokens` rows, from one piece of made-up weights."""
    rows, columns = checkpoint.spec.blocks[-1].tensors[0].shape
    stored = torch_dtype(checkpoint.spec.blocks[-1].tensors[0])
    count = min(rows, HEAD_CHUNK_ROWS)
    weights = torch.zeros(count, columns, dtype=stored)
    made = torch.empty(count, columns, dtype=dtype)
    hidden = torch.randn(tokens, columns).to(dtype)
    seconds = []
    for _ in range(DECODE_REPETITIONS):
        start = time.perf_counter()
        functional.linear(hidden, made.copy_(weights) if stored is not dtype else weights)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) / (count * columns)
