"""Text as its tokens come: no character is shown before it is complete, and none is ever taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""what a tokenizer shows for the first bytes of a character whose other bytes are still to come"""


class TextStream:
    """A streamer of transformers' `generate`: decodes one sequence's tokens; the parts add up to the whole text."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._tokens: list[int] = []
        self._prompt_seen = False
        self._written = ""

    def put(self, value: Any) -> None:
        """Take the prompt's tokens first, which are passed over, then one new token at each call."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._tokens += value.flatten().tolist()
        self._hand_out(self.text.rstrip(UNFINISHED))

    def end(self) -> None:
        """Hand out what was held back."""
        self._hand_out(self.text)

    @property
    def text(self) -> str:
        """The whole text so far."""
        return decode(self._tokenizer, self._tokens)

    def _hand_out(self, text: str) -> None:
        if len(text) > len(self._written) and text.startswith(self._written):
            new, self._written = text[len(self._written) :], text
            self._write(new)


def decode(tokenizer: Any, tokens: list[int]) -> str:
    """Return the text of generated tokens, without special ones, nothing tidied up afterwards."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
