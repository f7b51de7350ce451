"""How many tokens a model takes, prompt and answer together: its positions, stretched by what scales its rotary ones.

With linear and dynamic scaling `max_position_embeddings` is what the model had before, and the factor stretches it
(transformers computes the frequencies beyond it). With yarn, longrope and llama3 it is usually the stretched length
already, beside the original one: Llama 3.2 multiplies frequencies by 32 and is documented for 16 times its 8,192
positions. For yarn alone users are told to add the factor without changing the field (Qwen), so the longer one counts.
Gemma 3 scales its full-attention layers and has the stretched length in the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from headrace.model.config_fields import Fields

_STRETCHED_IN_THE_FIELD = ("gemma3_text",)


def context_tokens(fields: Fields, positions: int) -> int:
    """Return the tokens that the config allows where it has `positions` of them without scaling.

    Raises CheckpointError for a factor that is no number.
    """
    scaling = fields.raw.get("rope_scaling") or fields.raw.get("rope_parameters")
    if not isinstance(scaling, Mapping) or fields.raw.get("model_type") in _STRETCHED_IN_THE_FIELD:
        return positions
    if isinstance(scaling.get("full_attention"), Mapping):  # one entry per kind of layer: the others have windows
        scaling = scaling["full_attention"]
    inner = Fields(scaling, f"{fields.origin}: rope scaling")
    kind = str(scaling.get("rope_type", scaling.get("type")))
    if kind not in ("linear", "dynamic", "yarn", "longrope", "su", "llama3"):
        return positions
    original = inner.count("original_max_position_embeddings", default=positions)
    if kind not in ("linear", "dynamic"):
        original = fields.count("original_max_position_embeddings", default=original)
        if kind != "yarn" and original < positions:
            return positions
    return max(positions, math.floor(original * inner.number("factor", default=1.0)))
