"""Every type of causal language model that transformers can build streams bit for bit, or is refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import headrace
from accelerator_machine import make_up
from headrace.errors import BudgetError, HeadraceError
from headrace.inference.transformers_seam import cache_argument, cache_in
from model_types import TYPES, save_type

REFUSED = {
    "cpmant": "could not be tried without its weights",  # it cannot go on from its own cache
    "hrm_text": "promises 32 layers",  # two stacks, each called several times
    "prophetnet": "cross-attention",
    "rwkv": "could not be tried without its weights",
}
UNBUILT = {
    # What transformers itself cannot build, run or load again at these sizes; the words of its error.
    "bailing_hybrid": "get_seq_length",
    "cohere_compass_text": "full_attention",
    "dbrx": "rope_theta",
    "dots3_note": "validate_architecture",
    "emu3": "Unrecognized configuration class",
    "gemma3n": "timm",
    "gemma4_assistant": "validate_architecture",
    "gemma4_unified_assistant": "set of layer types",
    "kimi_linear": "get_seq_length",
    "longcat_flash": "must match the size",
    "musicgen": "dropout",
    "musicgen_melody": "dropout",
    "qwen4_exp": "unsupported operand",
    "qwen4_exp_text": "unsupported operand",
    "mllama": "Unrecognized configuration class",
    "reformer": "axial_pos_embds",
    "xlstm": "wrong shape",
    "xmod": "Input language unknown",
    "zamba": "tie_weights_keys",
    "zamba2": "num_hidden_layers",
    "zaya": "validate_architecture",
}
SLOW = {"blt", "phi4_multimodal"}
"""take minutes to build whatever sizes are asked for"""
EXACT_MIN = 140
CHOSEN = (
    "bamba",
    "bert",
    "bloom",
    "deepseek_v3",
    "falcon_h1",
    "gemma3n_text",
    "gemma4_text",
    "glm4_moe",
    "gpt2",
    "gpt_oss",
    "granite",
    "jamba",
    "llama4_text",
    "mamba",
    "mpt",
    "olmoe",
    "phimoe",
    "qwen3_5_text",
    "qwen3_next",
    "recurrent_gemma",
)


def passes(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prefill and of a decode pass."""
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
        cache = cache_in(first)
        given = {} if cache is None else {cache_argument(model): cache}
        second = model(input_ids=ids[:, -1:], use_cache=True, **given)
    return first.logits, second.logits


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in UNBUILT.keys() | SLOW])
def test_streamed_equals_resident(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch)
    directory = tmp_path / kind
    resident = save_type(kind, directory)
    ids = torch.randint(3, 250, (3, 7), generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"dtype": "float32", "strategy": "overlap", "batch": 3, "max_tokens": 16}
    if kind in REFUSED:
        with pytest.raises(HeadraceError, match=REFUSED[kind]):
            headrace.load(directory, memory="1GiB", **options)
        return
    wanted = passes(resident, ids)
    with headrace.load(directory, memory="1GiB", **options) as model:
        found = passes(model, ids)
        assert model.headrace.plan.streamed_bytes_per_pass > 0
    assert all(torch.equal(own, other) for own, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", CHOSEN)
def test_in_every_dtype_and_budget(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least budget, one between, one that holds everything; each weight converted, and each as it is stored."""
    make_up(monkeypatch)
    directory = tmp_path / kind
    save_type(kind, directory)
    ids = torch.randint(3, 250, (3, 7), generator=torch.Generator().manual_seed(2))
    for dtype in (torch.float32, torch.bfloat16):
        wanted = passes(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval(), ids)
        options: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "batch": 3, "max_tokens": 16}
        with pytest.raises(BudgetError) as refused:
            headrace.load(directory, memory="1MiB", **options)
        least = refused.value.required_bytes
        assert least is not None
        for memory in (least, int(1.01 * least), 4 * least):
            with headrace.load(directory, memory=memory, **options) as model:
                found = passes(model, ids)
            assert all(torch.equal(own, other) for own, other in zip(found, wanted, strict=True)), (dtype, memory)


@pytest.mark.parametrize("kind", UNBUILT)
def test_what_transformers_cannot_build_is_no_loss(kind: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=UNBUILT[kind]):
        save_type(kind, tmp_path / kind)


def test_the_lists_name_known_types_and_leave_enough() -> None:
    named = REFUSED.keys() | UNBUILT.keys() | SLOW
    assert named <= set(TYPES)
    assert len(TYPES) - len(named) >= EXACT_MIN
