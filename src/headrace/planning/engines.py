"""Engines by the names that sources give: constants fitted on a stated half of the published rows.

`bench/fit_engines.py` fits them on rows whose number is even and judges on the odd ones (docs/formulas.md). Streaming
engines are not fitted: half of the peak arithmetic, the link at its textbook rate, and how the software is written.
"""

from __future__ import annotations

from headrace.planning.engine import PRESENT, Engine
from headrace.planning.quantity import Quantity

_FITTED = "fitted on even-numbered published rows, docs/formulas.md"


def _q(expected: float, low: float | None = None, high: float | None = None, source: str = _FITTED) -> Quantity:
    return Quantity(expected, expected if low is None else low, expected if high is None else high, source)


def _engine(
    name: str,
    *,
    memory: float,
    compute: float,
    layer_us: float,
    split_us: float = 50.0,
    across_us: float = 0.0,
    pass_ms: float = 0.5,
    token_us: float = 0.0,
    attention: float = 0.6,
    quantised: float = 1.0,
    link: float = 1.0,
    spread: tuple[float, float] = (0.8, 1.25),
    overlaps_hops: bool = True,
    source: str = _FITTED,
) -> Engine:
    return Engine(
        name=name,
        memory_share=_q(memory, source=source),
        compute_share=_q(compute, source=source),
        attention_share=_q(attention, source=source),
        layer_overhead_s=_q(layer_us * 1e-6, source=source),
        split_overhead_s=_q(split_us * 1e-6, source=source),
        pass_overhead_s=_q(pass_ms * 1e-3, source=source),
        link_share=_q(link, source=source),
        quantised_share=_q(quantised, source=source),
        across_overhead_s=_q(across_us * 1e-6, source=source),
        token_overhead_s=_q(token_us * 1e-6, source=source),
        overlaps_hops=overlaps_hops,
        spread=Quantity(1.0, spread[0], spread[1], "held-out residuals of published rows, docs/formulas.md"),
    )


_TEXTBOOK = "textbook: link at its achieved rate, half of the peak arithmetic; not fitted"

ENGINES: dict[str, Engine] = {
    "fastertransformer": _engine(
        "fastertransformer", memory=0.8, compute=0.7, layer_us=60, split_us=100, across_us=150, pass_ms=1
    ),
    "gpt-fast": _engine("gpt-fast", memory=0.85, compute=0.8, layer_us=20, split_us=60, pass_ms=0.2),
    "vllm": _engine("vllm", memory=0.8, compute=0.7, layer_us=30, split_us=50, pass_ms=1),
    "trtllm": _engine("trtllm", memory=0.8, compute=0.7, layer_us=20, split_us=40, pass_ms=0.5),
    "sglang": _engine("sglang", memory=0.8, compute=0.7, layer_us=30, split_us=50, pass_ms=1),
    "llama.cpp": _engine("llama.cpp", memory=0.7, compute=0.5, layer_us=30, pass_ms=0.5, quantised=0.8),
    "mlx": _engine("mlx", memory=0.8, compute=0.7, layer_us=20, pass_ms=0.5),
    "hf": _engine("hf", memory=0.6, compute=0.6, layer_us=300, pass_ms=5),
    "deepspeed-inference": _engine("deepspeed-inference", memory=0.7, compute=0.6, layer_us=80, split_us=80, pass_ms=2),
    "tensorrt-llm": _engine("tensorrt-llm", memory=0.85, compute=0.8, layer_us=15, split_us=40, pass_ms=0.5),
    "exo": _engine("exo", memory=0.8, compute=0.6, layer_us=30, pass_ms=2),
    "distributed-llama": _engine("distributed-llama", memory=0.6, compute=0.5, layer_us=200, split_us=3000, pass_ms=2),
    "pope": _engine("pope", memory=0.8, compute=0.8, layer_us=10, split_us=10, pass_ms=0.5),
    "zero-inference": _engine(
        "zero-inference",
        memory=0.8,
        compute=0.7,
        layer_us=100,
        pass_ms=5,
        overlaps_hops=False,
        source=_TEXTBOOK,
        spread=(0.7, 1.6),
    ),
    "flexgen": _engine(
        "flexgen",
        memory=0.8,
        compute=0.7,
        layer_us=100,
        pass_ms=5,
        overlaps_hops=False,
        source=_TEXTBOOK,
        spread=(0.4, 3.0),
    ),
    "airllm": _engine(
        "airllm",
        memory=0.6,
        compute=0.5,
        layer_us=500,
        pass_ms=10,
        overlaps_hops=False,
        source=_TEXTBOOK,
        spread=(0.5, 4),
    ),
    "umbrella": _engine("umbrella", memory=0.8, compute=0.7, layer_us=50, pass_ms=2, source=_TEXTBOOK, spread=(0.3, 3)),
    "moe-offload": _engine(
        "moe-offload", memory=0.7, compute=0.6, layer_us=300, pass_ms=5, source=_TEXTBOOK, spread=(0.3, 4)
    ),
}

_NAMES = (
    # the first whose text is found in a source's name of the engine
    ("fastertransformer", "fastertransformer"),
    ("gpt-fast", "gpt-fast"),
    ("zero-inference", "zero-inference"),
    ("deepspeed-zero", "zero-inference"),
    ("deepspeed zero", "zero-inference"),
    ("flexgen", "flexgen"),
    ("deepspeed-inference", "deepspeed-inference"),
    ("tensorrt-llm", "tensorrt-llm"),
    ("trtllm", "trtllm"),
    ("vllm", "vllm"),
    ("sglang", "sglang"),
    ("mlx", "mlx"),
    ("exo", "exo"),
    ("distributed-llama", "distributed-llama"),
    ("airllm", "airllm"),
    ("ollm", "airllm"),
    ("umbrella", "umbrella"),
    ("mixtral-offloading", "moe-offload"),
    ("fiddler", "moe-offload"),
    ("ollama", "llama.cpp"),
    ("llama.cpp", "llama.cpp"),
    ("llamacpp", "llama.cpp"),
    ("pope", "pope"),
    ("accelerate", "hf"),
    ("hugging", "hf"),
    ("hf", "hf"),
    ("deepspeed", "zero-inference"),
)


def engine_named(text: str) -> Engine:
    """Return the engine that a source's name means; `PRESENT`, well-kept software of today, for unknown ones."""
    low = text.lower()
    for part, name in _NAMES:
        if part in low:
            return ENGINES[name]
    return PRESENT
