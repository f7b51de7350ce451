"""What transformers_seam.py relies upon, name by name, so that a release that changes one fails here and says which."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel, masking_utils

import headrace
from headrace.inference import transformers_seam as seam
from headrace.inference.host_cache import HostLayer
from headrace.inference.kv_cache import PreallocatedLayer
from tiny_models import CONFIGS, resident_reference, save_tiny

pytestmark = pytest.mark.versions


def tiny_config(name: str) -> Any:
    class_name, options = CONFIGS[name]
    return getattr(transformers, class_name)(**options)


def tiny_model(name: str) -> Any:
    with torch.device("meta"):
        return seam.make_model(seam.causal_class_of(tiny_config(name)), tiny_config(name), dtype=torch.float32)


def keeps_norms_in_float32() -> bool:
    model = tiny_model("llama")
    model._keep_in_fp32_modules_strict = {"norm"}
    dtype_of = seam.dtype_of_parameters(model, torch.bfloat16)
    kept = [dtype_of(name, torch.bfloat16) for name in ("model.norm.weight", "lm_head.weight")]
    return kept == [torch.float32, torch.bfloat16]


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def sliding_and_full() -> Any:
    return seam.DynamicCache(config=tiny_config("gemma3"))


RELIED_UPON: dict[str, Callable[[], bool]] = {
    "GenerationMixin, one pass at a time": lambda: all(
        set(names) <= set(parameters(getattr(GenerationMixin, function)))
        for function, names in {
            "prepare_inputs_for_generation": ("input_ids", "next_sequence_length", "is_first_iteration"),
            "_prepare_position_ids_for_generation": ("inputs_tensor", "model_kwargs"),
            "_update_model_kwargs_for_generation": ("outputs", "model_kwargs", "is_encoder_decoder"),
            "_supports_logits_to_keep": (),
        }.items()
    ),
    "AutoModelForCausalLM._model_mapping": lambda: seam.causal_class_of(tiny_config("llama")) is LlamaForCausalLM,
    "PreTrainedModel._from_config": lambda: isinstance(
        seam.make_model(LlamaForCausalLM, tiny_config("llama"), dtype=torch.bfloat16, attn_implementation="eager"),
        LlamaForCausalLM,
    ),
    "PreTrainedModel._supports_attention_backend": lambda: (
        PreTrainedModel._supports_attention_backend is False and LlamaForCausalLM._supports_attention_backend is True
    ),
    "PreTrainedModel._get_dtype_plan": lambda: keeps_norms_in_float32(),
    "PreTrainedModel.all_tied_weights_keys": lambda: (
        seam.ties_of(tiny_model("llama-tied")) == {"lm_head.weight": "model.embed_tokens.weight"}
        and seam.ties_of(tiny_model("llama")) == {}
    ),
    "GenerationMixin._get_logits_processor": lambda: (
        [
            type(own).__name__
            for own in seam.logits_processors(
                transformers.GenerationConfig(do_sample=True, top_k=7), [5], [], ends=[2], vocab_size=320
            )
        ]
        == ["TopKLogitsWarper"]
    ),
    "AttentionMaskInterface.register": lambda: parameters(seam.AttentionMaskInterface.register) == ["key", "value"],
    "create_causal_mask(mask_function)": lambda: "mask_function" in parameters(masking_utils.sdpa_mask),
    "GenerationMixin.prepare_inputs_for_generation": lambda: (
        "next_sequence_length" in parameters(GenerationMixin.prepare_inputs_for_generation)
    ),
    "RotaryEmbedding.rope_type": lambda: tiny_model("llama").model.rotary_emb.rope_type == "default",
    "config._attn_implementation": lambda: hasattr(type(tiny_config("llama")), "_attn_implementation"),
    "AttentionInterface.register": lambda: parameters(seam.AttentionInterface.register) == ["key", "value"],
    "GenerationMixin._prepare_cache_for_generation": lambda: (
        parameters(GenerationMixin._prepare_cache_for_generation)
        == parameters(seam.GenerationHooks._prepare_cache_for_generation)
    ),
    "GenerationMixin._get_candidate_generator": lambda: hasattr(GenerationMixin, "_get_candidate_generator"),
    "CandidateGenerator.get_candidates": lambda: (
        parameters(seam.CandidateGenerator.get_candidates)[:2] == ["self", "input_ids"]
    ),
    "CandidateGenerator.update_candidate_strategy": lambda: (
        parameters(seam.CandidateGenerator.update_candidate_strategy) == ["self", "input_ids", "scores", "num_matches"]
    ),
    "DynamicCache.layers": lambda: (
        {type(layer).__name__ for layer in sliding_and_full().layers} == {"DynamicLayer", "DynamicSlidingWindowLayer"}
    ),
    "DynamicCache.activate_past_recording": lambda: sliding_and_full().activate_past_recording() is None,
    "DynamicSlidingWindowLayer.sliding_window": lambda: (
        {layer.sliding_window for layer in sliding_and_full().layers if layer.is_sliding} == {8}
    ),
    "DynamicLayer.lazy_initialization": lambda: (
        parameters(seam.DynamicLayer.lazy_initialization) == ["self", "key_states", "value_states"]
    ),
    "DynamicLayer.is_initialized": lambda: seam.DynamicLayer().is_initialized is False,
    "DynamicLayer.reset": lambda: seam.DynamicLayer().reset() is None,
    "Cache.update": lambda: parameters(seam.Cache.update)[:4] == ["self", "key_states", "value_states", "layer_idx"],
    "Cache.get_seq_length": lambda: parameters(seam.Cache.get_seq_length) == ["self", "layer_idx"],
    "rename_source_key": lambda: len(parameters(seam.rename_source_key)) >= 5,
    "MergeModulelist.dim": lambda: seam.MergeModulelist(dim=0).dim == 0,
    "Concatenate.dim": lambda: seam.Concatenate(dim=1).dim == 1,
    "WeightConverter.source_patterns": lambda: (
        seam.WeightConverter(["a", "b"], "c", operations=[seam.Concatenate(dim=0)]).source_patterns == ["a", "b"]
    ),
    "dot_natural_key": lambda: sorted(["a.10", "a.9"], key=seam.dot_natural_key) == ["a.9", "a.10"],
}


@pytest.mark.parametrize("name", sorted(RELIED_UPON))
def test_transformers_still_has(name: str) -> None:
    assert RELIED_UPON[name]()


LOOKED_AT = {
    *("_abc_impl", "_layer_type", "supports_early_init", "is_compileable", "is_croppable", "is_sliding", "layer_type"),
    *("lazy_initialization", "update", "get_seq_length", "get_mask_sizes", "get_max_length", "get_max_cache_shape"),
    *("reset", "crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "offload", "prefetch"),
    "get_query_offset",
}


@pytest.mark.parametrize("layer", [PreallocatedLayer, HostLayer])
def test_layers_inherit_nothing_that_was_not_looked_at(layer: type) -> None:
    """A method that transformers adds to its layers, and that these inherit, is looked at before it is listed above."""
    assert {name for name in dir(layer.__base__) if not name.startswith("__")} - LOOKED_AT == set()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_model_and_its_inner_one_name_their_cache(name: str) -> None:
    model = tiny_model(name)
    assert seam.cache_argument(model) in parameters(model.forward)
    assert seam.cache_argument(model) == seam.cache_argument(model.base_model)


class Watched(seam.GenerationHooks):
    """A resident model that tells what `generate` asked it for."""

    asked: dict[str, Any]

    def admit(self, **numbers: int) -> None:
        self.asked = dict(numbers)

    def lay_out_cache(self, cache: Any, *, capacity_tokens: int) -> None:
        self.asked["cache"] = cache

    def drafts_from(self, candidates: Any) -> Any:
        self.asked["candidates"] = candidates
        return candidates


@pytest.mark.parametrize("how", ["plain", "given", "lookup", "model"])
def test_generate_asks_for_admission_cache_and_drafts(tmp_path: Path, how: str) -> None:
    model = resident_reference(save_tiny("llama", tmp_path), torch.float32)
    model.__class__ = type("WatchedLlama", (Watched, LlamaForCausalLM), {})
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7]])
    own = seam.DynamicCache(config=model.config)
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "given": {seam.cache_argument(model): own},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "model": {"assistant_model": resident_reference(tmp_path, torch.float32)},
    }
    output = model.generate(
        ids, max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **ways[how]
    )
    assert model.asked["sequences"] == 1
    assert model.asked["context_tokens"] >= ids.shape[1] + 5
    if how == "given":
        assert "cache" not in model.asked, "a cache of the caller's own stays what it is"
        assert seam.cache_in(output) is own
    else:
        assert seam.cache_in(output) is model.asked["cache"]
    candidates = model.asked.get("candidates")
    assert (candidates is not None) is (how in ("lookup", "model"))
    if how == "lookup":
        assert candidates.num_output_tokens == 3
    if how == "model":
        names = ["num_assistant_tokens", "main_model_max_length", "assistant_kwargs", "assistant_model"]
        names += ["generation_config", "assistant_generation_config"]
        assert [name for name in names if not hasattr(candidates, name)] == []
        assert hasattr(candidates.generation_config, "assistant_confidence_threshold")
        assert seam.cache_in(candidates.assistant_kwargs) is not None, "the draft model's cache has another name"


@pytest.mark.usefixtures("made_up_speeds")
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon-alibi", "mixtral"])
def test_the_cache_inside_the_budget_is_the_one_that_is_used(name: str, tmp_path: Path) -> None:
    """Else transformers would make one that grows, beside what was promised."""
    save_tiny(name, tmp_path)
    with headrace.load(tmp_path, memory="64MiB", dtype="float32", prompt_tokens=8, max_tokens=24) as model:
        output = model.generate(
            torch.tensor([[5, 6, 7]]), max_new_tokens=8, min_new_tokens=8, pad_token_id=0, return_dict_in_generate=True
        )
    layers = seam.cache_in(output).layers
    assert {layer.get_seq_length() for layer in layers} == {10}, "three tokens of the prompt, and all but the last"
    own = [layer for layer in layers if not layer.is_sliding]
    assert own
    for layer in own:
        assert isinstance(layer, PreallocatedLayer)
        assert layer.capacity_tokens == 10
        assert layer.keys.stride(1) == layer.capacity_tokens * layer.keys.shape[-1], "a view of the whole length"
