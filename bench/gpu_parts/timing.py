"""How passes are timed: on the device's clock, by events at their ends, and tokens of `generate` on the host's."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from headrace.streaming.device import Device

TEXT_TOKENS = 4096
"""Token ids are drawn from so many: a long text has about as many distinct ones."""
FIRST_TOKEN = 3


def some_tokens(model: Any, rows: int, columns: int) -> torch.Tensor:
    """Token ids of shape (rows, columns), where the model computes."""
    generator = torch.Generator().manual_seed(rows * columns)
    vocabulary = min(model.config.vocab_size, TEXT_TOKENS)
    return torch.randint(FIRST_TOKEN, vocabulary, (rows, columns), generator=generator).to(model.device)


def cycles_s(device: Device, once: Callable[[], object], count: int) -> list[float]:
    """Seconds from the end of one pass to the end of the next, by the device's events; the first pass is not counted.

    Nothing waits in between, so that passes follow one another as they do in a run.
    """
    ends = []
    with torch.inference_mode():
        for _ in range(count + 1):
            once()
            ends.append(device.computed())
        ends[-1].wait()
    return [later.moment_s() - earlier.moment_s() for earlier, later in itertools.pairwise(ends)]


def pass_cycles_s(model: Any, ids: torch.Tensor, count: int) -> list[float]:
    """Seconds of passes without a cache."""

    def once() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return cycles_s(model.headrace.device, once, count)


def drain_cycles_s(model: Any, count: int) -> list[float]:
    """Seconds of passes in which every block is waited for and given back, and nothing is computed."""
    stream, blocks = model.headrace.stream, model.headrace.plan.num_blocks

    def once() -> None:
        for index in range(blocks):
            stream.wait(index)
            stream.release(index)

    return cycles_s(model.headrace.device, once, count)


def generate(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Exactly so many new tokens, greedily."""
    ids_with_new: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return ids_with_new


def decode_cycles_s(model: Any, ids: torch.Tensor, new_tokens: int) -> list[float]:
    """Seconds from pass to pass of a headrace model's `generate`, which waits for every token; two are left out."""
    before = len(model.headrace.passes)
    generate(model, ids, new_tokens)
    starts = [record.start_s for record in model.headrace.passes[before:]]
    return [later - earlier for earlier, later in itertools.pairwise(starts)][1:]


def generate_s(device: Device, model: Any, ids: torch.Tensor, new_tokens: int) -> float:
    """Seconds of a whole `generate`, prefill included."""
    device.synchronize()
    began = time.perf_counter()
    generate(model, ids, new_tokens)
    device.synchronize()
    return time.perf_counter() - began
