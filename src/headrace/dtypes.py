"""Formats of single numbers, under every name that they go by. `model/formats.py` has those of weights with scales."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Dtype(NamedTuple):
    """A format that weights are stored in and products are computed in."""

    name: str
    """torch's, and that of a config.json"""
    stored_name: str
    """that of safetensors files"""
    short_name: str
    """that of machine files and of weight formats"""
    size_bytes: int


DTYPES: Mapping[str, Dtype] = MappingProxyType(
    {
        "float32": Dtype("float32", "F32", "fp32", 4),
        "bfloat16": Dtype("bfloat16", "BF16", "bf16", 2),
        "float16": Dtype("float16", "F16", "fp16", 2),
    }
)
STORED_DTYPES: Mapping[str, Dtype] = MappingProxyType({dtype.stored_name: dtype for dtype in DTYPES.values()})
"""The same by the name in safetensors files."""

STORED_BYTES: Mapping[str, int] = MappingProxyType(
    dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1)
    | dict.fromkeys(("I16", "U16", "F16", "BF16"), 2)
    | dict.fromkeys(("I32", "U32", "F32"), 4)
    | dict.fromkeys(("I64", "U64", "F64"), 8)
)
"""Bytes per element of everything that headrace reads from safetensors files."""

ARITHMETIC_FORMATS = (*(dtype.short_name for dtype in DTYPES.values()), "fp8", "int8", "fp4")
"""What processors multiply in."""
