"""The text and the bytes of single tokens, and stop texts, some of which are special tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headrace.inference.token_text import TokenTexts

WORD = "\N{LOWER ONE EIGHTH BLOCK}"


def byte_level() -> Any:
    """A token for each byte, and two special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<|end|>")


def sentencepiece_like() -> Any:
    words = [f"{WORD}the", "re", "<0xE2>", "<0x82>", "<0xAC>", WORD]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace(WORD, " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", ["a river", " é", "€", "\n"])
def test_bytes_of_tokens_are_those_of_the_text(text: str) -> None:
    tokenizer = byte_level()
    texts = TokenTexts(tokenizer)
    found = [texts.of(token) for token in ids(tokenizer, text)]
    assert b"".join(item.data for item in found) == text.encode()
    assert all(item.text == item.data.decode() for item in found if item.data < b"\x80")


def test_parts_of_a_character_differ_in_their_text() -> None:
    tokenizer = byte_level()
    found = [TokenTexts(tokenizer).of(token).text for token in ids(tokenizer, "€")]
    assert found == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]


def test_spaces_and_bytes_of_the_other_family() -> None:
    texts = TokenTexts(sentencepiece_like())
    assert [texts.of(token) for token in (0, 1, 5)] == [(" the", b" the"), ("re", b"re"), (" ", b" ")]
    assert b"".join(texts.of(token).data for token in (2, 3, 4)) == "€".encode()


def test_a_token_that_no_text_has_goes_by_its_number() -> None:
    assert TokenTexts(byte_level()).of(100_000) == ("token_id:100000", b"")


@pytest.mark.parametrize(
    ("text", "stops", "before"),
    [
        ("ab<|end|>", ["<|end|>"], "ab"),
        ("<|end|>", ["<|end|>"], ""),
        ("a<|end|>b<|end|>c\n", ["c\n", "x"], "ab"),
        ("a<|end|>bcd<|end|>", ["cd<|end|>"], "ab"),
        ("ab<|end|>", ["end"], None),  # a special token is one sign, and no text is in it
        ("ab", ["<|end|>", "c"], None),
        ("abc", [], None),
    ],
)
def test_stop_texts_may_name_special_tokens(text: str, stops: list[str], before: str | None) -> None:
    tokenizer = byte_level()
    assert TokenTexts(tokenizer).before_stop(ids(tokenizer, text), stops) == before
