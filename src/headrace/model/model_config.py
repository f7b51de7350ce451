"""The few numbers of a config.json that memory and time depend on, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import CheckpointError, UnsupportedModelError
from headrace.model.architectures import Architecture, architecture_of

_MOST_LAYERS = 100_000


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Dimensions of a decoder; sizes count elements, `sliding_windows` holds one entry per layer (0: full)."""

    architecture: Architecture
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_tokens: int
    sliding_windows: tuple[int, ...]
    num_experts: int
    experts_per_token: int


def read_config(directory: Path) -> ModelConfig:
    """Read `directory/config.json`.

    Raises CheckpointError where the file is missing or makes no sense, UnsupportedModelError for other architectures.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no config.json; a Hugging Face checkpoint directory holds one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds {type(raw).__name__} where an object is expected")
    return parse_config(raw, origin=str(path))


def parse_config(raw: Mapping[str, Any], *, origin: str) -> ModelConfig:
    """Check and translate the fields of a config; `origin` names it in errors."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{origin} names no model_type, so the architecture is unknown")
    architecture = architecture_of(model_type)
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"{origin} describes quantised weights ({method}); headrace streams 16- and 32-bit checkpoints so far"
        )
    _refuse_variants(raw, model_type=model_type, origin=origin)

    def count(field: str, default: int | None = None) -> int:
        value = raw.get(field)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**40:
            raise CheckpointError(f"{origin}: {field} is {value!r}; a positive whole number is expected")
        return value

    hidden_size = count(architecture.hidden_size)
    num_heads = count(architecture.num_heads)
    num_layers = count(architecture.num_layers)
    if num_layers > _MOST_LAYERS:
        raise CheckpointError(f"{origin}: {architecture.num_layers} is {num_layers}; at most {_MOST_LAYERS} make sense")
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(f"{origin}: hidden size {hidden_size} is no multiple of {num_heads} attention heads")
    if model_type == "falcon":
        num_kv_heads = _falcon_kv_heads(raw, num_heads)
    else:
        num_kv_heads = count(architecture.num_kv_heads, num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{origin}: {num_heads} attention heads are no multiple of {num_kv_heads} key-value heads"
        )
    moe = model_type in {"mixtral", "qwen3_moe"}
    experts_field = "num_local_experts" if raw.get("num_local_experts") else "num_experts"
    num_experts, experts_per_token = (count(experts_field), count("num_experts_per_tok")) if moe else (0, 0)
    if experts_per_token > num_experts:
        raise CheckpointError(
            f"{origin}: num_experts_per_tok is {experts_per_token}, but there are {num_experts} experts"
        )
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=count(architecture.intermediate_size, 4 * hidden_size),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=count("head_dim", hidden_size // num_heads),
        vocab_size=count("vocab_size"),
        context_tokens=count(architecture.context_tokens, 2048),
        sliding_windows=_sliding_windows(raw, num_layers),
        num_experts=num_experts,
        experts_per_token=experts_per_token,
    )


def _refuse_variants(raw: Mapping[str, Any], *, model_type: str, origin: str) -> None:
    """Refuse forms of a known architecture that no test has shown to be right."""
    if raw.get("add_cross_attention") or raw.get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{origin}: {model_type} with cross-attention cannot be streamed")
    architectures = raw.get("architectures") or []
    if isinstance(architectures, list) and architectures:
        name = str(architectures[0])
        if not name.endswith(("ForCausalLM", "LMHeadModel", "Model")):
            raise UnsupportedModelError(
                f"{origin}: {name} is no causal language model, which is all that headrace runs"
            )


def _falcon_kv_heads(raw: Mapping[str, Any], num_heads: int) -> int:
    """Heads in Falcon's KV cache: one in its multi-query form; grouped heads are repeated to all before caching."""
    if raw.get("new_decoder_architecture"):
        return num_heads
    return 1 if raw.get("multi_query", True) else num_heads


def _sliding_windows(raw: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Per layer, the attention window in tokens, or 0 where the whole context is kept."""
    window = raw.get("sliding_window")
    qwen = str(raw.get("model_type")).startswith("qwen")  # whose switch is off where it is absent
    if type(window) is not int or window <= 0 or not raw.get("use_sliding_window", not qwen):
        return (0,) * num_layers
    kinds = raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == num_layers:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if raw.get("model_type") in {"mistral", "mixtral", "phi3"}:
        return (window,) * num_layers
    return (0,) * num_layers  # a bound from above: counted as if the whole context were kept
