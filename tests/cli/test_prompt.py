"""From prompt texts to a left-padded batch of token ids."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from cli_checkpoints import SHAPE, write_tokenizer
from headrace.cli.prompt import encode_prompts, load_tokenizer, read_prompts
from headrace.errors import CheckpointError, InvalidRequestError


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("plain")
    write_tokenizer(directory, chat=False)
    return load_tokenizer(directory, trust_remote_code=False)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("chatting")
    write_tokenizer(directory, chat=True)
    return load_tokenizer(directory, trust_remote_code=False)


def encode(tokenizer: Any, *texts: str, chat: bool | None = None, system: str | None = None) -> Any:
    return encode_prompts(tokenizer, texts, chat=chat, system=system, vocab_size=SHAPE.vocabulary)


class Piped(io.TextIOWrapper):
    """Standard input that is a pipe or a file with these bytes, or a terminal."""

    def __init__(self, data: bytes, *, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data))
        self._terminal = terminal

    def isatty(self) -> bool:
        """Whether somebody types it."""
        return self._terminal


def test_what_is_piped_in_is_the_prompt_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(prompts: list[str] | None = None, *, terminal: bool = False) -> tuple[str, ...]:
        monkeypatch.setattr(sys, "stdin", Piped(b"w5 w6\n", terminal=terminal))
        return read_prompts(prompts, None)

    assert read() == ("w5 w6\n",)
    assert read(["w9"]) == ("w9",)
    assert read(["w9", "-"]) == ("w9", "w5 w6\n")
    assert read(["-"], terminal=True) == ("w5 w6\n",)
    with pytest.raises(InvalidRequestError, match="pipe it to standard input"):
        read(terminal=True)
    monkeypatch.setattr(sys, "stdin", Piped(b""))
    with pytest.raises(InvalidRequestError, match="there is no prompt"):
        read_prompts(None, None)


def test_shorter_prompts_are_padded_on_the_left(plain: Any) -> None:
    batch = encode(plain, "w5 w6 w7", "w9")
    assert batch.input_ids.tolist() == [[5, 6, 7], [2, 2, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert (batch.lengths, batch.longest, batch.pad_token_id, batch.chat) == ((3, 1), 3, 2, False)


def test_the_chat_template_is_used_where_there_is_one_unless_refused(chatting: Any) -> None:
    unknown = 0  # "user" and "system" are no words of this vocabulary
    assert encode(chatting, "w5").input_ids.tolist() == [[10, unknown, 5, 11]]
    assert encode(chatting, "w5", system="w6").input_ids.tolist() == [[10, unknown, 6, 10, unknown, 5, 11]]
    assert encode(chatting, "w5", chat=False).input_ids.tolist() == [[5]]


def test_what_has_no_template_to_go_into_is_refused(plain: Any, chatting: Any) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        encode(plain, "w5", chat=True)
    with pytest.raises(InvalidRequestError, match="no chat template"):
        encode(plain, "w5", system="w6")
    with pytest.raises(InvalidRequestError, match="--no-chat was given"):
        encode(chatting, "w5", chat=False, system="w6")


def test_a_template_that_refuses_is_the_users_to_know(chatting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatting, "chat_template", "{{ raise_exception('no system role here') }}")
    with pytest.raises(InvalidRequestError, match="no system role here"):
        encode(chatting, "w5", system="w6")


def test_a_prompt_without_tokens_is_refused_even_inside_a_template(chatting: Any) -> None:
    with pytest.raises(InvalidRequestError, match="no tokens"):
        encode(chatting, "\t", chat=True)


def test_a_foreign_tokenizer_is_noticed(plain: Any) -> None:
    with pytest.raises(CheckpointError, match="do not belong together"):
        encode_prompts(plain, ["w500"], chat=None, system=None, vocab_size=500)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tmp_path, trust_remote_code=False)


def test_a_config_that_is_at_fault_is_named_instead_of_the_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat=False)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "dtype": "bf16"}')
    with pytest.raises(CheckpointError, match=r"config\.json .* without dtype, which is 'bf16'"):
        load_tokenizer(tmp_path, trust_remote_code=False)


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("  two\nlines \n", encoding="utf-8")
    assert read_prompts(None, str(path)) == ("  two\nlines \n",)
    path.write_bytes(b"\xef\xbb\xbfa river")
    assert read_prompts(None, str(path)) == ("a river",)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequestError, match="not UTF-8"):
        read_prompts(None, str(path))
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_prompts(None, str(tmp_path))
    with pytest.raises(InvalidRequestError, match="not UTF-8"):
        read_prompts(["\udcff"], None)
    assert read_prompts(["a", "b"], None) == ("a", "b")
