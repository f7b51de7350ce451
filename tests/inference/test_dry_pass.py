"""What a pass without weights shows, and what a checkpoint may hold beside and instead of what a model expects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import headrace
from accelerator_machine import make_up
from headrace.errors import UnsupportedModelError
from headrace.inference import dry_pass
from headrace.inference.dry_pass import examine
from headrace.inference.skeleton import build_without_weights, read_transformers_config
from headrace.streaming.checkpoint import Checkpoint
from model_types import save_type
from tiny_models import save_tiny

Tensors = dict[str, torch.Tensor]
IDS = torch.randint(3, 250, (3, 7), generator=torch.Generator().manual_seed(2))


def examined(directory: Path) -> tuple[dry_pass.Anatomy, Any]:
    checkpoint = Checkpoint(directory)
    entries = checkpoint.index.entries.values()
    return examine(read_transformers_config(directory), checkpoint.model, entries)


def resaved(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The checkpoint in one file, its tensors changed."""
    paths = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    for path in (*paths, directory / "model.safetensors.index.json"):
        path.unlink(missing_ok=True)
    save_file(change(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def in_dtype(dtype: torch.dtype, *words: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        return {
            name: tensor.to(dtype) if any(word in name for word in words) else tensor
            for name, tensor in tensors.items()
        }

    return change


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        in_dtype(torch.bfloat16, "norm"),
        in_dtype(torch.bfloat16, "lm_head"),
        in_dtype(torch.bfloat16, "layers.1.", "embed"),
        in_dtype(torch.bfloat16, "proj", "embed", "lm_head"),
        in_dtype(torch.float16, "q_proj", "down_proj"),
    ],
)
def test_parameters_may_be_stored_in_several_dtypes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensors], Tensors], compute: torch.dtype
) -> None:
    make_up(monkeypatch)
    directory = resaved(save_tiny("llama", tmp_path / "m", dtype=torch.float32), change)
    resident = AutoModelForCausalLM.from_pretrained(directory, dtype=compute).eval()
    name = str(compute).removeprefix("torch.")
    with (
        torch.no_grad(),
        headrace.load(directory, memory="96MiB", dtype=name, strategy="overlap", batch=3, max_tokens=16) as model,
    ):
        assert torch.equal(model(input_ids=IDS).logits, resident(input_ids=IDS).logits)


def test_what_the_model_has_no_place_for_is_neither_counted_nor_read(tmp_path: Path) -> None:
    plain = save_tiny("llama", tmp_path / "plain", dtype=torch.float32)
    more = {
        "visual.blocks.0.attn.qkv.weight": torch.zeros(1 << 20),
        "model.layers.0.self_attn.step": torch.zeros(4, dtype=torch.int64),
        "model.layers.1.self_attn.mask": torch.ones(4, 4, dtype=torch.bool),
        "position_ids": torch.arange(128),
    }
    full = resaved(save_tiny("llama", tmp_path / "full", dtype=torch.float32), lambda tensors: tensors | more)
    found = []
    for directory in (plain, full):
        checkpoint = Checkpoint(directory)
        checkpoint.confirm(examined(directory)[1])
        found.append(checkpoint.model)
    assert found[0].weights_bytes == found[1].weights_bytes
    assert [block.size_bytes for block in found[0].blocks] == [block.size_bytes for block in found[1].blocks]
    assert not more.keys() & {entry.name for block in found[1].blocks for entry in block.tensors}
    assert not more.keys() & {entry.name for entry in found[1].fixed}


def test_a_cache_is_measured_on_the_models_own(tmp_path: Path) -> None:
    gemma, _ = examined(save_tiny("gemma3", tmp_path / "gemma3"))
    assert [cache.window_tokens for cache in gemma.caches] == [8, 8, 0, 8, 8]
    assert {cache.elements_per_token for cache in gemma.caches} == {2 * 2 * 16}
    assert gemma.kinds == (0, 0, 1, 0, 0)
    save_type("mamba", tmp_path / "mamba")
    states, parts = examined(tmp_path / "mamba")
    assert {(cache.elements_per_token, cache.state_elements) for cache in states.caches} == {
        (0, 128 * 4 + 2 * 128 * 8)
    }, "states in 32 bits count twice"
    assert states.made_in["backbone.layers.0.mixer.conv1d"] == "backbone.layers.0.mixer", "its weight is read by others"
    assert {made.module for made in parts.made[0]} >= {"norm", "mixer"}


def test_layers_that_share_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_tiny("llama", tmp_path / "m")

    def shared(config: LlamaConfig, dtype: torch.dtype) -> nn.Module:
        model: Any = LlamaForCausalLM(config).to(dtype)
        model.model.layers[2].mlp = model.model.layers[1].mlp
        made: nn.Module = model.eval()
        return made

    monkeypatch.setattr(dry_pass, "build_without_weights", shared)
    with pytest.raises(UnsupportedModelError, match="layers 1 and 2 of m share weights"):
        examined(directory)


def test_layers_out_of_order_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_tiny("llama", tmp_path / "m")

    def twice(config: LlamaConfig, dtype: torch.dtype) -> nn.Module:
        model: nn.Module = build_without_weights(config, dtype)
        layers: Any = model.get_submodule("model.layers")
        layer = layers[1]
        forward = layer.forward
        layer.forward = lambda *args, **kwargs: forward(layers[0](*args, **kwargs), **kwargs)
        return model

    monkeypatch.setattr(dry_pass, "build_without_weights", twice)
    with pytest.raises(UnsupportedModelError, match="once each, in order"):
        examined(directory)
