"""Time what packed passes do beside matrix products: attention by sequence, choosing tokens, keeping the books."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from headrace.inference.batching.ragged_pass import RaggedCache, attend_alone
from headrace.inference.batching.sampling import Decoding, Sampler, sample_all
from headrace.model.stored_model import StoredModel
from headrace.planning.jobs.forecast import PackedCosts
from headrace.planning.jobs.packing import Need, PassScheduler, PositionPool, Turn

SEQUENCES = 16
SHORT, LONG = 32, 256
CHUNK = 64
REPETITIONS = 7


class _Module(nn.Module):
    """Stands where an attention module is: all that is asked of it is its number."""

    layer_idx = 0


def time_packing(model: StoredModel, dtype: torch.dtype) -> PackedCosts:
    """Measure the constants of packed passes for this model's heads and vocabulary, in seconds."""
    with torch.inference_mode():
        short_s, long_s = _attention_s(model, dtype, SHORT, 1), _attention_s(model, dtype, LONG, 1)
        key_s = max(0.0, (long_s - short_s) / (SEQUENCES * (LONG - SHORT)))
        turn_s = max(0.0, short_s / SEQUENCES - key_s * SHORT)
        chunk_s = _attention_s(model, dtype, LONG, CHUNK)
        product_s = max(0.0, (chunk_s / SEQUENCES - turn_s - key_s * LONG) / (CHUNK * LONG))
        return PackedCosts(
            turn_s=turn_s,
            key_s=key_s,
            product_s=product_s,
            sample_s=_sample_s(model, dtype),
            bookkeeping_s=_bookkeeping_s(),
        )


def _attention_s(model: StoredModel, dtype: torch.dtype, length: int, tokens: int) -> float:
    """Seconds of a pass over SEQUENCES; 0 where no layer attends with heads."""
    attending = (layer for layer in model.layers() if layer.kv_heads and layer.query_heads % layer.kv_heads == 0)
    layer = next((layer for layer in attending if layer.kv_elements_per_token and layer.query_heads), None)
    if layer is None:
        return 0.0
    cache = RaggedCache(positions=SEQUENCES * length)
    turns = [Turn(number, length - tokens, tokens, number * length, samples=True) for number in range(SEQUENCES)]
    query = torch.randn(1, layer.query_heads, SEQUENCES * tokens, layer.key_dim).to(dtype)
    states = torch.randn(1, layer.kv_heads, SEQUENCES * length, layer.key_dim).to(dtype)
    cache.place(torch.arange(SEQUENCES * length))
    cache.update(states, states, 0)
    module = _Module()
    return _typical(lambda: attend_alone(module, cache, turns, query, states[:, :, : SEQUENCES * tokens]))


def _sample_s(model: StoredModel, dtype: torch.dtype) -> float:
    logits = torch.randn(SEQUENCES, model.vocab_size).to(dtype)
    choosers = [Sampler(Decoding(), 0, frozenset()) for _ in range(SEQUENCES)]
    return _typical(lambda: sample_all(choosers, logits)) / SEQUENCES


def _bookkeeping_s() -> float:
    scheduler = PassScheduler(most_sequences=64, pass_tokens=64, pool=PositionPool(64 * 1000))
    for number in range(64):
        scheduler.add(number, Need(1, 1000))

    def once() -> None:
        scheduler.pack()
        scheduler.advance()

    return 2 * _typical(once) / 64  # as much again for lists of tokens and positions


def _typical(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median_low(seconds[1:])
