"""Bad input to `headrace.load` and to a loaded model: a clear error each, no hang, no thread left, no wrong answer."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import headrace
from headrace.errors import (
    BudgetError,
    CheckpointChangedError,
    CheckpointCorruptError,
    CheckpointError,
    InvalidRequestError,
    StreamError,
    UnsupportedModelError,
)
from tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("made_up_speeds")

OPTIONS: dict[str, Any] = {"memory": "64MB", "dtype": "float32", "prompt_tokens": 8, "max_tokens": 24}
IDS = torch.arange(3, 11).view(1, 8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("saved") / "llama")


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def _no_reader_is_left() -> Any:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("headrace-reader")] == []


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "bf16"),
        ("rms_norm_eps", "1e-6"),
        ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "mrope", "rope_theta": 1e4}),
        ("hidden_act", "swiglu_custom"),
        ("pad_token_id", 999),
        ("_attn_implementation", "flash_attention_2"),
    ],
)
def test_a_field_that_transformers_refuses_is_named(directory: Path, field: str, value: object) -> None:
    change_config(directory, **{field: value})
    with pytest.raises(CheckpointError, match=rf"config\.json is not accepted .* without {field}, which is"):
        headrace.load(directory, **OPTIONS)


def test_a_config_with_a_byte_order_mark_is_named_without_blaming_a_field(directory: Path) -> None:
    path = directory / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(CheckpointError, match=r"config\.json begins with a byte order mark"):
        headrace.load(directory, **OPTIONS)


def test_an_attention_that_is_not_installed_is_the_callers_to_change(directory: Path) -> None:
    with pytest.raises(InvalidRequestError, match="attention 'flash_attention_2' does not work here"):
        headrace.load(directory, **OPTIONS, attention="flash_attention_2")


def test_a_generation_config_that_is_no_json_is_named(directory: Path) -> None:
    (directory / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        headrace.load(directory, **OPTIONS)


def test_a_missing_shard_is_named(directory: Path) -> None:
    shards(directory)[1].unlink()
    with pytest.raises(CheckpointCorruptError, match="model-00002-of"):
        headrace.load(directory, **OPTIONS)


def test_a_truncated_shard_is_named(directory: Path) -> None:
    with open(shards(directory)[0], "r+b") as file:
        file.truncate(shards(directory)[0].stat().st_size - 10)
    with pytest.raises(CheckpointCorruptError, match="model-00001-of"):
        headrace.load(directory, **OPTIONS)


def test_a_missing_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        headrace.load(directory, **OPTIONS)


def test_an_unknown_architecture_is_refused_by_name(directory: Path) -> None:
    change_config(directory, model_type="unheard_of")
    with pytest.raises(CheckpointError, match="unheard_of"):
        headrace.load(directory, **OPTIONS)


def test_code_in_a_checkpoint_is_not_run(directory: Path) -> None:
    change_config(
        directory, model_type="own", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    )
    (directory / "evil.py").write_text("raise SystemExit('code from the checkpoint was run')")
    with pytest.raises(CheckpointError, match="contains custom code"):
        headrace.load(directory, **OPTIONS)


def test_a_quantised_checkpoint_is_refused(directory: Path) -> None:
    change_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="gptq"):
        headrace.load(directory, **OPTIONS)


def test_pickle_weights_are_refused_with_the_way_out(directory: Path) -> None:
    for path in (*shards(directory), directory / "model.safetensors.index.json"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        headrace.load(directory, **OPTIONS)


def test_a_layer_too_few(directory: Path) -> None:
    change_config(directory, num_hidden_layers=6)
    with pytest.raises(CheckpointCorruptError, match="layer 5"):
        headrace.load(directory, **OPTIONS)


def test_shapes_that_contradict_the_config(directory: Path) -> None:
    change_config(directory, intermediate_size=128)
    with pytest.raises(CheckpointCorruptError, match="shape"):
        headrace.load(directory, **OPTIONS)


def test_a_head_that_is_missing_and_not_tied(saved: Path, tmp_path: Path) -> None:
    tied = save_tiny("llama-tied", tmp_path / "tied")
    change_config(tied, tie_word_embeddings=False)
    with pytest.raises(CheckpointCorruptError, match=r"lacks the weights of lm_head\.weight"):
        headrace.load(tied, **OPTIONS)


@pytest.mark.parametrize("strategy", ["auto", "resident", "sequential", "overlap"])
def test_a_budget_below_the_minimum_names_one_that_works(directory: Path, strategy: str) -> None:
    options = {**OPTIONS, "strategy": strategy}
    with pytest.raises(BudgetError, match="at least") as refused:
        headrace.load(directory, **{**options, "memory": 100_000})
    needed = refused.value.required_bytes
    assert needed is not None
    assert str(needed) in str(refused.value)
    headrace.load(directory, **{**options, "memory": needed}).close()
    with pytest.raises(BudgetError):
        headrace.load(directory, **{**options, "memory": needed - 1})


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"dtype": "int3"}, "int3"),
        ({"strategy": "fastest"}, "fastest"),
        ({"device": "cuda"}, "cuda"),
        ({"memory": "12"}, "unit"),
        ({"memory": "-3GB"}, "size"),
        ({"batch": 0}, "batch"),
        ({"max_tokens": 1}, "tokens"),
        ({"max_tokens": 100_000}, "128"),
        ({"prompt_tokens": 24}, "prompt"),
        ({"read_limit": 0.0}, "limit"),
    ],
)
def test_arguments_that_cannot_be_meant(directory: Path, wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        headrace.load(directory, **{**OPTIONS, **wrong})


def test_no_such_model() -> None:
    with pytest.raises(CheckpointError, match="no directory"):
        headrace.load("./not here", **OPTIONS)


def streaming(directory: Path) -> Any:
    """A model of which a part must be streamed."""
    with pytest.raises(BudgetError) as refused:
        headrace.load(directory, **{**OPTIONS, "memory": 1000, "strategy": "overlap"})
    return headrace.load(directory, **{**OPTIONS, "memory": refused.value.required_bytes, "strategy": "overlap"})


def run_passes(model: Any, count: int) -> None:
    for _ in range(count):
        model(input_ids=IDS)


def test_a_file_that_changes_during_a_run(directory: Path) -> None:
    with torch.inference_mode(), streaming(directory) as model:
        model(input_ids=IDS)
        for path in shards(directory):
            os.utime(path)
        with pytest.raises(CheckpointChangedError, match="changed while it was in use"):
            run_passes(model, 4)


def test_a_read_error_in_a_reader_names_file_and_block(directory: Path) -> None:
    with torch.inference_mode(), streaming(directory) as model:
        model(input_ids=IDS)

        def broken(*_args: object) -> int:
            raise OSError(5, "Input/output error")

        model.headrace.stream._source.read_into = broken
        with pytest.raises(StreamError, match=r"(layer \d|head).*safetensors.*Input/output error"):
            run_passes(model, 4)


def test_a_request_that_cannot_fit_is_refused_before_it_starts(directory: Path) -> None:
    with streaming(directory) as model:
        passes = len(model.headrace.passes)
        with pytest.raises(BudgetError, match="KV cache"):
            model.generate(IDS.repeat(200, 1), attention_mask=torch.ones(200, 8, dtype=torch.long), max_new_tokens=16)
        with pytest.raises(InvalidRequestError, match="at most 128 tokens"):
            model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=500)
        assert len(model.headrace.passes) == passes


def test_a_broken_off_pass_does_no_harm(directory: Path) -> None:
    with torch.inference_mode(), streaming(directory) as model:
        expected = model(input_ids=IDS).logits
        hook = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=IDS)
        hook.remove()
        assert torch.equal(model(input_ids=IDS).logits, expected)
        model.headrace.stream.check_integrity()


def test_token_ids_beyond_the_vocabulary(directory: Path) -> None:
    with torch.inference_mode(), streaming(directory) as model, pytest.raises(IndexError, match="319"):
        model(input_ids=torch.tensor([[5, 320]]))


def test_after_close(directory: Path) -> None:
    model = streaming(directory)
    model.close()
    model.close()
    with pytest.raises(InvalidRequestError, match="closed"):
        model(input_ids=IDS)


def test_a_streamed_model_cannot_be_saved(directory: Path, tmp_path: Path) -> None:
    with streaming(directory) as model, pytest.raises(InvalidRequestError, match="unchanged"):
        model.save_pretrained(tmp_path / "out")


def test_the_checkpoint_is_left_as_it_was(directory: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()}
    with torch.inference_mode(), streaming(directory) as model:
        model(input_ids=IDS)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()}
