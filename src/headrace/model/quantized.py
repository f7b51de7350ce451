"""The bytes of weights that a config's quantization_config says are quantised.

Scales and zero points are counted as each method stores them. Where the config names modules (those not to convert, or
rules of their own) each matrix is sized by its name, layer by layer. A field of which it is not known here whether it
changes sizes is refused. Rounding of a matrix's last block, and the input order that some files keep (4 bytes per row),
are not counted: the bytes of a checkpoint at hand are read from its tensors (`from_index`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headrace.errors import UnsupportedModelError
from headrace.model.config_fields import Fields
from headrace.model.formats import FORMATS, WeightFormat, find_format, with_format
from headrace.model.model import Layer, LayerGroup, Model
from headrace.model.shape import LayerShape, Matrices, ModelShape

_KEPT_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "llm_int8_skip_modules")
_BITS = (2, 3, 4, 8)
_NESTED_PATHS = ("language_model.model.layers", "model.language_model.layers", "thinker.model.layers")
"""where models of several kinds of input have their text model's layers"""


@dataclass(frozen=True)
class _Names:
    """Modules by name (each stands for all that lies in it) and by pattern."""

    plain: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    def find(self, full_name: str) -> bool:
        """Whether this module, or one that it lies in, is named."""
        parts = full_name.split(".")
        runs = itertools.combinations(range(len(parts) + 1), 2)
        if self.plain and any(".".join(parts[first:last]) in self.plain for first, last in runs):
            return True
        return any(pattern.search(full_name) for pattern in self.patterns)

    @property
    def tells_experts_apart(self) -> bool:
        """Whether one expert may be named and another not."""
        texts = itertools.chain(self.plain, (pattern.pattern for pattern in self.patterns))
        return any(re.search(r"experts\\?\.\(?[\[\d]", text) for text in texts)


Rule = tuple[_Names, WeightFormat | None]
"""modules and the format that they are stored in; None: they stay as they are without quantisation"""


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """What each matrix is stored in: what the first rule says that finds its name, else `otherwise`."""

    chosen: WeightFormat
    """the format that the model goes by"""
    otherwise: WeightFormat | None
    rules: tuple[Rule, ...] = ()
    with_head: bool = False

    def format_of(self, names: Iterable[str]) -> WeightFormat | None:
        """The format of a matrix that goes by these full names."""
        found = list(names)
        for modules, chosen in self.rules:
            if any(modules.find(name) for name in found):
                return chosen
        return self.otherwise


def quantised_as_stored(model: Model, shape: ModelShape, quantization: Any, fields: Fields) -> Model:
    """Give the weights the formats that quantization_config names.

    Raises CheckpointError for a config that makes no sense, UnsupportedModelError for a method or a field of which the
    size is not known.
    """
    if not isinstance(quantization, Mapping):
        raise fields.wrong(f"quantization_config is {quantization!r}; an object is expected")
    inner = Fields(quantization, f"{fields.origin}: quantization_config")
    method = str(quantization.get("quant_method", "")).lower().replace("_", "-")
    if method not in _METHODS and method.replace("-", "_") in FORMATS:
        return with_format(model, find_format(method.replace("-", "_")))
    if method not in _METHODS:
        raise UnsupportedModelError(
            f"{fields.origin}: headrace does not know the size of weights quantised by "
            f"{method or 'an unnamed method'}; known: {', '.join(_METHODS)}"
        )
    reader, known = _METHODS[method]
    _only_known(inner, f"quant_method {known} {' '.join(_KEPT_LISTS)}")
    stored = reader(inner, model)
    kept = _names(_listed(inner, *_KEPT_LISTS), inner)
    return _sized(model, shape, replace(stored, rules=((kept, None), *stored.rules)))


# -- methods ------------------------------------------------------------------------------------------------------


def _all(chosen: WeightFormat) -> _Stored:
    return _Stored(chosen=chosen, otherwise=chosen)


def _awq(fields: Fields, model: Model) -> _Stored:
    return _all(_grouped_integers(fields, model))


