"""Shapes from checkpoints: the bytes are those of the tensors, to the last one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.errors import CheckpointCorruptError, CheckpointError
from headrace.model.catalogue import find_model
from headrace.model.from_index import model_from_checkpoint
from headrace.model.safetensors_index import TensorIndex
from tiny_models import CONFIGS, save_tiny


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_s_shape_has_its_bytes_and_parameters(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    directory = save_tiny(name, tmp_path / name, dtype=dtype)
    index = TensorIndex.from_directory(directory)
    model = model_from_checkpoint(directory)
    assert model.weights_bytes == index.total_bytes
    assert model.parameters == sum(entry.num_elements for entry in index.entries.values())
    computed = find_model(str(directory / "config.json"))
    for stored, made in zip(model.layers(), computed.layers(), strict=True):
        assert stored.size_bytes == made.parameters * dtype.itemsize
        assert stored.attention_bytes == made.attention_parameters * dtype.itemsize
        assert stored.feed_forward_bytes == made.feed_forward_parameters * dtype.itemsize
        assert stored.expert_bytes == made.expert_parameters * dtype.itemsize
    assert model.head_bytes == computed.vocab_size * _table_width(index) * dtype.itemsize
    assert find_model(str(directory)) == model


def _table_width(index: TensorIndex) -> int:
    tables = ("embed_tokens", "wte", "word_embeddings", "embed_in")
    return next(entry.shape[1] for name, entry in index.entries.items() if name.split(".")[-2] in tables)


def test_what_the_config_does_not_know_of_is_counted(tmp_path: Path) -> None:
    """A layer beyond the config's (one that predicts several tokens), a table of its own."""
    directory = save_tiny("llama", tmp_path / "llama", dtype=torch.float32, shard="1GB")
    before = model_from_checkpoint(directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.5.eh_proj.weight"] = torch.zeros(64, 128)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    after = model_from_checkpoint(directory)
    assert after.weights_bytes == TensorIndex.from_directory(directory).total_bytes
    assert after.weights_bytes - before.weights_bytes == 64 * 128 * 4
    assert after.num_layers == before.num_layers


def test_quantisation_of_unknown_size_is_sized_by_its_tensors(tmp_path: Path) -> None:
    directory = save_tiny("llama", tmp_path / "llama", dtype=torch.float32, shard="1GB")
    config = json.loads((directory / "config.json").read_text())
    for quantization in ({"quant_method": "hqq"}, {"quant_method": "gptq", "bits": 4, "adapter": {"rank": 8}}):
        (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        model = model_from_checkpoint(directory)
        assert model.weights_bytes == TensorIndex.from_directory(directory).total_bytes
        assert model.weight_format == quantization["quant_method"]


def test_layers_that_differ_in_bytes_are_groups_of_their_own(tmp_path: Path) -> None:
    directory = save_tiny("llama", tmp_path / "llama", dtype=torch.float32, shard="1GB")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].bfloat16()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model = model_from_checkpoint(directory)
    assert [group.count for group in model.groups] == [1, 4]
    assert model.weights_bytes == TensorIndex.from_directory(directory).total_bytes


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("model.layers.3.", r"promises 5 layers, but the weights of layer 3 \(1 in all\)"),
        ("model.layers.", r"layer 0 \(5 in all\)"),
        ("", "layer 0"),
    ],
)
def test_missing_layers_are_named(tmp_path: Path, lost: str, message: str) -> None:
    directory = save_tiny("llama", tmp_path / "llama", dtype=torch.float32, shard="1GB")
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if lost and not name.startswith(lost)}
    save_file(kept or {"other.weight": torch.zeros(1)}, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointCorruptError, match=message):
        model_from_checkpoint(directory)


def test_a_checkpoint_without_ends_is_refused(tmp_path: Path) -> None:
    directory = save_tiny("llama", tmp_path / "llama", dtype=torch.float32, shard="1GB")
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "embed" not in name and "head" not in name}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointCorruptError, match="neither an embedding table nor a head"):
        model_from_checkpoint(directory)


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    directory = save_tiny("llama", tmp_path / "llama", dtype=torch.float32, shard="1GB")
    config = directory / "config.json"
    raw = json.loads(config.read_text())
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        model_from_checkpoint(directory)
    config.write_text(json.dumps({**raw, "num_attention_heads": 5, "head_dim": None}))
    with pytest.raises(CheckpointError, match=r"config\.json: hidden_size 64 is no multiple of 5 attention heads"):
        model_from_checkpoint(directory)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        model_from_checkpoint(directory)
