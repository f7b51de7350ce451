"""Tiny random checkpoints with a tokenizer, for tests of the command line: nothing is fetched from anywhere."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from headrace.model.config_fields import read_config
from headrace.model.safetensors_index import TensorIndex
from headrace.model.stored_model import build_stored_model
from headrace.planning.infeasible import minimum_bytes
from headrace.planning.scenario import Scenario
from headrace.planning.workload import Workload
from make_checkpoint import SHAPES, write_checkpoint

SHAPE = SHAPES["llama-tiny"]
CONTEXT_TOKENS = 8192
STREAMED_DTYPE = "bfloat16"
CHAT_TEMPLATE = (
    "{% for message in messages %}w10 {{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w11{% endif %}"
)


def write_tokenizer(directory: Path, *, chat: bool) -> None:
    """Write a tokenizer with a word for every token: <unk>, <s>, </s>, w3, w4, ..."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, SHAPE.vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(directory)


def write_model(directory: Path, *, chat: bool = False) -> Path:
    """Write the checkpoint (12.8 MB of weights, most of them in the head) and its tokenizer."""
    write_checkpoint(directory, SHAPE, shard_bytes=1_000_000_000, seed=0)
    write_tokenizer(directory, chat=chat)
    return directory


def streaming_budget(directory: Path, *, prompt_tokens: int, new_tokens: int) -> int:
    """Bytes that suffice for this work in STREAMED_DTYPE, and that leave some of the weights on the disk.

    The least that will do, and less of the remaining 5.5 MB than would hold them all.
    """
    scenario = Scenario(
        model=build_stored_model(
            directory.name, read_config(directory / "config.json"), TensorIndex.from_directory(directory)
        ),
        workload=Workload(sequences=1, prompt_tokens=prompt_tokens, generate_tokens=new_tokens),
        compute_dtype=STREAMED_DTYPE,
        budget_bytes=1,
        copies_weights=True,
    )
    return minimum_bytes(scenario) + 2_500_000
