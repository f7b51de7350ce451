"""Fuse the small operations of layers with torch.compile, where enqueuing them takes longer than computing them.

Only what is the same in every pass is compiled: the children of a layer that hold no attention (feed-forward parts,
norms). Attention grows with every token and would be compiled again and again. Fused operations round in other places,
so results may differ from those of the same model uncompiled; that is why nobody gets this without asking.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from headrace.dtypes import STORED_DTYPES
from headrace.errors import InvalidRequestError
from headrace.streaming.torch_dtypes import described

BACKEND = "inductor"
_ATTENTION = ("attn", "attention")


def compile_layers(layers: Sequence[nn.Module], *, dtype: torch.dtype, stored_dtype: str) -> int:
    """Compile what can be, in place, at its first call; returns how many modules that is.

    Raises InvalidRequestError where weights are converted module by module, which a compiled module cannot do.
    """
    computed_in = described(dtype)
    if stored_dtype != computed_in.stored_name:
        fitting = STORED_DTYPES.get(stored_dtype, computed_in)
        raise InvalidRequestError(
            f"--compile needs weights that are computed with as they are stored ({stored_dtype}), not in "
            f"{computed_in.name}; give --dtype {fitting.name}, or leave --compile away"
        )
    count = 0
    for layer in layers:
        for name, child in layer.named_children():
            if not any(word in name for word in _ATTENTION) and any(True for _ in child.parameters()):
                child.compile(dynamic=True, backend=BACKEND)
                count += 1
    return count
