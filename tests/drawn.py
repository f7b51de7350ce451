"""What depends on chance, drawn with a seed: which experts are missed, which drafts are accepted."""

from __future__ import annotations

import random

from headrace.model.model import Layer
from headrace.planning.workload import Speculation


def missed_experts(layer: Layer, *, tokens: int, hit_rate: float, draws: int, seed: int) -> float:
    """Mean number of distinct routed experts per pass that are not on the device.

    Each token draws its experts uniformly; the first `hit_rate` of them are on the device.
    """
    generator = random.Random(seed)
    held = round(hit_rate * layer.num_experts)
    total = 0
    for _ in range(draws):
        used: set[int] = set()
        for _ in range(tokens):
            used.update(generator.sample(range(layer.num_experts), layer.experts_per_token))
        total += sum(1 for expert in used if expert >= held)
    return total / draws


def passes_for(speculation: Speculation, *, tokens: int, seed: int) -> int:
    """Count the passes that bring `tokens` tokens: each brings one and every draft before the first that is refused."""
    generator = random.Random(seed)
    made = passes = 0
    while made < tokens:
        passes += 1
        made += 1
        for _ in range(speculation.draft_tokens):
            if generator.random() >= speculation.acceptance:
                break
            made += 1
    return passes
