"""Layers fused by torch.compile where enqueuing them takes longer than computing them: the small shape, resident."""

from __future__ import annotations

import statistics
import time
from typing import Any

from bench_report import spread
from gpu_parts.outcome import Measured, Table
from gpu_parts.stage import Stage
from gpu_parts.timing import decode_cycles_s, generate, some_tokens

NEW_TOKENS = 32


def measure_compiled(stage: Stage) -> Measured:
    """Tokens per second at batch 1 with and without, by turns."""
    stage.require_gpu("torch.compile of layers")
    name = stage.case.small
    memory = stage.resident_bytes(name)
    with (
        stage.load(name, what="resident", memory=memory, strategy="resident") as plain,
        stage.load(name, what="compiled", memory=memory, strategy="resident", compile_layers=True) as compiled,
    ):
        return _by_turns(stage, name, plain, compiled)


def _by_turns(stage: Stage, name: str, plain: Any, compiled: Any) -> Measured:
    prompt = some_tokens(plain, 1, 16)
    generate(plain, prompt, 4)
    began = time.perf_counter()
    generate(compiled, prompt, 4)
    first_s = time.perf_counter() - began
    seconds: dict[str, list[float]] = {"as it is": [], "compiled": []}
    for _ in stage.deadline.rounds(stage.case.rounds):
        for who, model in zip(seconds, (plain, compiled), strict=True):
            seconds[who] += decode_cycles_s(model, prompt, NEW_TOKENS)
    medians = {who: statistics.median(values) for who, values in seconds.items()}
    return Measured(
        tables=[
            Table(
                ("layers", "tokens/s", "ms per token, min-max"),
                [
                    [who, f"{1 / medians[who]:.4g}", f"{1e3 * min(values):.3g}-{1e3 * max(values):.3g}"]
                    for who, values in seconds.items()
                ],
            )
        ],
        notes=[
            f"{name}, everything resident, batch 1. Compiled over as it is: "
            f"**{medians['as it is'] / medians['compiled']:.2f}** times as fast; the first generation, which compiles, "
            f"took {first_s:.1f} s. Predictions know nothing of compiling."
        ],
        record={"shape": name, "decode_s": {who: spread(v) for who, v in seconds.items()}, "compiling_s": first_s},
    )
