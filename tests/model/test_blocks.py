"""A model known from its config alone has the blocks of a checkpoint of it, to the rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headrace.model.blocks import Block
from headrace.model.config_fields import read_config
from headrace.model.from_config import model_from_config
from headrace.model.layout import DEVICE_ALIGNMENT_BYTES, PAGE_BYTES
from headrace.model.model import Model
from headrace.model.safetensors_index import TensorIndex
from headrace.model.stored_model import StoredModel, as_transformers_caches, build_stored_model
from tiny_models import CONFIGS, save_tiny

WORK = {"sequences": 3, "new_tokens": 5, "context_tokens": 40, "element_bytes": 4}


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_a_config_are_those_of_its_checkpoint(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    directory = save_tiny(name, tmp_path / name, dtype=dtype)
    raw = read_config(directory / "config.json")
    known = as_transformers_caches(model_from_config(raw, name=name, origin="c"), raw)
    stored = build_stored_model(name, raw, TensorIndex.from_directory(directory))
    assert [facts(block) for block in known.blocks] == [facts(block) for block in stored.blocks]
    assert ends(known) == ends(stored)
    assert (known.parameters, known.weights_bytes) == (stored.parameters, stored.weights_bytes)
    assert known.work_space_bytes(**WORK) == stored.work_space_bytes(**WORK)
    kept = stored.kv_cache_bytes(sequences=2, context_tokens=40, element_bytes=2)
    assert kept == 4 * sum(block.kv_elements(40) for block in known.blocks)
    for own, other in zip(known.blocks, stored.blocks, strict=True):
        assert 0 <= own.read_bytes - own.size_bytes < PAGE_BYTES
        assert 0 <= own.held_bytes - own.size_bytes < DEVICE_ALIGNMENT_BYTES
        assert other.read_bytes - own.read_bytes <= len(other.tensors) * 2 * PAGE_BYTES


def facts(block: Block) -> tuple[object, ...]:
    return (
        block.index,
        block.name,
        block.layer_index,
        block.head_rows,
        block.size_bytes,
        block.parameters,
        block.kv_elements(3),
        block.kv_elements(1000),
    )


def ends(model: Model | StoredModel) -> tuple[object, ...]:
    return (model.tied, model.table_parameters, model.table_bytes, model.fixed_parameters, model.vocab_size)
