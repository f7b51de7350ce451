"""A checkpoint's tensors become blocks with exact bytes, parameters and KV sizes; the head is cut without loss."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.dtypes import STORED_BYTES
from headrace.errors import CheckpointCorruptError
from headrace.model.blocks import HEAD_CHUNK_ROWS, ROW_TILE, RowSlice, product_slices
from headrace.model.layout import PAGE_BYTES
from headrace.model.safetensors_index import ShardFile, TensorEntry, TensorIndex
from headrace.model.stored_model import StoredModel, build_stored_model

Shapes = dict[str, tuple[int, ...]]

HEADER_BYTES = 8 + 1234


def index_of(
    shapes: Shapes, *, dtype: str = "BF16", dtypes: dict[str, str] | None = None, files: int = 1
) -> TensorIndex:
    """Fabricate the index of a checkpoint: tensors one behind the other, spread over `files` files in turn."""
    ends = [HEADER_BYTES] * files
    entries = {}
    for number, (name, shape) in enumerate(shapes.items()):
        kind = (dtypes or {}).get(name, dtype)
        file_index = number * files // len(shapes)
        size_bytes = math.prod(shape) * STORED_BYTES[kind]
        entries[name] = TensorEntry(name, kind, shape, file_index, ends[file_index], size_bytes)
        ends[file_index] += size_bytes
    return TensorIndex(
        directory=Path("model"),
        files=tuple(ShardFile(Path(f"model/{number}"), end, 0, 0, 0) for number, end in enumerate(ends)),
        entries=MappingProxyType(entries),
    )


def config_of(model_type: str = "llama", **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, **fields}


def llama_shapes(
    *, hidden: int, ffn: int, layers: int, kv_width: int, vocab: int, tied: bool = False, prefix: str = "model."
) -> Shapes:
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        inner = f"{prefix}layers.{layer}."
        shapes |= {
            f"{inner}self_attn.q_proj.weight": (hidden, hidden),
            f"{inner}self_attn.k_proj.weight": (kv_width, hidden),
            f"{inner}self_attn.v_proj.weight": (kv_width, hidden),
            f"{inner}self_attn.o_proj.weight": (hidden, hidden),
            f"{inner}mlp.gate_proj.weight": (ffn, hidden),
            f"{inner}mlp.up_proj.weight": (ffn, hidden),
            f"{inner}mlp.down_proj.weight": (hidden, ffn),
            f"{inner}input_layernorm.weight": (hidden,),
            f"{inner}post_attention_layernorm.weight": (hidden,),
        }
    shapes[f"{prefix}norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}


def small_shapes(**changes: Any) -> Shapes:
    return llama_shapes(**{"hidden": 64, "ffn": 96, "layers": 3, "kv_width": 32, "vocab": 320, **changes})


def small_stored_model(*, tied: bool = False, prefix: str = "model.") -> StoredModel:
    return build_stored_model("small", config_of(**SMALL), index_of(small_shapes(tied=tied, prefix=prefix)))


# -- known models ------------------------------------------------------------------------------------------------------


def test_llama_3_8b() -> None:
    config = config_of(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    shapes = llama_shapes(hidden=4096, ffn=14336, layers=32, kv_width=1024, vocab=128256)
    model = build_stored_model("llama-3-8b", config, index_of(shapes, files=4))
    assert model.parameters == 8_030_261_248
    assert model.weights_bytes == 2 * 8_030_261_248
    assert model.stored_dtype == "BF16"
    layers = [block for block in model.blocks if block.layer_index is not None]
    assert [block.layer_index for block in layers] == list(range(32))
    assert {block.parameters for block in layers} == {218_112_000}
    assert {block.active_parameters for block in layers} == {218_112_000 - 2 * 4096}
    assert model.kv_cache_bytes(sequences=1, context_tokens=1, element_bytes=2) == 131_072
    assert model.kv_cache_bytes(sequences=3, context_tokens=100, element_bytes=4) == 3 * 100 * 2 * 131_072


@pytest.mark.parametrize(
    ("config", "expected_bytes"),
    [
        (
            {"model_type": "gpt2", "n_embd": 12288, "n_layer": 96, "n_head": 96, "vocab_size": 50257},
            4_718_592,
        ),
        (
            {
                "model_type": "llama",
                "hidden_size": 8192,
                "intermediate_size": 28672,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "vocab_size": 128256,
            },
            327_680,
        ),
    ],
    ids=["gpt-3", "llama-3-70b"],
)
def test_kv_bytes_per_token_of_known_models(config: dict[str, Any], expected_bytes: int) -> None:
    layer, table = ("h.{}.w.weight", "wte.weight")
    if config["model_type"] == "llama":
        layer, table = "layers.{}.w.weight", "embed_tokens.weight"
    shapes: Shapes = {layer.format(number): (8, 8) for number in range(config.get("n_layer", 80))}
    model = build_stored_model("known", config, index_of(shapes | {table: (16, 8)}))
    assert model.kv_cache_bytes(sequences=1, context_tokens=1, element_bytes=2) == expected_bytes


def test_gpt2_is_tied_and_its_buffers_are_no_weights() -> None:
    hidden, vocab = 768, 50257
    shapes: Shapes = {"wte.weight": (vocab, hidden), "wpe.weight": (1024, hidden)}
    for layer in range(12):
        shapes |= {
            f"h.{layer}.ln_1.weight": (hidden,),
            f"h.{layer}.ln_1.bias": (hidden,),
            f"h.{layer}.attn.bias": (1, 1, 1024, 1024),
            f"h.{layer}.attn.c_attn.weight": (hidden, 3 * hidden),
            f"h.{layer}.attn.c_attn.bias": (3 * hidden,),
            f"h.{layer}.attn.c_proj.weight": (hidden, hidden),
            f"h.{layer}.attn.c_proj.bias": (hidden,),
            f"h.{layer}.ln_2.weight": (hidden,),
            f"h.{layer}.ln_2.bias": (hidden,),
            f"h.{layer}.mlp.c_fc.weight": (hidden, 4 * hidden),
            f"h.{layer}.mlp.c_fc.bias": (4 * hidden,),
            f"h.{layer}.mlp.c_proj.weight": (4 * hidden, hidden),
            f"h.{layer}.mlp.c_proj.bias": (hidden,),
        }
    shapes |= {"ln_f.weight": (hidden,), "ln_f.bias": (hidden,)}
    config = config_of("gpt2", n_embd=hidden, n_layer=12, n_head=12, vocab_size=vocab)
    model = build_stored_model("gpt2", config, index_of(shapes, dtype="F32"))
    assert model.parameters == 124_439_808
    assert model.weights_bytes == 4 * 124_439_808
    assert model.tied
    assert [entry.name for entry in model.fixed] == ["wpe.weight", "ln_f.weight", "ln_f.bias"]


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_blocks_follow_the_order_of_a_pass() -> None:
    model = small_stored_model()
    assert [block.name for block in model.blocks] == ["layer 0", "layer 1", "layer 2", "head"]
    assert [block.index for block in model.blocks] == [0, 1, 2, 3]
    assert [block.layer_index for block in model.blocks] == [0, 1, 2, None]
    assert [entry.name for entry in model.fixed] == ["model.norm.weight"]
    assert model.embedding.name == "model.embed_tokens.weight"
    layer_parameters = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 2 * 64
    for block in model.blocks[:3]:
        assert block.parameters == layer_parameters
        assert block.active_parameters == layer_parameters - 2 * 64, "vectors are no matrix products"
        assert block.size_bytes == 2 * layer_parameters
        assert block.size_bytes <= block.read_bytes <= block.size_bytes + 2 * PAGE_BYTES


def test_tied_weights_count_once() -> None:
    tied, untied = small_stored_model(tied=True), small_stored_model(tied=False)
    assert tied.tied
    assert not untied.tied
    assert untied.parameters - tied.parameters == 320 * 64
    assert untied.weights_bytes - tied.weights_bytes == 2 * 320 * 64
    assert tied.blocks[-1].tensors[0] is tied.embedding
    assert untied.blocks[-1].tensors[0].name == "lm_head.weight"
    assert untied.weights_bytes == sum(2 * math.prod(shape) for shape in small_shapes().values())


def test_a_checkpoint_of_the_bare_model_lacks_the_prefix() -> None:
    bare = small_stored_model(tied=True, prefix="")
    assert (bare.parameters, bare.tied) == (small_stored_model(tied=True).parameters, True)


def test_a_block_may_lie_in_several_files() -> None:
    model = build_stored_model("small", config_of(**SMALL), index_of(small_shapes(), files=5))
    spread = [block for block in model.blocks if len({entry.file_index for entry in block.tensors}) > 1]
    assert spread
    for block in spread:
        assert {extent.file_index for extent in block.layout.extents} == {entry.file_index for entry in block.tensors}
    assert model.parameters == small_stored_model().parameters


def test_every_tensor_of_a_layer_has_a_place_in_its_slot() -> None:
    for block in small_stored_model().blocks[:3]:
        places = sorted((block.layout.positions[entry.name], entry.size_bytes) for entry in block.tensors)
        assert all(first + size <= second for (first, size), (second, _) in itertools.pairwise(places))
        assert places[-1][0] + places[-1][1] <= block.read_bytes


def test_old_buffers_and_layers_beyond_the_config_are_left_out() -> None:
    shapes = small_shapes() | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": (8,),
        "model.layers.3.self_attn.q_proj.weight": (64, 64),
    }
    model = build_stored_model("small", config_of(**SMALL), index_of(shapes))
    assert model.parameters == small_stored_model().parameters


def test_the_dtype_of_most_bytes_is_the_stored_one() -> None:
    norms = {name: "F32" for name in small_shapes() if "norm" in name}
    model = build_stored_model("small", config_of(**SMALL), index_of(small_shapes(), dtypes=norms))
    assert model.stored_dtype == "BF16"
    assert model.blocks[0].size_bytes == 2 * (model.blocks[0].parameters - 2 * 64) + 4 * 2 * 64


def test_a_head_counts_towards_the_format_of_most_weights() -> None:
    shapes = llama_shapes(hidden=64, ffn=96, layers=1, kv_width=32, vocab=1000)
    config = config_of(**{**SMALL, "num_hidden_layers": 1, "vocab_size": 1000})
    model = build_stored_model("small", config, index_of(shapes, dtypes={"lm_head.weight": "F32"}))
    assert (model.stored_dtype, model.weight_format) == ("BF16", "fp32")


def test_a_token_is_multiplied_with_its_own_experts_only() -> None:
    shapes: Shapes = {"model.embed_tokens.weight": (320, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        inner = f"model.layers.{layer}."
        shapes |= {f"{inner}self_attn.q_proj.weight": (64, 64), f"{inner}mlp.gate.weight": (8, 64)}
        shapes |= {f"{inner}mlp.experts.{expert}.up_proj.weight": (32, 64) for expert in range(8)}
    config = config_of(
        "qwen3_moe", **{**SMALL, "num_hidden_layers": 2}, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32
    )
    block = build_stored_model("moe", config, index_of(shapes)).blocks[0]
    assert block.parameters == 64 * 64 + 8 * 64 + 8 * 32 * 64
    assert block.active_parameters == 64 * 64 + 8 * 64 + 2 * 32 * 64


# -- what a config promises and the weights do not hold ----------------------------------------------------------------


def without(*names: str) -> Shapes:
    return {name: shape for name, shape in small_shapes().items() if not name.startswith(names)}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (without("model.embed_tokens"), "holds no table of 320 rows, the input embedding"),
        (without("model.layers.1."), r"promises 3 layers, but the weights of layer 1 \(1 in all\) are in no shard"),
        (without("model.layers.1.", "model.layers.2."), r"layer 1 \(2 in all\)"),
        (without("model.layers.2.") | {"model.layers.2.norm.weight": (0,)}, "layer 2"),
        (small_shapes() | {"lm_head.weight": (320,)}, r"lm_head\.weight has shape \(320,\); a matrix is expected"),
        (small_shapes() | {"lm_head.weight": (0, 64)}, "a matrix is expected"),
        (small_shapes() | {"lm_head.weight": (320, 0)}, "a matrix is expected"),
        (small_shapes() | {"model.embed_tokens.weight": (320,)}, r"embed_tokens\.weight has shape \(320,\)"),
    ],
)
def test_weights_that_contradict_the_config_are_refused(shapes: Shapes, words: str) -> None:
    with pytest.raises(CheckpointCorruptError, match=words):
        build_stored_model("small", config_of(**SMALL), index_of(shapes))


# -- the head ----------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 300_000) | st.integers(1, 40_000).map(lambda eighth: 8 * eighth),
    hidden=st.sampled_from([4, 64]),
    ffn=st.integers(1, 60_000),
    tied=st.booleans(),
)
@example(50257, 64, 1000, True)
@example(50304, 64, 1000, True)
@example(256_000, 64, 1000, False)
@example(262_208, 64, 1000, False)
@example(HEAD_CHUNK_ROWS + 1, 64, 1, False)
def test_the_head_is_cut_without_loss(rows: int, hidden: int, ffn: int, tied: bool) -> None:
    config = config_of(**{**SMALL, "hidden_size": hidden, "num_hidden_layers": 1, "vocab_size": rows})
    shapes = llama_shapes(hidden=hidden, ffn=ffn, layers=1, kv_width=hidden, vocab=rows, tied=tied)
    model = build_stored_model("x", config, index_of(shapes))
    pieces = [block for block in model.blocks if block.head_rows is not None]
    matrix = model.embedding if tied else pieces[0].tensors[0]
    reached = 0
    for number, piece in enumerate(pieces):
        assert piece.head_rows is not None
        assert piece.index == 1 + number
        assert piece.head_rows.first == reached
        reached = piece.head_rows.last
        count = reached - piece.head_rows.first
        assert piece.parameters == piece.active_parameters == count * hidden
        assert piece.size_bytes == 2 * count * hidden
        assert piece.tensors == (matrix,)
        (extent,) = piece.layout.extents
        start = extent.file_offset + piece.layout.positions[matrix.name] - extent.slot_offset
        assert start == matrix.offset + piece.head_rows.first * hidden * 2
    assert reached == rows
    if len(pieces) > 1:
        assert_same_products([piece.head_rows for piece in pieces if piece.head_rows is not None])
        assert max(piece.size_bytes for piece in pieces) <= 2 * hidden * 2 * ROW_TILE + max(
            model.blocks[0].size_bytes, 2 * hidden * HEAD_CHUNK_ROWS
        ), "pieces are about as large as a layer, or as what is multiplied at once"
    for piece in pieces:  # a piece is multiplied in parts, which must keep the products of the whole matrix
        assert piece.head_rows is not None
        size = piece.head_rows.last - piece.head_rows.first
        parts = product_slices(size, HEAD_CHUNK_ROWS)
        if len(pieces) > 1 and len(parts) > 1:
            assert_same_products([*parts, piece.head_rows])


def assert_same_products(slices: list[RowSlice]) -> None:
    """Check for the shapes at which parts of a matrix were seen to give the bits of the whole one."""
    sizes = [last - first for first, last in slices]
    assert min(sizes) >= HEAD_CHUNK_ROWS // 2 - 2 * ROW_TILE
    assert len({size % ROW_TILE == 0 for size in sizes}) == 1
    assert {size % 8 for size in sizes} == {0}


@given(
    rows=st.integers(1, 400_000) | st.integers(1, 50_000).map(lambda eighth: 8 * eighth),
    largest=st.just(HEAD_CHUNK_ROWS),
)
@example(256_000, HEAD_CHUNK_ROWS)
@example(262_208, HEAD_CHUNK_ROWS)
@example(151_936, HEAD_CHUNK_ROWS)
@example(HEAD_CHUNK_ROWS, HEAD_CHUNK_ROWS)
@example(HEAD_CHUNK_ROWS + 8, HEAD_CHUNK_ROWS)
@example(2 * HEAD_CHUNK_ROWS + 16, HEAD_CHUNK_ROWS)
@example(3 * HEAD_CHUNK_ROWS + 16, HEAD_CHUNK_ROWS)
def test_slices_of_a_product(rows: int, largest: int) -> None:
    slices = product_slices(rows, largest)
    assert [first for first, _ in slices] == [0, *(last for _, last in slices)][:-1]
    assert slices[-1].last == rows
    if rows % 8 or rows <= largest:
        assert len(slices) == 1
        return
    assert len(slices) == math.ceil(rows / largest)
    sizes = [last - first for first, last in slices]
    assert max(sizes) <= largest + 2 * ROW_TILE
    assert max(sizes) - min(sizes) <= 3 * ROW_TILE
    assert_same_products(slices)
    assert {size % ROW_TILE == 0 for size in sizes} == {rows % ROW_TILE == 0}, "as the whole matrix"


# -- KV cache and work space -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "positions"), [(1, 4), (8, 32), (9, 34), (100, 216)])
def test_a_sliding_window_keeps_no_more_than_itself(tokens: int, positions: int) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = config_of(
        "gemma3_text",
        **{**SMALL, "num_hidden_layers": 4},
        head_dim=16,
        sliding_window=8,
        layer_types=kinds,
    )
    model = build_stored_model("gemma", config, index_of(small_shapes(layers=4, tied=True)))
    per_position = 2 * 2 * 16 * 2  # keys and values, two heads of 16, two bytes
    assert model.kv_cache_bytes(sequences=1, context_tokens=tokens, element_bytes=2) == positions * per_position
    assert model.kv_cache_bytes(sequences=5, context_tokens=tokens, element_bytes=4) == 10 * positions * per_position


@given(
    sequences=st.integers(1, 64),
    tokens=st.integers(1, 4096),
    context=st.integers(1, 4096),
    element=st.sampled_from([2, 4]),
)
def test_work_space_grows_with_the_work(sequences: int, tokens: int, context: int, element: int) -> None:
    model = small_stored_model()

    def space(sequences: int, tokens: int, context: int) -> int:
        return model.work_space_bytes(
            sequences=sequences, new_tokens=tokens, context_tokens=context, element_bytes=element
        )

    base = space(sequences, tokens, context)
    assert base <= space(sequences + 1, tokens, context)
    assert base <= space(sequences, tokens + 1, context)
    assert base <= space(sequences, tokens, context + 1)
    assert base > sequences * (tokens * 64 * element + 320 * 4), "the residual and the logits are in it"
