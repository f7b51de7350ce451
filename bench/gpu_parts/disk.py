"""Everything streamed from the disk: bytes per second while computing, against the best of plain direct reads."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from bench_report import spread
from gpu_parts.outcome import Measured, Table
from gpu_parts.stage import Stage
from gpu_parts.timing import some_tokens
from headrace.planning.plan import Placement
from headrace.streaming.probe.machine import read_rate

READERS = ((8 << 20, 2), (16 << 20, 2), (16 << 20, 4), (16 << 20, 8))
"""chunk in bytes and threads"""
ROUNDS = 2


def measure_disk(stage: Stage) -> Measured:
    """The main shape, with host memory for the ring only."""
    name = stage.case.main
    memory = stage.least_bytes(name, "overlap")
    with stage.load(
        name, what="from the disk", memory=memory, strategy="overlap", host_memory=stage.case.ring_bytes
    ) as model:
        return _by_turns(stage, name, model)


def _by_turns(stage: Stage, name: str, model: Any) -> Measured:
    handle, ids = model.headrace, some_tokens(model, 1, 1)
    files = handle.checkpoint.index.files
    source = handle.checkpoint.open_source()
    raw: dict[str, list[float]] = {f"{threads} threads, {chunk >> 20} MiB": [] for chunk, threads in READERS}
    streaming, ratios = [], []
    try:
        _streamed_bytes_per_s(model, ids)  # blocks that stay are read once
        for _ in stage.deadline.rounds(ROUNDS):
            for (chunk, threads), rates in zip(READERS, raw.values(), strict=True):
                seconds = stage.case.raw_read_s
                rates.append(read_rate(source, files, chunk_bytes=chunk, threads=threads, seconds=seconds))
            streaming.append(_streamed_bytes_per_s(model, ids))
            ratios.append(streaming[-1] / max(rates[-1] for rates in raw.values()))
        direct = all(source.direct)
    finally:
        source.close()
    rows = [
        [what, f"{statistics.median(rates) / 1e9:.3g}", f"{min(rates) / 1e9:.3g}-{max(rates) / 1e9:.3g}"]
        for what, rates in {**raw, "headrace, streaming": streaming}.items()
    ]
    plan = handle.plan
    return Measured(
        tables=[Table(("reader", "median GB/s", "min-max"), rows)],
        notes=[
            f"{name}: {plan.placements.count(Placement.DISK)} of {plan.num_blocks} blocks from the disk in every pass, "
            f"{plan.streamed_bytes_per_pass / 1e9:.3g} GB. Streaming over the best reader of the same round: "
            f"**{statistics.median(ratios):.3f}** in {len(ratios)} rounds; direct reads: {'yes' if direct else 'NO'}. "
            f"Predicted {handle.prediction.tokens_per_s:.3g} tokens/s, measured "
            f"{statistics.median(streaming) / plan.streamed_bytes_per_pass:.3g}."
        ],
        record={
            "shape": name,
            "direct": direct,
            "raw_bytes_per_s": {what: spread(rates) for what, rates in raw.items()},
            "streaming_bytes_per_s": spread(streaming),
            "ratio": spread(ratios),
            "predicted_tokens_per_s": handle.prediction.tokens_per_s,
        },
    )


def _streamed_bytes_per_s(model: Any, ids: torch.Tensor) -> float:
    """Bytes read per second over a pass; what had been read ahead before it is not counted, what is after it is."""
    handle = model.headrace
    with torch.inference_mode():
        before, began = handle.stream.counters.bytes_read, time.perf_counter()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        handle.device.synchronize()
        elapsed = time.perf_counter() - began
    return float((handle.stream.counters.bytes_read - before) / elapsed)
