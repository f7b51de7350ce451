"""Engines by the names that sources give: constants fitted on a stated half of the published rows.

`bench/fit_engines.py` fits them on the rows whose id has an even CRC-32 and judges on the others (docs/formulas.md).
Streaming engines are not fitted: half of the peak arithmetic, the link at its textbook rate, and how the software is
written.
"""

from __future__ import annotations

from headrace.machine.engine import PRESENT, Engine
from headrace.machine.quantity import Quantity

_FITTED = "fitted on half of the published rows of this engine, docs/formulas.md"


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
    exchange: float = 1.0,
    attention: float = 0.6,
    quantised: float = 1.0,
    link: float = 1.0,
    spread: tuple[float, float] = (0.8, 1.25),
    overlaps_hops: bool = True,
    overlaps_copies: bool = True,
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
        exchange_excess=_q(exchange, source=source),
        token_overhead_s=_q(token_us * 1e-6, source=source),
        overlaps_hops=overlaps_hops,
        overlaps_copies=overlaps_copies,
        spread=Quantity(1.0, spread[0], spread[1], "held-out residuals of published rows, docs/formulas.md"),
    )


_TEXTBOOK = "textbook: link at its achieved rate, half of the peak arithmetic; not fitted"

_UNPACKED = 4.5 / (4.5 + 2 * 16)
"""4-bit weights that are unpacked to 16 bits in the device's memory first: read, written, read again"""

ENGINES: dict[str, Engine] = {
    # -- fitted by bench/fit_engines.py
    "deepspeed-inference": _engine(
        # 11 rows fitted: median 3%; 7 judged: 8%
        "deepspeed-inference",
        memory=0.496,
        compute=1.000,
        attention=0.21,
        quantised=0.30,
        layer_us=15.5,
        split_us=16.1,
        across_us=0.0,
        pass_ms=1.13,
        token_us=280.5,
        exchange=0.15,
        spread=(0.83, 1.15),
    ),
    "distributed-llama": _engine(
        # 2 rows fitted: median 52%; 2 judged: 76%
        "distributed-llama",
        memory=0.452,
        compute=1.000,
        attention=0.60,
        quantised=0.67,
        layer_us=9.2,
        split_us=9.2,
        across_us=0.0,
        pass_ms=0.60,
        token_us=0.0,
        exchange=1.00,
        spread=(0.45, 1.10),
    ),
    "exo": _engine(
        # 3 rows fitted: median 18%; 4 judged: 6%
        "exo",
        memory=0.533,
        compute=0.200,
        attention=0.27,
        quantised=1.00,
        layer_us=30.0,
        split_us=2.6,
        across_us=0.0,
        pass_ms=3.00,
        token_us=14.5,
        exchange=1.00,
        spread=(0.64, 1.30),
    ),
    "fastertransformer": _engine(
        # 30 rows fitted: median 3%; 27 judged: 7%
        "fastertransformer",
        memory=0.760,
        compute=0.700,
        attention=0.64,
        quantised=1.00,
        layer_us=30.5,
        split_us=63.7,
        across_us=78.2,
        pass_ms=0.58,
        token_us=14.8,
        exchange=1.00,
        spread=(0.84, 1.24),
    ),
    "gpt-fast": _engine(
        # 13 rows fitted: median 3%; 10 judged: 6%
        "gpt-fast",
        memory=0.799,
        compute=0.800,
        attention=0.20,
        quantised=0.63,
        layer_us=17.3,
        split_us=11.6,
        across_us=0.0,
        pass_ms=0.22,
        token_us=313.3,
        exchange=1.00,
        spread=(0.71, 1.16),
    ),
    "hf": _engine(
        # 5 rows fitted: median 7%; 7 judged: 12%
        "hf",
        memory=0.611,
        compute=1.000,
        attention=0.81,
        quantised=0.45,
        layer_us=19.7,
        split_us=50.0,
        across_us=0.0,
        pass_ms=0.70,
        token_us=500.0,
        exchange=1.00,
        spread=(0.77, 1.28),
    ),
    "llama.cpp": _engine(
        # 43 rows fitted: median 11%; 44 judged: 14%
        "llama.cpp",
        memory=0.844,
        compute=0.590,
        attention=0.20,
        quantised=0.90,
        layer_us=30.3,
        split_us=50.0,
        across_us=0.0,
        pass_ms=0.38,
        token_us=2.1,
        exchange=1.00,
        spread=(0.83, 1.83),
    ),
    "mlx": _engine(
        # 2 rows fitted: median 6%; 5 judged: 24%
        "mlx",
        memory=0.950,
        compute=0.700,
        attention=0.62,
        quantised=1.00,
        layer_us=67.5,
        split_us=50.0,
        across_us=0.0,
        pass_ms=2.53,
        token_us=58.8,
        exchange=1.00,
        spread=(0.55, 1.10),
    ),
    "pope": _engine(
        # 1 rows fitted: median 50%; 2 judged: 40%
        "pope",
        memory=0.800,
        compute=1.000,
        attention=0.90,
        quantised=1.00,
        layer_us=1.9,
        split_us=1.9,
        across_us=0.0,
        pass_ms=0.12,
        token_us=0.0,
        exchange=1.00,
        spread=(0.63, 1.48),
    ),
    "sglang": _engine(
        # 6 rows fitted: median 6%; 6 judged: 14%
        "sglang",
        memory=0.950,
        compute=0.700,
        attention=0.85,
        quantised=1.00,
        layer_us=20.0,
        split_us=33.3,
        across_us=0.0,
        pass_ms=0.50,
        token_us=7.6,
        exchange=1.00,
        spread=(0.78, 1.38),
    ),
    "tensorrt-llm": _engine(
        # 7 rows fitted: median 5%; 6 judged: 36%
        "tensorrt-llm",
        memory=0.950,
        compute=1.000,
        attention=0.90,
        quantised=1.00,
        layer_us=1.5,
        split_us=7.4,
        across_us=0.0,
        pass_ms=0.09,
        token_us=18.8,
        exchange=0.36,
        spread=(0.47, 1.28),
    ),
    "trtllm": _engine(
        # 24 rows fitted: median 15%; 21 judged: 16%
        "trtllm",
        memory=0.894,
        compute=1.000,
        attention=0.90,
        quantised=0.71,
        layer_us=24.2,
        split_us=7.8,
        across_us=0.0,
        pass_ms=1.04,
        token_us=0.0,
        exchange=0.26,
        spread=(0.70, 1.41),
    ),
    "vllm": _engine(
        # 45 rows fitted: median 8%; 39 judged: 7%
        "vllm",
        memory=0.950,
        compute=1.000,
        attention=0.62,
        quantised=0.73,
        layer_us=49.2,
        split_us=1.6,
        across_us=0.0,
        pass_ms=0.77,
        token_us=10.7,
        exchange=0.25,
        spread=(0.75, 1.35),
    ),
    # -- not fitted
    "zero-inference": _engine(
        "zero-inference",
        memory=0.8,
        compute=0.7,
        layer_us=100,
        pass_ms=5,
        quantised=_UNPACKED,
        overlaps_copies=False,
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
        quantised=_UNPACKED,
        overlaps_copies=False,
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
        "moe-offload", memory=0.7, compute=0.6, layer_us=300, pass_ms=5, source=_TEXTBOOK, spread=(0.4, 10)
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
