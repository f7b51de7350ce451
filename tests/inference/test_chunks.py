"""What linear attention holds of its chunks is counted, and so is inside the promise."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from headrace.inference.skeleton import build_without_weights
from headrace.inference.transformers_seam import chunks_of
from headrace.model.model import Layer

BAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 32, "attn_layer_indices": [1]}
DELTA = {"linear_num_key_heads": 8, "linear_num_value_heads": 8, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
SMALL = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes of tensors that are made within the block, and the most that there were at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: Any) -> None:
        key, size_bytes = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size_bytes
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._known.discard(key)
            self.now -= size_bytes

        weakref.finalize(storage, gone)


@pytest.mark.parametrize(("kind", "own", "name"), [("bamba", BAMBA, "mamba"), ("qwen3_5_text", DELTA, "linear_attn")])
@pytest.mark.parametrize("tokens", [160, 512])
def test_what_chunks_hold_is_counted(kind: str, own: dict[str, Any], name: str, tokens: int) -> None:
    model = build_without_weights(AutoConfig.for_model(kind, **SMALL, **own), torch.bfloat16)
    mixer = getattr(model.model.layers[0], name)
    chunk_tokens, per_token = chunks_of(mixer)
    layer = Layer(
        attention_parameters=0,
        attention_bytes=0,
        feed_forward_parameters=0,
        feed_forward_bytes=0,
        chunk_tokens=chunk_tokens,
        chunk_elements_per_token=per_token,
    )
    with torch.inference_mode(), _Held() as held:
        mixer(torch.zeros(1, tokens, 128, dtype=torch.bfloat16))
    # What comes before the chunks and goes on beside them, in 16 bits, the formula counts as any layer's.
    assert 0.75 * held.peak <= layer.chunk_bytes(tokens) <= 1.5 * held.peak
    assert layer.chunk_bytes(1) == 0
