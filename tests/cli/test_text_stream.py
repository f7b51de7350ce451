"""The streamed parts add up to the text, and no part shows half a character."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.cli.text_stream import UNFINISHED, Answers, TextStream


class ByteTokenizer:
    """Every token is one byte of UTF-8, so that most characters take several tokens."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return bytes(tokens).decode("utf-8", errors="replace")


def streamed(tokens: bytes, *stops: str) -> list[str]:
    parts: list[str] = []
    stream = TextStream(Answers(ByteTokenizer(), stops), parts.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt, which is not shown
    for token in tokens:
        stream.put(torch.tensor([token]))
    stream.end()
    return parts


@given(st.text(max_size=12))
def test_parts_add_up_and_are_whole_characters(text: str) -> None:
    parts = streamed(text.encode())
    assert "".join(parts) == text
    if UNFINISHED not in text:
        assert not any(UNFINISHED in part for part in parts)


def test_text_comes_as_soon_as_it_is_known() -> None:
    assert streamed("aé€b".encode()) == ["a", "é", "€", "b"]


def test_the_beginning_of_a_stop_text_waits_until_it_is_known() -> None:
    assert streamed(b"abcd", "bx", "cdef") == ["a", "b", "cd"]
    assert streamed(b"a\n\nb", "\n\n") == ["a"]
    assert streamed(b"a\nb", "\n\n") == ["a", "\nb"]


@given(st.text("ab", max_size=8), st.text("ab", min_size=1, max_size=3))
def test_parts_add_up_to_the_text_before_a_stop(text: str, stop: str) -> None:
    before, _, _ = text.partition(stop)
    assert "".join(streamed(text.encode(), stop)) == before
    answers = Answers(ByteTokenizer(), [stop], prompt_tokens=1)
    assert answers.text_and_length(list(text.encode())) == (before, min(len(text), len(before + stop)))
    rows = torch.tensor([[0, *text.encode()]])
    assert answers(rows, None).tolist() == [stop in text]


@pytest.mark.parametrize("tokens", [b"ab\xe2\x82", b"\xff"])
def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokens: bytes) -> None:
    assert "".join(streamed(tokens)) == tokens.decode(errors="replace")
