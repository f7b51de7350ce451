"""A model a given number of times larger: `gpt-3*1000`.

The rules, all changeable: of a factor f the depth takes f^depth_share (by default one third) and the width what is left
(parameters grow with depth x width squared). Width means hidden size, feed-forward and number of heads; a head keeps
its width, the vocabulary and the context stay. GPT-3 times 1000 so has 960 layers ten times as wide. Of a mixture of
experts every expert grows in both its dimensions; their number, and how many a token uses, stay. A latent cache and a
single key-value head keep their size.

Layers are whole numbers and the ends grow with the width alone, so this width is off the factor by some share. Within
1 % it stands, with whole heads where that allows; else the width is the one that makes the total right.
"""

from __future__ import annotations

import math
from dataclasses import replace

from headrace.errors import InvalidRequestError
from headrace.model.model import Layer, LayerGroup, Model

LARGEST_FACTOR = 1e9
DEPTH_SHARE = 1 / 3
TOLERANCE = 0.01
"""share by which the parameters may miss the factor"""


def scaled(model: Model, factor: float, *, depth_share: float = DEPTH_SHARE) -> Model:
    """Return the model with `factor` times the parameters, to 1 %.

    Raises InvalidRequestError for an invalid factor or share.
    """
    if not (math.isfinite(factor) and 1 / LARGEST_FACTOR <= factor <= LARGEST_FACTOR):
        raise InvalidRequestError(
            f"{model.name}*{factor:g}: a factor lies between {1 / LARGEST_FACTOR:g} and {LARGEST_FACTOR:g}"
        )
    if not 0 <= depth_share <= 1:
        raise InvalidRequestError(f"the depth's share of growth lies between 0 and 1, not at {depth_share}")
    if factor == 1:
        return model
    layers = max(1, round(model.num_layers * factor**depth_share))
    made = _near(model, layers, model.parameters * factor, factor ** ((1 - depth_share) / 2))
    note = (
        f"{model.name} scaled by {factor:g}: {model.num_layers} -> {layers} layers, "
        f"hidden size {model.hidden_size} -> {made.hidden_size}; heads keep their width"
    )
    return replace(made, name=f"{model.name}*{factor:g}", notes=(*model.notes, note))


def _near(model: Model, layers: int, target: float, natural: float) -> Model:
    """The natural width or the one that makes the total right, in whole heads if the tolerance allows."""
    right = _right_width(model, layers, target)
    for width in (_whole_heads(model, natural), _whole_heads(model, right)):
        made = _with(model, layers, width)
        if abs(made.parameters / target - 1) <= TOLERANCE:
            return made
    return _with(model, layers, right)


def _right_width(model: Model, layers: int, target: float) -> float:
    low, high = 1 / LARGEST_FACTOR, LARGEST_FACTOR
    for _ in range(200):
        width = math.sqrt(low * high)
        low, high = (width, high) if _with(model, layers, width).parameters < target else (low, width)
    return math.sqrt(low * high)


def _whole_heads(model: Model, width: float) -> float:
    """The nearest width at which the number of heads, and of key-value heads where there are several, is whole."""
    layer = next(model.layers())
    heads = layer.kv_heads if layer.kv_heads > 1 else layer.query_heads
    return max(1, round(heads * width)) / heads if heads else width


def _with(model: Model, layers: int, width: float) -> Model:
    """Return the model with so many layers and `width` times as wide."""
    counts = _shared_out([group.count for group in model.groups], layers)
    groups = tuple(
        LayerGroup(layer=_wider(group.layer, width), count=count)
        for group, count in zip(model.groups, counts, strict=True)
        if count
    )
    return replace(
        model,
        groups=groups,
        hidden_size=max(1, round(model.hidden_size * width)),
        embedding_parameters=round(model.embedding_parameters * width),
        embedding_bytes=model.embedding_bytes * width,
        position_parameters=round(model.position_parameters * width),
        head_parameters=round(model.head_parameters * width),
        head_bytes=model.head_bytes * width,
        other_parameters=round(model.other_parameters * width),
        other_bytes=model.other_bytes * width,
    )


def _wider(layer: Layer, width: float) -> Layer:
    square = width * width
    # Whole multiples of what they are divisible by, so that devices can still share them.
    unit = min(32, layer.query_heads & -layer.query_heads) if layer.query_heads else 1
    heads = max(1, round(layer.query_heads * width / unit)) * unit
    # Key-value heads grow with the others; one for all (multi-query, latent) stays one.
    kv_growth = width if layer.kv_heads > 1 else 1.0
    return replace(
        layer,
        attention_parameters=round(layer.attention_parameters * square),
        attention_bytes=layer.attention_bytes * square,
        feed_forward_parameters=round(layer.feed_forward_parameters * square),
        feed_forward_bytes=layer.feed_forward_bytes * square,
        expert_parameters=round(layer.expert_parameters * square),
        expert_bytes=layer.expert_bytes * square,
        other_parameters=round(layer.other_parameters * width),
        other_bytes=layer.other_bytes * width,
        intermediate_size=round(layer.intermediate_size * width),
        query_heads=heads,
        kv_heads=max(1, round(layer.kv_heads * kv_growth)),
        kv_elements_per_token=max(1, round(layer.kv_elements_per_token * kv_growth)),
    )


def _shared_out(counts: list[int], total: int) -> list[int]:
    """Share `total` layers among the groups in the proportion of their counts (largest remainders)."""
    whole = sum(counts)
    exact = [count * total / whole for count in counts]
    made = [math.floor(value) for value in exact]
    order = sorted(range(len(counts)), key=lambda index: exact[index] - made[index], reverse=True)
    for index in order[: total - sum(made)]:
        made[index] += 1
    return made