def _gptq(fields: Fields, model: Model) -> _Stored:
    """With rules of GPTQModel's: a pattern after -: is not quantised, one after +: (or nothing) as its entry says."""
    chosen = _grouped_integers(fields, model)
    dynamic = fields.raw.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(isinstance(entry, Mapping) for entry in dynamic.values()):
        raise fields.wrong(f"dynamic is {dynamic!r:.80}; an object of rules is expected")
    rules: list[Rule] = []
    for text, entry in dynamic.items():
        own = Fields({**fields.raw, **entry}, f"{fields.origin}.dynamic.{text}")
        _only_known(Fields(entry, own.origin), f"bits group_size {_GPTQ_SAME_SIZE}")
        names = _names([f"re:{text.removeprefix('+:').removeprefix('-:')}"], fields)
        rules.append((names, None if text.startswith("-:") else _grouped_integers(own, model)))
    otherwise: WeightFormat | None = chosen
    lists = fields.raw.get("modules_in_block_to_quantize")
    if lists is not None:
        if not isinstance(lists, list) or not all(isinstance(names, list) for names in lists):
            raise fields.wrong(f"modules_in_block_to_quantize is {lists!r:.80}; a list of lists of names is expected")
        rules.append((_names([str(name) for names in lists for name in names], fields), chosen))
        otherwise = None
    return _Stored(chosen=chosen, otherwise=otherwise, rules=tuple(rules), with_head=fields.flag("lm_head"))


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


def _fp8(fields: Fields, _: Model) -> _Stored:
    """One 32-bit scale per block of a matrix where blocks are named, else next to none."""
    if fields.raw.get("expert_dtype", "fp8") != "fp8":
        raise fields.wrong(f"expert_dtype is {fields.raw['expert_dtype']!r}; fp8 is known")
    block = fields.raw.get("weight_block_size")
    chosen = find_format("fp8")
    if block is not None:
        chosen = replace(chosen, bits=8 + 32 / _block_elements(block, "weight_block_size", fields))
    converted = _listed(fields, "modules_to_convert")
    if not converted:
        return _all(chosen)
    return _Stored(chosen=chosen, otherwise=None, rules=((_names(converted, fields), chosen),))


def _block_elements(block: Any, name: str, fields: Fields) -> int:
    sizes = block if isinstance(block, Sequence) and not isinstance(block, str) else ()
    if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
        raise fields.wrong(f"{name} is {block!r}; two positive whole numbers are expected")
    return int(sizes[0] * sizes[1])


def _bitsandbytes(fields: Fields, model: Model) -> _Stored:
    """4 bits: a scale per 64 weights (32 bits, or 8 where scales are quantised too); 8 bits: one per row."""
    if fields.flag("load_in_4bit") or fields.flag("_load_in_4bit"):
        nf4 = find_format("nf4")
        return _all(nf4 if fields.flag("bnb_4bit_use_double_quant") else replace(nf4, bits=4 + 32 / 64))
    if fields.flag("load_in_8bit") or fields.flag("_load_in_8bit"):
        int8 = WeightFormat(name="int8", bits=8 + 32 / model.hidden_size)
        return _Stored(chosen=int8, otherwise=None if fields.flag("llm_int8_has_fp16_weight") else int8)
    raise fields.wrong("neither load_in_4bit nor load_in_8bit is true; one of them is expected")


def _mxfp4(fields: Fields, model: Model) -> _Stored:
    """Experts alone."""
    if not any(group.layer.num_experts for group in model.groups):
        raise fields.wrong("mxfp4 is known for models with experts only (gpt_oss); this one has none")
    chosen = find_format("mxfp4")
    return _Stored(chosen=chosen, otherwise=None, rules=((_names(["experts"], fields), chosen),))


def _modelopt(fields: Fields, _: Model) -> _Stored:
    raw = fields.raw.get("quantization")
    nested = Fields(raw if isinstance(raw, Mapping) else {}, f"{fields.origin}.quantization")
    _only_known(nested, "quant_algo kv_cache_quant_algo group_size exclude_modules has_zero_point pre_quant_scale")
    named = fields.raw.get("quant_algo", nested.raw.get("quant_algo"))
    found = {"NVFP4": "nvfp4", "FP8": "fp8", "MXFP4": "mxfp4"}.get(str(named).upper())
    if found is None:
        raise fields.wrong(f"quant_algo is {named!r}; NVFP4, MXFP4 and FP8 are known")
    excluded = _names(_listed(nested, "exclude_modules"), nested)
    return replace(_all(find_format(found)), rules=((excluded, None),))


