"""Numbers as people write them: `8e9`, `8 billion`, `8bn`, `8,000,000,000`."""

from __future__ import annotations

import math
import re

from headrace.errors import InvalidRequestError

_WORDS = {
    "": 1.0,
    "k": 1e3,
    "thousand": 1e3,
    "m": 1e6,
    "million": 1e6,
    "b": 1e9,
    "bn": 1e9,
    "billion": 1e9,
    "t": 1e12,
    "tn": 1e12,
    "trillion": 1e12,
}
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})(?:\.[0-9]{0,40})?|\.[0-9]{1,40}"
_NUMBER = re.compile(rf"([+-]?(?:{_DIGITS})(?:[eE][+-]?[0-9]{{1,3}})?)\s*([A-Za-z]*)")


def parse_count(text: str, *, option: str) -> float:
    """Return the number that `text` means; raises InvalidRequestError unless it is finite and above 0."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise InvalidRequestError(f"{option} {text!r} is not a number; write for instance 8e9, 8 billion or 250000")
    word = match[2].lower()
    if word not in _WORDS:
        raise InvalidRequestError(
            f"{option} {text!r} has an unknown word {match[2]!r}; use thousand, million, billion or trillion"
        )
    number = float(match[1].replace(",", "")) * _WORDS[word]
    if not 0 < number < math.inf:
        raise InvalidRequestError(f"{option} {text!r} cannot be meant; it must be a number above 0")
    return number
