"""Text as its tokens come: no character is shown before it is complete, and none is ever taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from headrace.inference.token_text import TokenTexts

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""what a tokenizer shows for the first bytes of a character whose other bytes are still to come"""


class Answers:
    """The texts of new tokens, each up to the first of `stops`. A stopping criterion of transformers' `generate`."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), *, prompt_tokens: int = 0) -> None:
        self.stops = tuple(stops)
        self._texts = TokenTexts(tokenizer)
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Any, _scores: Any, **_options: Any) -> Any:
        """Which rows of shape (sequences, tokens) hold a stop text."""
        rows = input_ids[:, self._prompt_tokens :].tolist()
        done = [self._texts.before_stop(tokens, self.stops) is not None for tokens in rows]
        return input_ids.new_tensor(done).bool()

    def text_and_length(self, tokens: list[int]) -> tuple[str, int]:
        """The text, and how many tokens it took, that of the stop text included."""
        for count in range(1, len(tokens) + 1) if self.stops else ():
            text = self._texts.before_stop(tokens[:count], self.stops)
            if text is not None:
                return text, count
        return self._texts.text(tokens), len(tokens)

    def so_far(self, tokens: list[int]) -> str:
        """As much of the text as stays whatever comes: neither half a character nor the beginning of a stop text."""
        ended = self._texts.before_stop(tokens, self.stops)
        if ended is not None:
            return ended
        text = self._texts.text(tokens).rstrip(UNFINISHED)
        begun = max((_overlap(text, stop) for stop in self.stops), default=0)
        return text[: len(text) - begun]


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of `text` are a beginning of `stop`."""
    return next((count for count in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:count])), 0)


class TextStream:
    """A streamer of transformers' `generate`: writes one answer as it comes; the parts add up to the whole text."""

    def __init__(self, answers: Answers, write: Callable[[str], None]) -> None:
        self._answers = answers
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
        self._hand_out(self._answers.so_far(self._tokens))

    def end(self) -> None:
        """Hand out what was held back."""
        self._hand_out(self._answers.text_and_length(self._tokens)[0])

    def _hand_out(self, text: str) -> None:
        if len(text) > len(self._written) and text.startswith(self._written):
            new, self._written = text[len(self._written) :], text
            self._write(new)
