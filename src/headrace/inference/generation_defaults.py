"""What a model's generation_config.json asks for, and what of it headrace follows: the same in `run` and `batch`.

Penalties, stops and the way of drawing are followed. Whether tokens are drawn, how many texts there are, and how long
they get is what the options say; where keys and values lie is headrace's own business.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from headrace.errors import CheckpointError
from headrace.inference.skeleton import read_transformers_config
from headrace.inference.transformers_seam import logits_processors
from headrace.model.config_fields import read_config

FILE = "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("length_penalty", "early_stopping")
_ALWAYS = (
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "min_length", "min_new_tokens", "exponential_decay_length_penalty", "remove_invalid_values",
    "renormalize_logits", "watermarking_config",
)  # fmt: skip
_STOPS = "stop_strings"
_LEFT_ASIDE = (
    "penalty_alpha", "dola_layers", "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids",
    "guidance_scale", "token_healing", "num_return_sequences", "max_time", "assistant_early_exit",
)  # fmt: skip
"""fields that would give other texts, or more of them, or shorter ones"""
_NEUTRAL = (None, False, 0, 1)
_TOP_K = 50
"""of draws where neither the model nor the options name one: transformers' own default"""
_REMEDY = "correct it, or give --no-model-defaults"


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """The fields of transformers' GenerationConfig that are followed, and the texts that end an answer."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    left_aside: str = ""
    """a sentence about the rest, where it would have made a difference"""
    vocab_size: int = 0

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text."""
        found = self.fields.get("eos_token_id")
        return frozenset([found] if isinstance(found, int) else found or ())

    def describe(self, *, draws: bool) -> str:
        """What is followed beside the special tokens, in a few words that begin with a comma."""
        names = (*_ALWAYS, *(_DRAWING if draws else ()))
        found = [f"{name} {reprlib.repr(self.fields[name])}" for name in names if self.fields.get(name) not in _NEUTRAL]
        stops = [f"stops at {stop!r}" for stop in self.stops]
        return "".join(f", {words}" for words in (*found, *stops)) + (", as the model asks" if found or stops else "")

    def config(self, *, do_sample: bool = False, **options: Any) -> GenerationConfig:
        """transformers' config of these fields and `options`, of which None leaves a field as it is."""
        given = {name: value for name, value in options.items() if value is not None}
        drawing = {"top_k": _TOP_K} if do_sample else {}
        kept = {name: value for name, value in self.fields.items() if do_sample or name not in _DRAWING}
        return GenerationConfig(**{**drawing, **kept, **given, "do_sample": do_sample})

    def processors(
        self, prompt: Sequence[int], own: Sequence[LogitsProcessor] = (), **options: Any
    ) -> LogitsProcessorList:
        """What `generate` would do to the logits of one sequence; `own` comes before temperature and what follows."""
        return logits_processors(self.config(**options), prompt, own, ends=self.ends, vocab_size=self.vocab_size)

    def refused_field(self) -> str | None:
        """The field that no logits can be processed with, if there is one; empty where it is several together."""
        if self._works():
            return None
        without = ({name: value for name, value in self.fields.items() if name != left} for left in self.fields)
        names = zip(self.fields, without, strict=True)
        return next((name for name, fields in names if replace(self, fields=fields)._works()), "")

    def _works(self) -> bool:
        prompt = list(range(min(3, self.vocab_size)))
        try:
            for draws in (False, True):
                processors = self.processors(prompt, do_sample=draws, max_length=8)
                processors(torch.tensor([prompt]), torch.zeros(1, self.vocab_size))
        except Exception:  # each processor checks its own fields in its own way
            return False
        return True


def read_generation_config(directory: Path) -> GenerationConfig | None:
    """Read generation_config.json as `from_pretrained` does, for users of `generate`; None where there is none.

    The kind of cache is left out: headrace lays it out itself. Raises CheckpointError for what transformers refuses.
    """
    if not (directory / FILE).exists():
        return None
    try:
        config = GenerationConfig.from_pretrained(directory)
    except Exception as error:
        raise CheckpointError(f"{directory / FILE} cannot be used: {error}") from error
    config.cache_implementation = None
    return config


def read_generation_defaults(
    directory: Path, vocab_size: int, *, followed: bool = True, trust_remote_code: bool = False
) -> GenerationDefaults:
    """Read a checkpoint's defaults; unless `followed` no more than its special tokens.

    Raises CheckpointError, naming file and field, for a value that no text can be made with.
    """
    path = directory / FILE
    if path.exists():
        raw = read_config(path)
    else:
        config = read_transformers_config(directory, trust_remote_code=trust_remote_code)
        path, raw = directory / "config.json", GenerationConfig.from_model_config(config).to_dict()
    if raw.get("temperature") == 0:  # says that nothing is drawn, which is for the options to say
        raw = {name: value for name, value in raw.items() if name != "temperature"}
    names = (*_TOKENS, *_ALWAYS, *_DRAWING, *_BEAMS) if followed else _TOKENS
    stops = raw.get(_STOPS) or () if followed else ()
    stops = (stops,) if isinstance(stops, str) else stops
    if not isinstance(stops, tuple | list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise CheckpointError(f"{path}: {_STOPS} is {stops!r}, no list of texts; {_REMEDY}")
    asked = [f"{name} {reprlib.repr(raw[name])}" for name in _LEFT_ASIDE if followed and raw.get(name) not in _NEUTRAL]
    defaults = GenerationDefaults(
        fields={name: raw[name] for name in names if raw.get(name) is not None},
        stops=tuple(stops),
        left_aside=f"{path.name} asks for {', '.join(asked)}, which headrace leaves aside" if asked else "",
        vocab_size=vocab_size,
    )
    refused = defaults.refused_field()
    if refused is not None:
        what = f"{refused} {reprlib.repr(defaults.fields[refused])}" if refused else "what it asks for"
        raise CheckpointError(f"{path}: {what} cannot be followed; {_REMEDY}")
    return defaults
