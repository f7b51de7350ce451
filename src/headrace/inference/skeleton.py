"""A transformers model without weights: the real class, real buffers, and parameters that are not-a-number scalars.

Between its turns a block has no weights. Its parameters are then one NaN seen in the parameter's shape, which takes
no memory, keeps `model.device`, `model.dtype` and `num_parameters()` right, and shows at once if anything reads it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from headrace.errors import CheckpointError, UnsupportedModelError
from headrace.inference.streamed_model import StreamedModel
from headrace.planning.architectures import architecture_of


def read_transformers_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a checkpoint; raises CheckpointError with its reason where it does not load."""
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory / 'config.json'} is not accepted by transformers: {error}") from error


def build_skeleton(config: Any, dtype: torch.dtype, *, attention: str | None = None) -> Any:
    """Return the model for causal language modelling in eval mode; every parameter is a placeholder of `dtype`.

    The class is a subclass of the transformers class, with `StreamedModel`'s methods added; nothing is patched.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(f"transformers has no causal language model for {type(config).__name__}")
    original = AutoModelForCausalLM._model_mapping[type(config)]
    if isinstance(original, tuple):
        original = original[0]
    streamed: Any = type(original.__name__, (StreamedModel, original), {"__module__": original.__module__})
    config = copy.deepcopy(config)
    options = {} if attention is None else {"attn_implementation": attention}
    with init_empty_weights(include_buffers=False):
        model = streamed._from_config(config, dtype=dtype, **options)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, placeholder(tuple(parameter.shape), dtype))
    model.requires_grad_(requires_grad=False)
    return model.eval()


def single_layer_config(config: Any) -> Any:
    """The same model with one layer, for rehearsals."""
    short = copy.deepcopy(config)
    setattr(short, architecture_of(config.model_type).num_layers, 1)
    if getattr(short, "layer_types", None):
        short.layer_types = list(short.layer_types[:1])
    return short


def attach_generation_config(model: Any, directory: Path) -> None:
    """Load generation_config.json, as `from_pretrained` would."""
    if (directory / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{directory / 'generation_config.json'} cannot be used: {error}") from error


def placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """One not-a-number, seen in `shape`."""
    return nn.Parameter(torch.full((), torch.nan, dtype=dtype).expand(shape), requires_grad=False)