def _compressed(fields: Fields, model: Model) -> _Stored:
    """Config groups, each with the type, bits and grouping of its weights, and the modules that it is for."""
    for name in ("sparsity_config", "transform_config"):
        value = fields.raw.get(name)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise UnsupportedModelError(f"{fields.origin}: headrace does not know what sizes {name} gives weights")
    groups = fields.raw.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise fields.wrong(f"config_groups is {groups!r}; an object of groups is expected")
    rules: list[Rule] = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise fields.wrong(f"config_groups.{name} has no weights; an object is expected")
        own = Fields(group, f"{fields.origin}.config_groups.{name}")
        _only_known(own, "weights targets format input_activations output_activations")
        packing = group.get("format") or fields.raw.get("format")
        chosen = _compressed_group(Fields(weights, f"{own.origin}.weights"), model, packing)
        targets = _listed(own, "targets") or ["Linear"]
        everywhere = any(target in _CLASSES for target in targets)
        rules.append((_names(["*"] if everywhere else targets, own), chosen))
    first = rules[0][1]
    assert first is not None
    with_head = any("Linear" in (group.get("targets") or ()) for group in groups.values())
    return _Stored(chosen=first, otherwise=None, rules=tuple(rules), with_head=with_head)


_CLASSES = ("Linear", "FusedMoE", "MoEGMM")
"""targets that are classes of modules, not names"""


def _compressed_group(fields: Fields, model: Model, packing: Any) -> WeightFormat:
    _only_known(
        fields,
        "num_bits type symmetric group_size strategy block_structure dynamic actorder observer observer_kwargs "
        "scale_dtype zp_dtype",
    )
    if packing not in _PACKINGS:
        raise UnsupportedModelError(f"{fields.origin}: format is {packing!r}; known: {', '.join(_PACKINGS[1:])}")
    bits, kind = fields.count("num_bits"), fields.raw.get("type", "int")
    strategy = fields.raw.get("strategy") or ("group" if fields.raw.get("group_size") else "channel")
    group = _group_size(fields, model, "group_size", default=model.hidden_size)
    if strategy == "block":
        group = _block_elements(fields.raw.get("block_structure"), "block_structure", fields)
    if kind == "float" and bits in {4, 8}:
        if bits == 4:
            return find_format("mxfp4" if group == 32 else "nvfp4")
        scaled = strategy in ("group", "block")
        return replace(find_format("fp8"), bits=8 + 16 / group) if scaled else find_format("fp8")
    if kind != "int" or bits not in _BITS:
        raise fields.wrong(f"{kind} of {bits} bits; int of 2, 3, 4, 8 and float of 4, 8 are known")
    zero = 0 if fields.flag("symmetric", default=True) else bits
    if packing in ("int-quantized", "naive-quantized"):
        bits = 8  # one weight to a byte, whatever its bits
    if bits == 8 and strategy != "group":
        return WeightFormat(name="int8", bits=8 + (16 + zero) / model.hidden_size)
    return _integers(bits, group, extra=16 + zero)


_PACKINGS = (
    None, "pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mixed-precision",
)  # fmt: skip
_GPTQ_SAME_SIZE = (
    "sym desc_act act_group_aware static_groups damp_percent damp_auto_increment mse true_sequential hyb_act v2 "
    "gptaq foem hessian failsafe fallback smooth"
)
_METHODS: dict[str, tuple[Callable[[Fields, Model], _Stored], str]] = {
    # how each is read, and its fields: those that are read, then those that change no size
    "awq": (
        _awq,
        "bits w_bit group_size q_group_size "
        "zero_point version backend do_fuse fuse_max_seq_len modules_to_fuse exllama_config",
    ),
    "gptq": (
        _gptq,
        "bits group_size dynamic lm_head modules_in_block_to_quantize "
        "tokenizer dataset format checkpoint_format is_marlin_format pack_dtype pack_impl meta quantizer backend "
        "method model_seqlen batch_size pad_token_id max_input_length cache_block_outputs block_name_to_quantize "
        "module_name_preceding_first_block model_name_or_path model_file_base_name use_cuda_fp16 use_exllama "
        f"disable_exllama exllama_config offload_to_disk offload_to_disk_path {_GPTQ_SAME_SIZE}",
    ),
    "fp8": (
        _fp8,
        "weight_block_size modules_to_convert expert_dtype activation_scheme fmt scale_fmt dequantize kv_cache_scheme",
    ),
    "fbgemm-fp8": (_fp8, "activation_scale_ub"),
    "bitsandbytes": (
        _bitsandbytes,
        "load_in_4bit _load_in_4bit load_in_8bit _load_in_8bit bnb_4bit_use_double_quant llm_int8_has_fp16_weight "
        "bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_quant_storage llm_int8_threshold "
        "llm_int8_enable_fp32_cpu_offload",
    ),
    "mxfp4": (_mxfp4, "dequantize"),
    "modelopt": (
        _modelopt,
        "quant_algo quantization config_groups producer kv_cache_scheme kv_cache_quant_algo version",
    ),
    "compressed-tensors": (
        _compressed,
        "config_groups format sparsity_config transform_config "
        "kv_cache_scheme version global_compression_ratio quantization_status run_compressed",
    ),
}


