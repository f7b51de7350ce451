"""Write a Llama-shaped bfloat16 checkpoint of random weights, shard by shard, in little memory.

    python bench/make_checkpoint.py OUT_DIR --shape llama-3gb [--tokenizer-from DIR] [--fast]

The result is what `save_pretrained` would have left: config.json, generation_config.json, safetensors shards and
their index. At most one tensor is in memory at a time (about 400 MB for the 3 GB shape's largest). With `--fast` the
random numbers are drawn once and used again and again (`tiled_weights.py`), which goes at the speed of the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tiled_weights import as_bfloat16, tiled_weights

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Shape(NamedTuple):
    """The dimensions of a Llama model; every size counts elements."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


class Tensor(NamedTuple):
    """One tensor of a checkpoint; `number` counts from 0 in the order of the files."""

    name: str
    dimensions: tuple[int, ...]
    number: int


Named = tuple[str, tuple[int, ...]]
"""name and dimensions of a tensor"""
Fill = Callable[[BinaryIO, tuple[int, ...], int], None]
"""Appends the values of a tensor, given its dimensions and its number."""

FAST_WRITERS = 4
"""files that are written at once"""

SHAPES = {
    "llama-tiny": Shape(64, 160, 3, 4, 2, 49152),
    "llama-wide": Shape(3072, 8192, 5, 24, 6, 16384),  # 0.60 B parameters, few large blocks
    "llama-deep": Shape(1024, 2816, 40, 16, 4, 32768),  # 0.52 B parameters, many small blocks
    "llama-3gb": Shape(2048, 8192, 22, 32, 8, 49152),  # 1.54 B parameters, 3.08 GB
    "llama-1b": Shape(2048, 8192, 16, 32, 8, 128256),  # 1.50 B parameters, 3.00 GB
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-70b": Shape(8192, 28672, 80, 64, 8, 128256),
}


def tensors_of(shape: Shape) -> Iterator[Named]:
    """Yield (name, dimensions) of every tensor in the order in which a Llama checkpoint holds them."""
    hidden, intermediate, kv_width = shape.hidden, shape.intermediate, shape.hidden // shape.heads * shape.kv_heads
    yield "model.embed_tokens.weight", (shape.vocabulary, hidden)
    for layer_index in range(shape.layers):
        prefix = f"model.layers.{layer_index}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "mlp.down_proj.weight", (hidden, intermediate)
        yield prefix + "mlp.gate_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.up_proj.weight", (intermediate, hidden)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "self_attn.k_proj.weight", (kv_width, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv_width, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocabulary, hidden)


def size_bytes(dimensions: tuple[int, ...]) -> int:
    """Bytes of a bfloat16 tensor."""
    return 2 * int(np.prod(dimensions))


def total_bytes(tensors: Iterable[Named]) -> int:
    """Bytes of all tensors."""
    return sum(size_bytes(dimensions) for _, dimensions in tensors)


def checkpoint_bytes(shape: Shape) -> int:
    """Bytes of all tensors of a Llama model."""
    return total_bytes(tensors_of(shape))


def write_random(file: BinaryIO, dimensions: tuple[int, ...], generator: np.random.Generator) -> None:
    """Append one tensor: ones (plus a little) for a norm, N(0, 0.02) for a matrix, in pieces of 16 M elements."""
    left = int(np.prod(dimensions))
    while left:
        count = min(left, 16 << 20)
        values = generator.standard_normal(count, dtype=np.float32) * np.float32(0.02)
        if len(dimensions) == 1:
            values += np.float32(1.0)
        file.write(as_bfloat16(values).tobytes())
        left -= count


def shards_of(tensors: Iterable[Named], shard_bytes: int) -> list[list[Tensor]]:
    """The tensors of each file: as many as fit into `shard_bytes`, one at least."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for number, (name, dimensions) in enumerate(tensors):
        if shards[-1] and filled + size_bytes(dimensions) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(Tensor(name, dimensions, number))
        filled += size_bytes(dimensions)
    return shards


def write_shard(path: Path, tensors: Sequence[Tensor], fill: Fill, *, settle: bool) -> None:
    """Write one safetensors file. With `settle` it is on the disk, and out of the page cache, on return."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + size_bytes(tensor.dimensions)
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.dimensions), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            fill(file, tensor.dimensions, tensor.number)
        if settle:
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_tensors(
    directory: Path,
    tensors: Sequence[Named],
    config: Mapping[str, Any],
    *,
    shard_bytes: int,
    seed: int,
    fast: bool = False,
) -> int:
    """Write a checkpoint of any tensors and its config.json; returns the bytes of its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    shards = shards_of(tensors, shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if fast:
        fill: Fill = tiled_weights(seed).write
    else:
        generator = np.random.default_rng(seed)
        fill = lambda file, dimensions, _: write_random(file, dimensions, generator)  # noqa: E731
    with ThreadPoolExecutor(FAST_WRITERS if fast else 1) as pool:
        written = [
            pool.submit(write_shard, directory / name, shard, fill, settle=fast)
            for name, shard in zip(names, shards, strict=True)
        ]
        for one in written:
            one.result()
    total = total_bytes(tensors)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    (directory / "generation_config.json").write_text(json.dumps(special))
    return total


def write_checkpoint(directory: Path, shape: Shape, *, shard_bytes: int, seed: int, fast: bool = False) -> int:
    """Write a whole Llama checkpoint; returns the bytes of its weights. `fast`: see `tiled_weights.py`."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    tensors = list(tensors_of(shape))
    return write_tensors(directory, tensors, config, shard_bytes=shard_bytes, seed=seed, fast=fast)


def main() -> None:
    """Parse the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3gb")
    parser.add_argument("--shard-bytes", type=int, default=1_000_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer-from", type=Path, help="a checkpoint directory whose tokenizer files are copied")
    parser.add_argument("--fast", action="store_true", help="write at the speed of the disk; numbers repeat")
    options = parser.parse_args()
    total = write_checkpoint(
        options.directory,
        SHAPES[options.shape],
        shard_bytes=options.shard_bytes,
        seed=options.seed,
        fast=options.fast,
    )
    for name in TOKENIZER_FILES:
        if options.tokenizer_from and (options.tokenizer_from / name).exists():
            shutil.copy(options.tokenizer_from / name, options.directory / name)
    print(f"{options.directory}: {total:,} bytes of weights")


if __name__ == "__main__":
    main()
