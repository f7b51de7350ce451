"""GGUF headers: read as the gguf library writes them, and refused when they lie."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import gguf
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import CheckpointCorruptError, CheckpointError, HeadraceError, UnsupportedModelError
from headrace.model.catalogue import find_model
from headrace.model.from_gguf import model_from_gguf
from headrace.model.gguf_index import BLOCKS, GgufIndex

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 2, 64, 128, 4, 2, 96


def write_llama(path: Path, *, tied: bool = False, quantised: bool = False, layers: int = LAYERS) -> int:
    """Write a tiny llama; return the bytes of its tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(512)
    writer.add_array("tokenizer.ggml.tokens", [f"token {number}" for number in range(VOCAB)])
    writer.add_array("tokenizer.ggml.scores", [0.0] * 5000)
    total = 0

    def add(name: str, *shape: int) -> None:
        nonlocal total
        values = numpy.zeros(shape, dtype=numpy.float16 if len(shape) > 1 else numpy.float32)
        if quantised and len(shape) > 1:
            packed = gguf.quants.quantize(values.astype(numpy.float32), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            total += packed.nbytes
        else:
            writer.add_tensor(name, values)
            total += values.nbytes

    add("token_embd.weight", VOCAB, HIDDEN)
    for layer in range(LAYERS):
        head = HIDDEN // HEADS
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.attn_k.weight", KV_HEADS * head, HIDDEN)
        add(f"blk.{layer}.attn_v.weight", KV_HEADS * head, HIDDEN)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_gate.weight", INNER, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", INNER, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, INNER)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", VOCAB, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_the_shape_has_the_file_s_bytes(tmp_path: Path, tied: bool, quantised: bool) -> None:
    path = tmp_path / "tiny.gguf"
    total = write_llama(path, tied=tied, quantised=quantised)
    index = GgufIndex.from_file(path)
    assert sum(tensor.size_bytes for tensor in index.tensors) == total
    assert index.metadata["tokenizer.ggml.scores"] == {"length": 5000}
    shape = model_from_gguf(path)
    assert shape.weights_bytes == total
    assert shape.tied is tied
    assert shape.weight_format == ("q8_0" if quantised else "fp16")
    assert shape.parameters == sum(tensor.num_elements for tensor in index.tensors)
    assert shape.kv_bytes_per_token() == 2 * LAYERS * KV_HEADS * (HIDDEN // HEADS) * 2
    assert find_model(str(path)) == shape


def test_our_reader_finds_what_the_library_s_reader_finds(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_llama(path, quantised=True)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for tensor in GgufIndex.from_file(path).tensors:
        assert tensor.size_bytes == theirs[tensor.name].n_bytes
        assert tensor.offset == theirs[tensor.name].data_offset


def test_the_table_of_types_is_the_library_s() -> None:
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        assert BLOCKS[kind.value] == (kind.name.lower(), *sizes)


@pytest.mark.parametrize(
    ("kind", "width", "name", "bits"),
    [(40, 64, "nvfp4", 4.5), (41, 128, "q1_0", 1.125), (42, 64, "q2_0", 2.25), (33, 64, "q4_0", 4.5)],
)
def test_types_that_few_files_have_are_sized(tmp_path: Path, kind: int, width: int, name: str, bits: float) -> None:
    """A file whose one type number is exchanged: float16 has 16 bits, these fewer."""
    path = tmp_path / "tiny.gguf"
    write_parts(path, "llama", {**LLAMA, "embedding_length": width, "feed_forward_length": width}, tensors_of(width))
    data = path.read_bytes()
    for tensor in GgufIndex.from_file(path).tensors:
        if len(tensor.shape) > 1:  # name, number of dimensions, both dimensions, then the type
            at = data.index(tensor.name.encode()) + len(tensor.name) + 4 + 16
            data = data[:at] + struct.pack("<I", kind) + data[at + 4 :]
    path.write_bytes(data)
    model = model_from_gguf(path)
    layer = next(model.layers())
    assert model.weight_format == name
    assert layer.feed_forward_bytes * 8 == bits * layer.feed_forward_parameters


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny-00001-of-00003.gguf"
    write_llama(path)
    with pytest.raises(CheckpointError, match="tiny-00002-of-00003"):
        GgufIndex.from_file(path)


def write_parts(path: Path, architecture: str, fields: dict[str, int], tensors: dict[str, tuple[int, ...]]) -> int:
    """Write any model in float16, norms in float32; return the bytes of its tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        writer.add_uint32(f"{architecture}.{name}" if "general." not in name else name, value)
    total = 0
    for name, shape in tensors.items():
        values = numpy.zeros(shape, dtype=numpy.float16 if len(shape) > 1 else numpy.float32)
        writer.add_tensor(name, values)
        total += values.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


MOE = {
    "block_count": 2, "embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 4,
    "attention.head_count_kv": 2, "attention.key_length": 16, "context_length": 512, "expert_count": 4,
    "expert_used_count": 2, "expert_feed_forward_length": 32,
}  # fmt: skip
MOE_LAYER: dict[str, tuple[int, ...]] = {
    "attn_norm.weight": (64,), "attn_q.weight": (64, 64), "attn_k.weight": (32, 64), "attn_v.weight": (32, 64),
    "attn_output.weight": (64, 64), "attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,), "ffn_norm.weight": (64,),
    "ffn_gate_inp.weight": (4, 64), "ffn_gate_exps.weight": (4, 32, 64), "ffn_up_exps.weight": (4, 32, 64),
    "ffn_down_exps.weight": (4, 64, 32),
}  # fmt: skip
MOE_ENDS: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (96, 64),
    "output_norm.weight": (64,),
    "output.weight": (96, 64),
}


def moe_layers(*numbers: int) -> dict[str, tuple[int, ...]]:
    return {f"blk.{number}.{name}": shape for number in numbers for name, shape in MOE_LAYER.items()}


LLAMA = {"block_count": 1, "attention.head_count": 4, "context_length": 512}


def tensors_of(width: int) -> dict[str, tuple[int, ...]]:
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    return {
        "token_embd.weight": (96, width),
        "output_norm.weight": (width,),
        **{f"blk.0.{name}.weight": (width, width) for name in names},
        **{f"blk.0.{name}_norm.weight": (width,) for name in ("attn", "ffn")},
    }


def test_experts_one_by_one_are_those_in_one_tensor(tmp_path: Path) -> None:
    """Mixtral's first files have a tensor for each expert."""
    fields = {**MOE, "feed_forward_length": 32}
    joined = {**MOE_ENDS, **moe_layers(0, 1)}
    joined = {name: shape for name, shape in joined.items() if "_q_norm" not in name and "_k_norm" not in name}
    single = {name: shape for name, shape in joined.items() if "_exps" not in name}
    for name, (experts, *shape) in joined.items():
        if "_exps" in name:
            single |= {name.replace("_exps", f".{number}"): tuple(shape) for number in range(experts)}
    new, old = tmp_path / "new.gguf", tmp_path / "old.gguf"
    assert write_parts(new, "llama", fields, joined) == write_parts(old, "llama", fields, single)
    assert model_from_gguf(old).groups == model_from_gguf(new).groups
    assert next(model_from_gguf(old).layers()).expert_bytes == 2 * 3 * 32 * 64


def test_experts_are_told_from_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "moe.gguf"
    total = write_parts(path, "qwen3moe", MOE, {**MOE_ENDS, **moe_layers(0, 1)})
    shape = model_from_gguf(path)
    layer = next(shape.layers())
    assert shape.weights_bytes == total
    assert shape.parameters == sum(tensor.num_elements for tensor in GgufIndex.from_file(path).tensors)
    assert (layer.num_experts, layer.experts_per_token) == (4, 2)
    assert layer.expert_bytes == 2 * layer.expert_parameters == 2 * 3 * 32 * 64
    assert layer.attention_bytes == 2 * layer.attention_parameters


DENSE: dict[str, tuple[int, ...]] = {
    "attn_norm.weight": (64,), "attn_q.weight": (64, 64), "attn_k.weight": (32, 64), "attn_v.weight": (32, 64),
    "attn_output.weight": (64, 64), "ffn_norm.weight": (64,), "ffn_gate.weight": (96, 64), "ffn_up.weight": (96, 64),
    "ffn_down.weight": (64, 96),
}  # fmt: skip
BIASES: dict[str, tuple[int, ...]] = {"attn_q.bias": (64,), "attn_k.bias": (32,), "attn_v.bias": (32,)}
EXPERTS = {name: shape for name, shape in MOE_LAYER.items() if "_q_norm" not in name and "_k_norm" not in name}
SHARED: dict[str, tuple[int, ...]] = {
    f"ffn_{name}_shexp.weight": (64, 24) if name == "down" else (24, 64) for name in ("gate", "up", "down")
}
LATENT: dict[str, tuple[int, ...]] = {
    "attn_norm.weight": (64,), "attn_q.weight": (4 * 24, 64), "attn_kv_a_mqa.weight": (16 + 8, 64),
    "attn_kv_a_norm.weight": (16,), "attn_kv_b.weight": (4 * (16 + 16), 16), "attn_output.weight": (64, 4 * 16),
    **{name: shape for name, shape in EXPERTS.items() if "attn" not in name}, **{
        f"ffn_{name}_shexp.weight": (64, 32) if name == "down" else (32, 64) for name in ("gate", "up", "down")
    },
}  # fmt: skip
LATENT_FIELDS = {
    "attention.kv_lora_rank": 16, "attention.key_length": 24, "attention.value_length": 16, "rope.dimension_count": 8,
    "expert_shared_count": 1, "leading_dense_block_count": 0,
}  # fmt: skip
NO_WIDTH = {name: value for name, value in MOE.items() if name != "expert_feed_forward_length"}


@pytest.mark.parametrize(
    ("architecture", "fields", "layer"),
    [
        ("llama", {}, {**DENSE, **BIASES, "attn_output.bias": (64,)}),
        ("qwen2vl", {}, {**DENSE, **BIASES}),
        ("mistral3", {}, DENSE),
        ("qwen2moe", NO_WIDTH, {**EXPERTS, **BIASES, **SHARED, "ffn_gate_inp_shexp.weight": (1, 64)}),
        ("deepseek2", {**MOE, **LATENT_FIELDS}, LATENT),
        ("deepseek2", {**MOE, **LATENT_FIELDS}, {**LATENT, "exp_probs_b.bias": (4,)}),
        ("glm4moe", {**MOE, "leading_dense_block_count": 0, "expert_shared_count": 0, "nextn_predict_layers": 0},
         {**MOE_LAYER, **BIASES, "exp_probs_b.bias": (4,)}),
        ("falcon", {"attention.head_count_kv": 2, "attention.key_length": 16},
         {"attn_norm.weight": (64,), "attn_norm.bias": (64,), "attn_norm_2.weight": (64,), "attn_norm_2.bias": (64,),
          "attn_qkv.weight": (64 + 2 * 32, 64), "attn_output.weight": (64, 64), "ffn_up.weight": (256, 64),
          "ffn_down.weight": (64, 256)}),
    ],
)  # fmt: skip
def test_what_the_metadata_does_not_say_the_tensors_show(
    tmp_path: Path, architecture: str, fields: dict[str, int], layer: dict[str, tuple[int, ...]]
) -> None:
    """Biases, norms and widths that a file has no key for, and names that only one architecture uses."""
    path = tmp_path / "tiny.gguf"
    known = {name: value for name, value in MOE.items() if "expert" not in name} | fields
    ends = {**MOE_ENDS, **({"output_norm.bias": (64,)} if architecture == "falcon" else {})}
    layers = {f"blk.{number}.{name}": shape for number in (0, 1) for name, shape in layer.items()}
    total = write_parts(path, architecture, known, {**ends, **layers})
    model = model_from_gguf(path)
    assert model.weights_bytes == total
    assert model.parameters == sum(tensor.num_elements for tensor in GgufIndex.from_file(path).tensors)


def test_the_context_is_stretched_as_in_a_config(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, value in {**LLAMA, "embedding_length": 64, "feed_forward_length": 64}.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(512)
    for name, shape in tensors_of(64).items():
        writer.add_tensor(name, numpy.zeros(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert model_from_gguf(tmp_path / "tiny.gguf").context_tokens == 2048


def test_layers_that_predict_further_tokens_are_no_layers(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    dense = {f"blk.{number}.{name}": shape for number in (0, 1) for name, shape in DENSE.items()}
    total = write_parts(
        path, "llama", {**NO_WIDTH, "expert_count": 0, "nextn_predict_layers": 1}, {**MOE_ENDS, **dense}
    )
    model = model_from_gguf(path)
    assert (model.num_layers, model.weights_bytes) == (1, total)


def test_a_table_of_positions_is_no_head(tmp_path: Path) -> None:
    path = tmp_path / "gpt2.gguf"
    fields = {"block_count": 1, "embedding_length": 64, "attention.head_count": 4, "context_length": 32}
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (64,), "attn_norm.bias": (64,), "attn_qkv.weight": (192, 64), "attn_qkv.bias": (192,),
        "attn_output.weight": (64, 64), "attn_output.bias": (64,), "ffn_norm.weight": (64,), "ffn_norm.bias": (64,),
        "ffn_up.weight": (256, 64), "ffn_up.bias": (256,), "ffn_down.weight": (64, 256), "ffn_down.bias": (64,),
    }  # fmt: skip
    ends = {"token_embd.weight": (96, 64), "position_embd.weight": (32, 64)}
    norms: dict[str, tuple[int, ...]] = {"output_norm.weight": (64,), "output_norm.bias": (64,)}
    total = write_parts(path, "gpt2", fields, {**ends, **norms, **{f"blk.0.{name}": at for name, at in layer.items()}})
    shape = model_from_gguf(path)
    assert shape.weights_bytes == total
    assert shape.tied
    assert (shape.embedding_bytes, shape.head_bytes) == (2 * (96 + 32) * 64, 2 * 96 * 64)
    assert shape.parameters == sum(tensor.num_elements for tensor in GgufIndex.from_file(path).tensors)


def test_parts_are_read_as_one_model_from_any_of_them(tmp_path: Path) -> None:
    first, second = (tmp_path / f"moe-0000{number}-of-00002.gguf" for number in (1, 2))
    total = write_parts(first, "qwen3moe", MOE, {**MOE_ENDS, **moe_layers(0)})
    total += write_parts(second, "qwen3moe", {}, moe_layers(1))
    whole = tmp_path / "moe.gguf"
    write_parts(whole, "qwen3moe", MOE, {**MOE_ENDS, **moe_layers(0, 1)})
    for path in (first, second):
        assert model_from_gguf(path).weights_bytes == total
        assert model_from_gguf(path).groups == model_from_gguf(whole).groups
    write_parts(second, "qwen3moe", {}, moe_layers(0))
    with pytest.raises(CheckpointCorruptError, match="listed twice"):
        GgufIndex.from_file(first)


def test_version_2_and_other_alignments_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    total = write_llama(path)
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 2)
    path.write_bytes(data)
    assert model_from_gguf(path).weights_bytes == total
    wide = tmp_path / "wide.gguf"
    writer = gguf.GGUFWriter(wide, "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("a.weight", numpy.zeros((3, 5), dtype=numpy.float32))
    writer.add_tensor("b.weight", numpy.zeros((3, 5), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = [(tensor.name, tensor.data_offset) for tensor in gguf.GGUFReader(wide).tensors]
    assert [(tensor.name, tensor.offset) for tensor in GgufIndex.from_file(wide).tensors] == theirs
    assert all(offset % 256 == 0 for _, offset in theirs)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "moe.gguf"
    write_parts(path, "qwen9", {"block_count": 1}, MOE_ENDS)
    with pytest.raises(UnsupportedModelError, match=r"'qwen9'.*did you mean"):
        model_from_gguf(path)


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_llama(path, layers=LAYERS + 1)
    with pytest.raises(CheckpointCorruptError, match="layer 2"):
        model_from_gguf(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = tmp_path / "tiny.gguf"
    write_llama(whole)
    data = whole.read_bytes()
    for length in [*range(0, 400, 7), len(data) // 2, len(data) - 1]:
        path = tmp_path / "short.gguf"
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointCorruptError):
            GgufIndex.from_file(path)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, struct.pack("<I", 9), "version 9"),
        (8, struct.pack("<Q", 2**60), "number of tensors"),
        (16, struct.pack("<Q", 2**60), "metadata entries"),
        (24, struct.pack("<Q", 2**60), "length of"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, at: int, value: bytes, message: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_llama(path)
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match=message):
        GgufIndex.from_file(path)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_whatever_the_bytes_nothing_but_our_errors_comes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_llama(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(HeadraceError):
        model_from_gguf(path)
