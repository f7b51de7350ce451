"""All that headrace knows of transformers' inside: what its documentation does not promise and a release may change.

No other file imports a module within transformers or one of its private names (tests/test_house.py), and
tests/inference/test_transformers_seam.py names each thing relied upon here. The range in pyproject.toml is what was
tested: `make versions` runs the least and the newest of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PretrainedConfig,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import causal_mask_function

from headrace.errors import InvalidRequestError

__all__ = [
    "CROPS_SLIDING_DRAFTS",
    "ROPE_BY_LENGTH",
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CandidateGenerator",
    "Concatenate",
    "DynamicCache",
    "DynamicLayer",
    "GenerationHooks",
    "GenerationPasses",
    "MergeModulelist",
    "WeightConverter",
    "WeightRenaming",
    "bends_scores",
    "cache_argument",
    "cache_in",
    "cached_in_layers",
    "causal_class_of",
    "causal_mask_function",
    "chunks_of",
    "computes_anew",
    "dot_natural_key",
    "draft_without_confidence",
    "dtype_of_parameters",
    "exchanges_attention",
    "get_model_conversion_mapping",
    "length_switch",
    "logits_processors",
    "make_model",
    "rename_source_key",
    "set_draft_length",
    "ties_of",
    "use_attention",
]

_CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
"""what a forward pass calls its cache: the first from 5.24 on, the others before, the last in state-space models"""

_DELTA_RULE_CHUNK = 64
"""tokens; the default of a function, kept nowhere"""

CROPS_SLIDING_DRAFTS = Version(transformers.__version__) >= Version("5.18")
"""a sliding layer that records its past attends within its window when several drafts follow one another"""


# Classes of models


def causal_class_of(config: Any) -> Any:
    """The class for causal language modelling of models with this config; None where transformers has none."""
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def make_model(model_class: Any, config: Any, *, dtype: Any, **options: Any) -> Any:
    """Make the model as `from_pretrained` does before it reads weights; it is the caller who sees to their memory."""
    return model_class._from_config(config, dtype=dtype, **options)


def dtype_of_parameters(model: Any, dtype: torch.dtype) -> Callable[[str, torch.dtype], torch.dtype]:
    """What says in which dtype `from_pretrained` gives a parameter, by name and by what its class made it in.

    A class may keep some in 32 bits whatever is asked for.
    """
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda _name, own: own
    pattern, names, _ = build_glob_alternation(list(plan))

    def found(name: str, own: torch.dtype) -> torch.dtype:
        match = pattern.search(name)
        return own if match is None else plan[names[match.lastgroup]]

    return found


def ties_of(model: Any) -> dict[str, str]:
    """Parameters that are another one: name -> name of the other."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def chunks_of(module: Any) -> tuple[int, int]:
    """Tokens of a chunk of linear attention, and numbers of 32 bits held for each; (0, 0) for other modules.

    The functions in plain torch hold, for each head, some three tables of positions by positions within a chunk and six
    tensors each as wide as keys and as values; measured on Mamba 2 and the gated delta rule.
    """
    for names in (
        ("num_heads", "ssm_state_size", "head_dim", "chunk_size"),
        ("num_v_heads", "head_k_dim", "head_v_dim"),
    ):
        found = [value for name in names if isinstance(value := getattr(module, name, None), int)]
        if len(found) == len(names):
            heads, keys, values, chunk = (*found, _DELTA_RULE_CHUNK)[:4]
            return chunk, heads * (3 * chunk + 6 * keys + 6 * values)
    return 0, 0


def exchanges_attention(model: Any) -> bool:
    """Whether the model's attention goes through the register of attention functions."""
    return bool(getattr(model, "_supports_attention_backend", False))


ROPE_BY_LENGTH = ("dynamic", "longrope")
"""kinds of rotary embeddings whose frequencies follow the longest sequence of a pass"""


def length_switch(config: Any) -> int | None:
    """Tokens beyond which positions depend on how long the longest sequence of a pass is; None: they never do."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = [parameters, *(inner for inner in parameters.values() if isinstance(inner, dict))]
    found = [kind for kind in kinds if kind.get("rope_type") in ROPE_BY_LENGTH]
    limits = [
        kind["original_max_position_embeddings"] if kind["rope_type"] == "longrope" else text.max_position_embeddings
        for kind in found
    ]
    return min(limits, default=None)


def computes_anew(model: Any, tokens: int) -> bool:
    """Whether `generate` forgets the keys and values of a sequence that grows beyond so many tokens."""

    class Filled(DynamicCache):  # type: ignore[misc]  # transformers is untyped
        def get_seq_length(self, layer_idx: int = 0) -> int:
            del layer_idx
            return tokens

    ids, cache = torch.zeros((1, tokens + 1), dtype=torch.long), Filled()
    cache.layers.append(DynamicLayer())  # an empty cache counts as none
    given = {cache_argument(model): cache, "attention_mask": torch.ones_like(ids), "use_cache": True}
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **given)
    return cache_in(inputs) is not cache


def use_attention(model: Any, name: str) -> None:
    """Let the model's attention be the registered function `name` from the next pass on."""
    model.config._attn_implementation = name


def bends_scores(model: Any) -> bool:
    """Whether the model's present attention heeds a softcap; sdpa, which 5.17 takes for Gemma 2, does not."""
    return bool(model.config._attn_implementation != "sdpa")


# Caches


def cache_argument(model: Any) -> str:
    """What this model's forward pass calls its cache, as an argument and in its output."""
    accepted = inspect.signature(type(model).forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in accepted), _CACHE_ARGUMENTS[0])


