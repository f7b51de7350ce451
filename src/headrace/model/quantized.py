"""The bytes of weights that a config's quantization_config says are quantised.

Scales and zero points are counted as each method stores them. What the config keeps in 16 bits (its list of modules
not to convert) is kept, layer by layer; routers of experts, 0.02 % of a model, are counted with the shared matrices.
Rounding of a matrix's last block, and the input order that some files keep (4 bytes per row), are not counted: the
bytes of a checkpoint at hand are read from its tensors (`from_index`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from headrace.errors import UnsupportedModelError
from headrace.model.config_fields import Fields
from headrace.model.formats import FORMATS, WeightFormat, find_format, with_format
from headrace.model.model import Layer, LayerGroup, Model

_KEPT_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "llm_int8_skip_modules")
_ALL_BUT_EXPERTS = ("self_attn", "mlp.up_proj", "mlp.shared_experts")
_BITS = (2, 3, 4, 8)


def quantised_as_stored(model: Model, quantization: Any, fields: Fields) -> Model:
    """Give the weights the format that quantization_config names.

    Raises CheckpointError for a config that makes no sense, UnsupportedModelError for a method of unknown size.
    """
    if not isinstance(quantization, Mapping):
        raise fields.wrong(f"quantization_config is {quantization!r}; an object is expected")
    inner = Fields(quantization, f"{fields.origin}: quantization_config")
    method = str(quantization.get("quant_method", "")).lower().replace("_", "-")
    reader = _METHODS.get(method)
    if reader is None and method.replace("-", "_") in FORMATS:
        return with_format(model, find_format(method.replace("-", "_")))
    if reader is None:
        raise UnsupportedModelError(
            f"{fields.origin}: headrace does not know the size of weights quantised by "
            f"{method or 'an unnamed method'}; known: {', '.join(_METHODS)}"
        )
    kept = _kept_names(inner) + (_ALL_BUT_EXPERTS if reader is _mxfp4 else ())
    return _keeping(model, reader(inner, model), [_pattern(name, inner) for name in kept])


# -- methods ------------------------------------------------------------------------------------------------------


def _grouped_integers(fields: Fields, model: Model) -> WeightFormat:
    """AWQ and GPTQ: per group of weights a 16-bit scale and a zero point as wide as a weight."""
    bits = fields.count("bits", "w_bit")
    if bits not in _BITS:
        raise fields.wrong(f"bits is {bits}; {', '.join(map(str, _BITS))} are known")
    group = _group_size(fields, model, "group_size", "q_group_size")
    return _integers(bits, group, extra=16 + bits)


def _integers(bits: int, group: int, *, extra: float) -> WeightFormat:
    return WeightFormat(name=f"int{bits}-g{group}", bits=bits + extra / group)


def _group_size(fields: Fields, model: Model, *names: str, default: int = 128) -> int:
    if any(fields.raw.get(name) == -1 for name in names):  # one scale for a whole row
        return model.hidden_size
    return fields.count(*names, default=default)


def _fp8(fields: Fields, _: Model) -> WeightFormat:
    """One 32-bit scale per block of a matrix where blocks are named, else next to none."""
    block = fields.raw.get("weight_block_size")
    if block is None:
        return find_format("fp8")
    sizes = block if isinstance(block, Sequence) and not isinstance(block, str) else ()
    if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
        raise fields.wrong(f"weight_block_size is {block!r}; two positive whole numbers are expected")
    return replace(find_format("fp8"), bits=8 + 32 / (sizes[0] * sizes[1]))


def _bitsandbytes(fields: Fields, model: Model) -> WeightFormat:
    """4 bits: a scale per 64 weights (32 bits, or 8 where scales are quantised too); 8 bits: one per row."""
    if fields.flag("load_in_4bit", default=False) or fields.flag("_load_in_4bit", default=False):
        if fields.flag("bnb_4bit_use_double_quant", default=False):
            return find_format("nf4")
        return replace(find_format("nf4"), bits=4 + 32 / 64)
    if fields.flag("load_in_8bit", default=False) or fields.flag("_load_in_8bit", default=False):
        return WeightFormat(name="int8", bits=8 + 32 / model.hidden_size)
    raise fields.wrong("neither load_in_4bit nor load_in_8bit is true; one of them is expected")


def _mxfp4(fields: Fields, model: Model) -> WeightFormat:
    if not any(group.layer.num_experts for group in model.groups):
        raise fields.wrong("mxfp4 is known for models with experts only (gpt_oss); this one has none")
    return find_format("mxfp4")


def _modelopt(fields: Fields, _: Model) -> WeightFormat:
    raw = fields.raw.get("quantization")
    named = fields.raw.get("quant_algo", raw.get("quant_algo") if isinstance(raw, Mapping) else None)
    found = {"NVFP4": "nvfp4", "FP8": "fp8", "MXFP4": "mxfp4"}.get(str(named).upper())
    if found is None:
        raise fields.wrong(f"quant_algo is {named!r}; NVFP4, MXFP4 and FP8 are known")
    return find_format(found)


def _compressed(fields: Fields, model: Model) -> WeightFormat:
    """Config groups, each with the type, bits and grouping of its weights; all must agree."""
    groups = fields.raw.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise fields.wrong(f"config_groups is {groups!r}; an object of groups is expected")
    found = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise fields.wrong(f"config_groups.{name} has no weights; an object is expected")
        found.append(_compressed_group(Fields(weights, f"{fields.origin}.config_groups.{name}.weights"), model))
    if len(set(found)) > 1:
        raise UnsupportedModelError(f"{fields.origin}: groups of different formats; headrace sizes one format only")
    return found[0]


def _compressed_group(fields: Fields, model: Model) -> WeightFormat:
    bits, kind = fields.count("num_bits"), fields.raw.get("type", "int")
    strategy = fields.raw.get("strategy") or ("group" if fields.raw.get("group_size") else "channel")
    group = _group_size(fields, model, "group_size", default=model.hidden_size)
    if kind == "float" and bits in {4, 8}:
        if bits == 8:
            return find_format("fp8") if strategy != "group" else WeightFormat(name="fp8", bits=8 + 16 / group)
        return find_format("mxfp4" if group == 32 else "nvfp4")
    if kind != "int" or bits not in _BITS:
        raise fields.wrong(f"{kind} of {bits} bits; int of 2, 3, 4, 8 and float of 4, 8 are known")
    zero = 0 if fields.flag("symmetric", default=True) else bits
    if bits == 8 and strategy != "group":
        return WeightFormat(name="int8", bits=8 + (16 + zero) / model.hidden_size)
    return _integers(bits, group, extra=16 + zero)


_METHODS: dict[str, Callable[[Fields, Model], WeightFormat]] = {
    "awq": _grouped_integers,
    "gptq": _grouped_integers,
    "fp8": _fp8,
    "fbgemm-fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed,
}


# -- what stays in 16 bits ----------------------------------------------------------------------------------------


def _kept_names(fields: Fields) -> tuple[str, ...]:
    kept: list[str] = []
    for name in _KEPT_LISTS:
        value = fields.raw.get(name)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise fields.wrong(f"{name} is {value!r:.80}; a list of names is expected")
        kept += value
    return tuple(kept)


def _keeping(model: Model, chosen: WeightFormat, patterns: Sequence[re.Pattern[str]]) -> Model:
    """Apply the format to every part of every layer that no pattern names."""
    small = with_format(model, chosen)
    layers = [
        _keep_parts(before, after, index, patterns)
        for index, (before, after) in enumerate(zip(model.layers(), small.layers(), strict=True))
    ]
    groups = tuple(LayerGroup(layer=layer, count=len(list(run))) for layer, run in itertools.groupby(layers))
    return replace(small, groups=groups, other_bytes=model.other_bytes)


def _keep_parts(before: Layer, after: Layer, index: int, patterns: Sequence[re.Pattern[str]]) -> Layer:
    layer = f"model.layers.{index}."
    dense = "mlp.shared_experts.up_proj" if before.num_experts else "mlp.up_proj"
    return replace(
        after,
        attention_bytes=_part(f"{layer}self_attn.o_proj", before.attention_bytes, after.attention_bytes, patterns),
        feed_forward_bytes=_part(f"{layer}{dense}", before.feed_forward_bytes, after.feed_forward_bytes, patterns),
        expert_bytes=_part(f"{layer}mlp.experts.0.up_proj", before.expert_bytes, after.expert_bytes, patterns),
        other_bytes=before.other_bytes,
    )


def _part(name: str, whole: float, small: float, patterns: Sequence[re.Pattern[str]]) -> float:
    return whole if any(pattern.search(name) for pattern in patterns) else small


def _pattern(name: str, fields: Fields) -> re.Pattern[str]:
    """A name that stands for a module and all that lies in it; `re:` begins a regular expression, * is any text."""
    if name.startswith("re:"):
        try:
            return re.compile(rf"^(?:{name[3:]})")
        except re.error as error:
            raise fields.wrong(f"{name!r:.80} is no regular expression: {error}") from error
    return re.compile(r"(?:^|\.)" + re.escape(name).replace(r"\*", ".*") + r"(?:\.|$)")