def _only_known(fields: Fields, known: str) -> None:
    for name, value in fields.raw.items():
        if name not in known.split() and value not in (None, {}, []):
            raise UnsupportedModelError(
                f"{fields.origin} has {name!r:.80}, of which headrace does not know whether it changes sizes; take it "
                "out of config.json if it changes none"
            )


# -- names --------------------------------------------------------------------------------------------------------


def _listed(fields: Fields, *names: str) -> list[str]:
    found: list[str] = []
    for name in names:
        value = fields.raw.get(name)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise fields.wrong(f"{name} is {value!r:.80}; a list of names is expected")
        found += value
    return found


def _names(texts: Iterable[str], fields: Fields) -> _Names:
    """Names as the methods write them; `re:` begins a regular expression, * is any text."""
    plain, patterns = set(), []
    for text in texts:
        if text.startswith("re:"):
            try:
                patterns.append(re.compile(rf"^(?:{text[3:]})"))
            except re.error as error:
                raise fields.wrong(f"{text!r:.80} is no regular expression: {error}") from error
        elif "*" in text:
            patterns.append(re.compile(r"(?:^|\.)" + re.escape(text).replace(r"\*", ".*") + r"(?:\.|$)"))
        else:
            plain.add(text)
    return _Names(frozenset(plain), tuple(patterns))


# -- sizes --------------------------------------------------------------------------------------------------------


def _sized(model: Model, shape: ModelShape, stored: _Stored) -> Model:
    """Give every matrix of every layer the bytes of its format, and the head where it is converted too."""
    small = with_format(model, stored.chosen)
    layers = [
        _sized_layer(before, after, described, index, shape.path, stored)
        for index, (before, after, described) in enumerate(
            zip(model.layers(), small.layers(), shape.layers, strict=True)
        )
    ]
    groups = tuple(LayerGroup(layer=layer, count=len(list(run))) for layer, run in itertools.groupby(layers))
    sized = replace(small, groups=groups, other_bytes=model.other_bytes)
    head = stored.format_of(["lm_head"]) if stored.with_head and not model.tied else None
    return sized if head is None else replace(sized, head_bytes=model.head_parameters * head.bits / 8)


def _sized_layer(before: Layer, after: Layer, shape: LayerShape, index: int, path: str, stored: _Stored) -> Layer:
    plain = before.attention_bytes / before.attention_parameters

    def part(matrices: Matrices) -> float:
        return sum(elements * weight(name) for name, elements in matrices.items())

    def weight(name: str) -> float:
        found = stored.format_of(f"{prefix}.{index}.{name}" for prefix in (path, *_NESTED_PATHS))
        return plain if found is None else found.bits / 8

    experts = [shape.feed.expert]
    if any(names.tells_experts_apart for names, _ in stored.rules):
        experts = [
            {name.replace("experts.0.", f"experts.{number}."): elements for name, elements in shape.feed.expert.items()}
            for number in range(shape.feed.num_experts)
        ]
    return replace(
        after,
        attention_bytes=part(shape.attention.matrices),
        feed_forward_bytes=part(shape.feed.matrices),
        expert_bytes=sum(map(part, experts)) / len(experts) if experts else 0.0,
        other_bytes=before.other_bytes,
    )