def cached_in_layers(cache: Any) -> bool:
    """Whether this is transformers' own cache, made of layers; some models have one of their own."""
    return type(cache) is DynamicCache


def cache_in(values: Any) -> Any:
    """The cache among a model's arguments or in its output, under whatever name; None where there is none."""
    return next((values[name] for name in _CACHE_ARGUMENTS if name in values and values[name] is not None), None)


# Generation


class GenerationHooks:
    """The two places where `generate` asks a model for something of its own. Mixed in before the transformers class."""

    def admit(self, *, sequences: int, context_tokens: int) -> None:
        """Let a request in or raise, before anything is computed for it."""
        raise NotImplementedError

    def lay_out_cache(self, cache: DynamicCache, *, capacity_tokens: int) -> None:
        """Take over the layers of an empty cache that transformers made for at most so many tokens."""
        raise NotImplementedError

    def drafts_from(self, candidates: Any) -> Any:
        """The candidate generator to use in place of transformers' own."""
        raise NotImplementedError

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        return self.drafts_from(super()._get_candidate_generator(*args, **kwargs))  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """transformers calls this before the first pass, and takes the cache that is then in `model_kwargs`."""
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        self.admit(sequences=batch_size * copies, context_tokens=max_cache_length)
        given = cache_in(model_kwargs)
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        made = cache_in(model_kwargs)
        if made is not given and generation_config.cache_implementation in (None, "dynamic"):
            self.lay_out_cache(made, capacity_tokens=max_cache_length)


class GenerationPasses:
    """The forward passes of `generate` over sequences of equal length; which tokens follow is the caller's choice.

    Takes a cache for `most_tokens` tokens of each sequence; raises BudgetError where that does not fit.
    """

    def __init__(self, model: Any, *, sequences: int, most_tokens: int) -> None:
        self.model = model
        self.ids = torch.empty((sequences, 0), dtype=torch.long)
        self.given: dict[str, Any] = {"use_cache": True}
        if model._supports_logits_to_keep():
            self.given["logits_to_keep"] = 1
        model._prepare_cache_for_generation(
            GenerationConfig(), self.given, GenerationMode.GREEDY_SEARCH, sequences, most_tokens
        )

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        """Append ids of shape (sequences, tokens), after the first pass one token; return the last ones' logits."""
        model, begins = self.model, not self.ids.shape[1]
        self.ids = torch.cat((self.ids, ids), dim=-1)
        if begins:
            accepted = inspect.signature(model.forward).parameters
            if "attention_mask" in accepted:
                self.given["attention_mask"] = torch.ones_like(ids)
            if "position_ids" in accepted:
                self.given["position_ids"] = model._prepare_position_ids_for_generation(ids, self.given)
        inputs = model.prepare_inputs_for_generation(
            self.ids, next_sequence_length=None if begins else 1, is_first_iteration=begins, **self.given
        )
        output = model(**inputs, return_dict=True)
        self.given = model._update_model_kwargs_for_generation(output, self.given, is_encoder_decoder=False)
        return output.logits[:, -1]  # type: ignore[no-any-return]


class _Processing(GenerationMixin):  # type: ignore[misc]  # transformers is untyped
    """As much of a model as making logits processors asks for."""

    def __init__(self, vocab_size: int) -> None:
        self.config = PretrainedConfig(vocab_size=vocab_size, is_encoder_decoder=False)


def logits_processors(
    generation_config: Any, prompt: Sequence[int], own: Sequence[Any], *, ends: Iterable[int], vocab_size: int
) -> Any:
    """What `generate` does to the logits of one sequence; `own` comes before temperature and what follows it."""
    last = sorted(ends)
    generation_config._eos_token_tensor = torch.tensor(last) if last else None
    return _Processing(vocab_size)._get_logits_processor(
        generation_config,
        input_ids_seq_length=len(prompt),
        encoder_input_ids=torch.tensor([list(prompt)], dtype=torch.long),
        logits_processor=LogitsProcessorList(own),
        device="cpu",
    )


def set_draft_length(candidates: Any, tokens: int) -> None:
    """Ask a candidate generator of transformers for so many tokens in the next pass."""
    if isinstance(candidates, PromptLookupCandidateGenerator):
        candidates.num_output_tokens = tokens
    else:
        candidates.num_assistant_tokens = tokens


def draft_without_confidence(candidates: Any, build_cache: Callable[..., Any]) -> None:
    """Let a draft model, where there is one, draft as many tokens as it is asked for, into the cache built for it.

    `build_cache(config, capacity_tokens=...)` makes the cache. Raises InvalidRequestError for a text beyond the draft
    model's sliding window where transformers cannot take drafts back from one.
    """
    draft = getattr(candidates, "assistant_model", None)
    if draft is None:
        return
    candidates.generation_config.assistant_confidence_threshold = 0.0
    candidates.assistant_generation_config.assistant_confidence_threshold = 0.0
    if cache_in(candidates.assistant_kwargs) is None:
        tokens = candidates.main_model_max_length
        cache = build_cache(draft.config, capacity_tokens=tokens)
        windows = [layer.sliding_window for layer in cache.layers if layer.is_sliding]
        if not CROPS_SLIDING_DRAFTS and min(windows, default=tokens) < tokens:
            raise InvalidRequestError(
                f"drafts of {type(draft).__name__} reach beyond its sliding window, from which transformers "
                f"{transformers.__version__} cannot take them back; install transformers 5.18 or later, or use "
                "--draft lookup"
            )
        cache.activate_past_recording()  # sliding layers keep what drafts push out until the drafts are accepted
        candidates.assistant_kwargs[cache_argument(draft)] = cache
