"""Write the GGUF of a Llama checkpoint, tensor by tensor, for llama.cpp.

    python bench/rivals/to_gguf.py MODEL_DIR OUT.gguf [--type bf16|f16]

With bf16 (the default) the weights are the checkpoint's own bits. llama.cpp rotates neighbouring elements of a head
where the checkpoint's layout rotates elements half a head apart, so the rows of the query and key projections are
permuted. The vectors (norms) are written in float32, as llama.cpp wants them. There is no tokenizer in the file: the
benchmark works on token ids.
"""

from __future__ import annotations

import argparse
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a bfloat16 tensor of the checkpoint lies."""

    file: Path
    offset: int
    shape: tuple[int, ...]

    def bits(self) -> np.ndarray:
        """Return the tensor's bfloat16 bits, as a mapping of the file: nothing is read before it is used."""
        return np.memmap(self.file, dtype=np.uint16, mode="r", offset=self.offset, shape=self.shape)


def stored_tensors(model: Path) -> dict[str, StoredTensor]:
    """Find every tensor of the checkpoint; SystemExit where one isn't bfloat16."""
    found: dict[str, StoredTensor] = {}
    for file_path in sorted(model.glob("*.safetensors")):
        with open(file_path, "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{file_path}: {name} is {entry['dtype']}; only BF16 checkpoints can be converted")
            found[name] = StoredTensor(file_path, 8 + header_bytes + entry["data_offsets"][0], tuple(entry["shape"]))
    if not found:
        raise SystemExit(f"{model}: no safetensors files there")
    return found


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of the checkpoint."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    prefix, _, rest = name.removeprefix("model.layers.").partition(".")
    module = rest.removesuffix(".weight")
    if not prefix.isdigit() or module not in LAYER_NAMES:
        raise SystemExit(f"{name}: not a tensor of a plain Llama model")
    return f"blk.{prefix}.{LAYER_NAMES[module]}.weight"


def permute_for_rope(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder a projection's rows so that the two halves of each head alternate, as llama.cpp's rotation expects."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def as_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32 values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def add_hyperparameters(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Write what llama.cpp needs to know of the model's shape."""
    if config.get("model_type") != "llama" or config.get("rope_scaling"):
        raise SystemExit("only Llama checkpoints without rope scaling can be converted")
    heads = int(config["num_attention_heads"])
    head_width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(head_width)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_rope_freq_base(float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_tokenizer_model("no_vocab")


def convert(model: Path, target: Path, *, weight_type: str) -> None:
    """Write the whole file; under a temporary name first, so that an interrupted run leaves nothing that looks done."""
    config = json.loads((model / "config.json").read_text())
    heads = {"attn_q": int(config["num_attention_heads"])}
    heads["attn_k"] = int(config.get("num_key_value_heads") or heads["attn_q"])
    tensors = stored_tensors(model)
    names = {name: gguf_name(name) for name in tensors}
    # In order of use, so that a pass reads the file from its start to its end.
    order = sorted(tensors, key=lambda name: execution_rank(names[name]))
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    add_hyperparameters(writer, config)
    is_bf16 = weight_type == "bf16"
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if is_bf16 else gguf.LlamaFileType.MOSTLY_F16)
    matrix_type = gguf.GGMLQuantizationType.BF16 if is_bf16 else gguf.GGMLQuantizationType.F16
    for name in order:
        shape = tensors[name].shape
        elements = int(np.prod(shape))
        is_vector = len(shape) == 1
        raw_type = gguf.GGMLQuantizationType.F32 if is_vector else matrix_type
        data_type = np.float32 if is_vector else np.uint16
        writer.add_tensor_info(
            names[name], shape, np.dtype(data_type), elements * (4 if is_vector else 2), raw_dtype=raw_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in order:
        bits = tensors[name].bits()
        kind = names[name].split(".")[-2]
        if kind in heads:
            bits = permute_for_rope(bits, heads[kind])
        if bits.ndim == 1:
            writer.write_tensor_data(as_float32(bits))
        elif is_bf16:
            writer.write_tensor_data(np.ascontiguousarray(bits))
        else:
            writer.write_tensor_data(as_float32(bits).astype(np.float16).view(np.uint16))
    writer.close()
    unfinished.rename(target)


def execution_rank(name: str) -> tuple[int, int]:
    """Sorts llama.cpp's tensor names into the order in which a pass uses them."""
    if name == "token_embd.weight":
        return -1, 0
    if not name.startswith("blk."):
        return 1 << 30, int(name == "output.weight")
    _, layer, kind, _ = name.split(".")
    return int(layer), list(LAYER_NAMES.values()).index(kind)


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--type", choices=("bf16", "f16"), default="bf16")
    options = parser.parse_args()
    convert(options.model, options.target, weight_type=options.type)
    print(f"{options.target}: {options.target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
