"""What tokens say: their text, the bytes of each, and where a stop text ends them.

A tokenizer's own `decode` is for whole texts. Of a single token it loses what is no whole character, and spaces at the
beginning; of special tokens it shows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

STOP_TAIL_TOKENS = 16
"""tokens at the end of a text, beside one for each letter of the longest stop text, among which one may have ended"""
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText(NamedTuple):
    """One token. Where its bytes are no characters the text is `bytes:` and their numbers, as OpenAI writes them.

    Where no text has the token, as with rows that only fill a table up, it is `token_id:` and its number.
    """

    text: str
    data: bytes


class TokenTexts:
    """Reads the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._added = {number: str(token) for number, token in added.items()}
        special = {str(token) for token in added.values() if token.special}
        self._special = frozenset(special | set(getattr(tokenizer, "all_special_tokens", ()))) - {""}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._decoder = "" if decoder is None else decoder.__getstate__().decode("utf-8", errors="replace")

    def text(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens, with `special` ones or without, nothing tidied up afterwards."""
        shown = self._tokenizer.decode(
            list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return str(shown)

    def of(self, token: int) -> TokenText:
        """A single token as a part of a longer text."""
        data = self._bytes(token)
        if not data:
            return TokenText(f"token_id:{token}", data)
        try:
            return TokenText(data.decode("utf-8"), data)
        except UnicodeDecodeError:
            return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data)

    def before_stop(self, tokens: Sequence[int], stops: Sequence[str]) -> str | None:
        """The text before the first of `stops`, which may name special tokens; None where none is complete yet."""
        if not stops:
            return None
        tail = tokens[-STOP_TAIL_TOKENS - max(len(stop) for stop in stops) :]
        naming = [stop for stop in stops if any(name in stop for name in self._special)]
        cuts = []
        if any(stop in self.text(tail) for stop in stops):
            text = self.text(tokens)
            cuts += [text[:place] for stop in stops if (place := text.find(stop)) >= 0]
        if naming and any(stop in self.text(tail, special=True) for stop in naming):
            whole = self.text(tokens, special=True)
            cuts += [self._before(tokens, whole[:place]) for stop in naming if (place := whole.find(stop)) >= 0]
        return min(cuts, key=len, default=None)

    def _before(self, tokens: Sequence[int], beginning: str) -> str:
        """What is shown of the tokens that make up `beginning`, a beginning of the text with its special tokens."""
        count = len(tokens)
        while not beginning.startswith(known := self.text(tokens[:count], special=True)):
            count -= 1
        return self.text(tokens[:count]) + beginning[len(known) :]

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the vocabulary that no text has
            return b""
        if '"ByteLevel"' in self._decoder and all(letter in _BYTE_OF_LETTER for letter in piece):
            return bytes(_BYTE_OF_LETTER[letter] for letter in piece)
        byte = _BYTE.fullmatch(piece) if '"ByteFallback"' in self._decoder else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        if _WORD_START in self._decoder:
            return str(piece).replace(_WORD_START, " ").encode()
        return self.text([token], special=True).encode("utf-8", errors="replace")


def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for 256 on, in their order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_LETTER = _bytes_of_letters()
