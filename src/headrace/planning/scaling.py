"""A model a given number of times larger: `gpt-3*1000`.

The rules, all changeable: of a factor f the depth takes f^depth_share (by default one third) and the width what is left
(parameters grow with depth x width squared). Width means hidden size, feed-forward and number of heads; a head keeps
its width, the vocabulary and the context stay. GPT-3 times 1000 so has 960 layers ten times as wide. Of a mixture of
experts every expert grows; their number stays.
"""

from __future__ import annotations

import math
from dataclasses import replace

from headrace.errors import InvalidRequestError
from headrace.planning.model_shape import LayerGroup, LayerShape, ModelShape

LARGEST_FACTOR = 1e9
DEPTH_SHARE = 1 / 3


def scaled(shape: ModelShape, factor: float, *, depth_share: float = DEPTH_SHARE) -> ModelShape:
    """Return the model with `factor` times the parameters (to about 0.1 %; the ends grow with the width alone).

    Raises InvalidRequestError for a factor or a share that cannot be meant.
    """
    if not (math.isfinite(factor) and 1 / LARGEST_FACTOR <= factor <= LARGEST_FACTOR):
        raise InvalidRequestError(
            f"{shape.name}*{factor:g}: a factor lies between {1 / LARGEST_FACTOR:g} and {LARGEST_FACTOR:g}"
        )
    if not 0 <= depth_share <= 1:
        raise InvalidRequestError(f"the depth's share of growth lies between 0 and 1, not at {depth_share}")
    if factor == 1:
        return shape
    layers = max(1, round(shape.num_layers * factor**depth_share))
    low, high = 1e-7, 1e7  # the width that makes the total right: layers are whole, ends grow with the width alone
    target = shape.parameters * factor
    for _ in range(200):
        width = math.sqrt(low * high)
        low, high = (width, high) if _with(shape, layers, width).parameters < target else (low, width)
    made = _with(shape, layers, math.sqrt(low * high))
    note = (
        f"{shape.name} scaled by {factor:g}: {shape.num_layers} -> {layers} layers, "
        f"hidden size {shape.hidden_size} -> {made.hidden_size}; heads keep their width"
    )
    return replace(made, name=f"{shape.name}*{factor:g}", notes=(*shape.notes, note))


def _with(shape: ModelShape, layers: int, width: float) -> ModelShape:
    """Return the shape with so many layers and `width` times as wide."""
    counts = _shared_out([group.count for group in shape.groups], layers)
    groups = tuple(
        LayerGroup(layer=_wider(group.layer, width), count=count)
        for group, count in zip(shape.groups, counts, strict=True)
        if count
    )
    return replace(
        shape,
        groups=groups,
        hidden_size=max(1, round(shape.hidden_size * width)),
        embedding_parameters=round(shape.embedding_parameters * width),
        embedding_bytes=shape.embedding_bytes * width,
        head_parameters=round(shape.head_parameters * width),
        head_bytes=shape.head_bytes * width,
        other_parameters=round(shape.other_parameters * width),
        other_bytes=shape.other_bytes * width,
    )


def _wider(layer: LayerShape, width: float) -> LayerShape:
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
