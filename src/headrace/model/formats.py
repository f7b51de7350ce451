"""Formats that weights are stored in: bits per weight with the scales that come with them.

For whole files the bytes are the tensors' own (`from_index`); the table serves where only a format is named.
Norms and biases stay in 16 bits. Embedding table and head stay in 16 bits except in the formats of GGUF files, which
narrow them too: the table as the bulk of the weights, the head (and a table that is the head as well) to 6.5625 bits.

Exact, by definition: blocks of GGUF types (`gguf_index.BLOCKS`); MXFP4 and NVFP4 (32 and 16 weights with a scale of
8 bits); int4-gN (N weights with a 16-bit scale and a 4-bit zero point; int4-g32 with the scale alone); nf4 with its
scales quantised in turn. Mixtures (q2_k and names ending in _s, _m, _l) give some matrices more bits. Their figures
make Llama 3.1 8B as large as its published files: 3.16 bits per weight over all for q2_k, 3.64, 4.00 and 4.30 for
q3_k_s, _m and _l, 4.67 for q4_k_s, 5.57 and 5.70 for q5_k_s and _m; other shapes differ by up to 3 %. q4_k_m is the
usual 4.85 bits (docs/formulas.md) with a wide table, up to 4 % too large: fitted engine constants rest on that figure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from headrace.dtypes import DTYPES
from headrace.errors import InvalidRequestError, near_names
from headrace.model.gguf_index import BLOCKS
from headrace.model.model import Layer, LayerGroup, Model

_HEAD_BITS = 6.5625
"""q6_k, which GGUF files give the head"""


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How many bits a weight takes, scales included: in the matrices of layers, in the embedding table, in the head."""

    name: str
    bits: float
    embedding_bits: float = 16.0
    head_bits: float = 16.0
    arithmetic: str = "bf16"
    """what it is multiplied in where the processor has units for it; else in 16 bits"""
    packed: bool = True
    """unpacked to 16 bits before it is multiplied"""


def _mixture(name: str, bits: float, base: float) -> WeightFormat:
    return WeightFormat(name=name, bits=bits, embedding_bits=base, head_bits=max(base, _HEAD_BITS))


_GGUF_TYPES = {
    name: size * 8 / block for name, block, size in BLOCKS.values() if block > 1 and name not in {"mxfp4", "nvfp4"}
}

FORMATS: dict[str, WeightFormat] = {
    entry.name: entry
    for entry in (
        WeightFormat(name="fp32", bits=32, embedding_bits=32, head_bits=32, arithmetic="fp32", packed=False),
        WeightFormat(name="bf16", bits=16, packed=False),
        WeightFormat(name="fp16", bits=16, packed=False),
        WeightFormat(name="fp8", bits=8, arithmetic="fp8", packed=False),
        WeightFormat(name="int8", bits=8.125, arithmetic="int8"),
        WeightFormat(name="int4", bits=4.25),
        WeightFormat(name="int4-g32", bits=4 + 16 / 32),
        WeightFormat(name="int4-g64", bits=4 + 20 / 64),
        WeightFormat(name="int4-g128", bits=4 + 20 / 128),
        WeightFormat(name="nf4", bits=4 + 8 / 64 + 32 / (64 * 256)),
        WeightFormat(name="mxfp4", bits=4.25, arithmetic="fp4"),
        WeightFormat(name="nvfp4", bits=4.5, arithmetic="fp4", packed=False),
        *(_mixture(name, bits, bits) for name, bits in _GGUF_TYPES.items()),
        _mixture("q2_k", 2.943, 2.625),
        _mixture("q3_k_s", 3.4375, 3.4375),
        _mixture("q3_k_m", 3.851, 3.4375),
        _mixture("q3_k_l", 4.192, 3.4375),
        _mixture("q4_k_s", 4.537, 4.5),
        WeightFormat(name="q4_k_m", bits=4.85, embedding_bits=_HEAD_BITS, head_bits=_HEAD_BITS),
        _mixture("q5_k_s", 5.5, 5.5),
        _mixture("q5_k_m", 5.654, 5.5),
    )
}
NARROWER_FORMATS = ("int8", "int4")
"""what is tried where a model does not fit"""

_OTHER_NAMES = {
    **{name: dtype.short_name for dtype in DTYPES.values() for name in (dtype.name, dtype.stored_name.lower())},
    "half": "fp16",
    "16": "bf16",
    "8": "int8",
    "4": "int4",
    "8bit": "int8",
    "4bit": "int4",
    "fp4": "nvfp4",
    "awq": "int4-g128",
    "gptq": "int4-g128",
    "q4": "q4_0",
    "q40": "q4_0",
    "q8": "q8_0",
    "bnb": "nf4",
    "bnb4": "nf4",
    "q4_k_xl": "q4_k_m",
    "q6": "q6_k",
    "q2_k_xl": "q2_k",
}


def find_format(name: str) -> WeightFormat:
    """Return the format of this name, or of another that it goes by; raises InvalidRequestError with near matches."""
    key = name.strip().lower().replace(" ", "")
    key = _OTHER_NAMES.get(key, key)
    if key not in FORMATS:
        raise InvalidRequestError(
            f"there is no weight format {name!r}; {near_names(key, FORMATS)}known: {', '.join(FORMATS)}"
        )
    return FORMATS[key]


def known_format(name: str) -> WeightFormat:
    """The format that a model names as its own, which may have groups of a size that is in no table."""
    return FORMATS.get(name, WeightFormat(name=name, bits=0.0))


def is_format(name: str) -> bool:
    """Whether a format goes by this name."""
    key = name.strip().lower()
    return _OTHER_NAMES.get(key, key) in FORMATS


def requantised(model: Model, name: str) -> Model:
    """The same model with its weights in the format of this name; raises InvalidRequestError for unknown ones."""
    return with_format(model, find_format(name))


def with_format(model: Model, chosen: WeightFormat) -> Model:
    """The same model with its weights in another format; norms and biases stay in 16 bits (32 with fp32)."""
    other = 4.0 if chosen.name == "fp32" else 2.0
    embedding_bits = max(chosen.embedding_bits, chosen.head_bits) if model.tied else chosen.embedding_bits
    return replace(
        model,
        groups=tuple(LayerGroup(layer=_layer(group.layer, chosen, other), count=group.count) for group in model.groups),
        embedding_bytes=model.embedding_parameters * embedding_bits / 8,
        head_bytes=model.head_parameters * chosen.head_bits / 8,
        other_bytes=model.other_parameters * other,
        weight_format=chosen.name,
    )


def _layer(layer: Layer, chosen: WeightFormat, other: float) -> Layer:
    byte = chosen.bits / 8
    return replace(
        layer,
        attention_bytes=layer.attention_parameters * byte,
        feed_forward_bytes=layer.feed_forward_parameters * byte,
        expert_bytes=layer.expert_parameters * byte,
        other_bytes=layer.other_parameters * other,
    )
