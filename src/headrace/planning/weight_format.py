"""Formats that weights are stored in: bits per weight with the scales that come with them.

For whole files the bytes are the tensors' own (`shape_from_index`); the table serves where only a format is named.
Sources: the GGUF type table (bytes per block), the MX and NVFP4 definitions (blocks of 32 and 16 with an 8-bit scale),
groups of 128 with a 16-bit scale and a 4-bit zero for int4 by GPTQ and AWQ, docs/formulas.md section 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from headrace.errors import InvalidRequestError
from headrace.planning.model_shape import LayerGroup, LayerShape, ModelShape
from headrace.planning.near_names import near_names


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How many bits a weight takes, scales included, in the matrices of layers and in embedding and head."""

    name: str
    bits: float
    end_bits: float = 16.0
    """of the embedding table and the head, which most formats leave in 16 bits"""


FORMATS: dict[str, WeightFormat] = {
    entry.name: entry
    for entry in (
        WeightFormat(name="fp32", bits=32, end_bits=32),
        WeightFormat(name="bf16", bits=16),
        WeightFormat(name="fp16", bits=16),
        WeightFormat(name="fp8", bits=8),
        WeightFormat(name="int8", bits=8.125),
        WeightFormat(name="int4", bits=4.25),
        WeightFormat(name="int4-g32", bits=4.5),
        WeightFormat(name="int4-g128", bits=4.156),
        WeightFormat(name="nf4", bits=4.127),
        WeightFormat(name="mxfp4", bits=4.25),
        WeightFormat(name="nvfp4", bits=4.5),
        WeightFormat(name="q8_0", bits=8.5, end_bits=8.5),
        WeightFormat(name="q6_k", bits=6.5625, end_bits=6.5625),
        WeightFormat(name="q5_k_m", bits=5.69, end_bits=6.5625),
        WeightFormat(name="q5_0", bits=5.5, end_bits=6.5625),
        WeightFormat(name="q4_k_m", bits=4.85, end_bits=6.5625),
        WeightFormat(name="q4_k_s", bits=4.58, end_bits=6.5625),
        WeightFormat(name="q4_1", bits=5.0, end_bits=6.5625),
        WeightFormat(name="q4_0", bits=4.5, end_bits=6.5625),
        WeightFormat(name="q3_k_m", bits=3.91, end_bits=6.5625),
        WeightFormat(name="q2_k", bits=2.96, end_bits=6.5625),
        WeightFormat(name="iq2_xxs", bits=2.0625, end_bits=5.5),
    )
}
_OTHER_NAMES = {
    "f32": "fp32",
    "float32": "fp32",
    "f16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
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
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
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


def requantised(shape: ModelShape, name: str) -> ModelShape:
    """The same model with its weights in another format; norms and biases stay in 16 bits (32 with fp32)."""
    chosen = find_format(name)
    other = 4.0 if chosen.name == "fp32" else 2.0
    return replace(
        shape,
        groups=tuple(LayerGroup(layer=_layer(group.layer, chosen, other), count=group.count) for group in shape.groups),
        embedding_bytes=shape.embedding_parameters * chosen.end_bits / 8,
        head_bytes=shape.head_parameters * chosen.end_bits / 8,
        other_bytes=shape.other_parameters * other,
        weight_format=chosen.name,
        notes=tuple(note for note in shape.notes if not note.startswith("weights:")),
    )


def _layer(layer: LayerShape, chosen: WeightFormat, other: float) -> LayerShape:
    byte = chosen.bits / 8
    return replace(
        layer,
        attention_bytes=layer.attention_parameters * byte,
        feed_forward_bytes=layer.feed_forward_parameters * byte,
        expert_bytes=layer.expert_parameters * byte,
        other_bytes=layer.other_parameters * other,
    )
