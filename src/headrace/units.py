"""Sizes and rates as people write them. GB is 10^9 bytes, GiB is 2^30, and a bare `G` means GiB."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from headrace.errors import InvalidRequestError

_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_FACTORS = {"B": 1, **_DECIMAL, **_BINARY, **{f"{prefix}IB": factor for prefix, factor in _BINARY.items()}}
_SIZE = re.compile(r"([0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})\s*([A-Za-z]*)")
_LARGEST_BYTES = 2**60


def parse_size(text: str | int) -> int:
    """Return the bytes that `text` means: `800MB`, `2GiB`, `2G` (= GiB), `1.5e9` is not accepted; a number is bytes.

    Raises InvalidRequestError for anything without a positive number and a unit (a bare number is refused unless it
    is large enough to be plainly meant as bytes, at least 4096).
    """
    if not isinstance(text, str):
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidRequestError(f"{text!r} is not a size; write a number and a unit, such as 800MB, 2GiB or 2G")
    number, unit = Fraction(match[1]), match[2].upper()
    if unit == "":
        if number < 4096:
            raise InvalidRequestError(f"{text!r} has no unit; write for instance {match[1]}GiB or {match[1]}MB")
        unit = "B"
    if unit not in _FACTORS:
        raise InvalidRequestError(
            f"{text!r} has an unknown unit {match[2]!r}; use KB, MB, GB, TB, KiB, MiB, GiB or TiB"
        )
    size_bytes = number * _FACTORS[unit]
    if not 1 <= size_bytes <= _LARGEST_BYTES:
        raise InvalidRequestError(f"{text!r} is not a usable size; it must lie between one byte and 1 EiB")
    return int(size_bytes)


def parse_rate(text: str | float) -> float:
    """Return bytes per second for `500MB/s`, `500MBps`, `500MB`, `1GiB/s` or a number; `Mbps`, bits, is refused."""
    if not isinstance(text, str):
        return text
    text = text.strip().removesuffix("/s")
    return float(parse_size(text.removesuffix("ps") if text.endswith("Bps") else text))


def format_bytes(size_bytes: float) -> str:
    """Write bytes in decimal units with three digits: `1.23 GB`, `640 MB`, `12 B`."""
    for unit, factor in reversed(_DECIMAL.items()):
        value = float(f"{size_bytes / factor:.3g}")  # rounded first: 999.9 MB is 1.00 GB
        if abs(value) >= 1:
            return f"{value:.{max(0, 2 - int(math.log10(abs(value))))}f} {unit}"
    return f"{int(size_bytes)} B"


def format_rate(bytes_per_s: float) -> str:
    """Write a bandwidth: `1.23 GB/s`."""
    return f"{format_bytes(bytes_per_s)}/s"


def format_seconds(seconds: float) -> str:
    """Write a duration with three digits in the unit that suits it: `12.3 ms`, `4.56 s`, `3 min 20 s`."""
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_age(seconds: float) -> str:
    """Write how long ago something was: `just now`, `3 min 20 s ago`, `12 days ago`."""
    if seconds < 1:
        return "just now"
    return f"{format_seconds(seconds) if seconds < 2 * 86400 else f'{seconds / 86400:.0f} days'} ago"


_WORDS = (("trillion", 1e12), ("billion", 1e9), ("million", 1e6))


def format_number(value: float) -> str:
    """Write a number with three digits and no exponent, large ones with a word: `0.0035`, `1,360`, `45.7 million`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    value = float(f"{value:.3g}")  # rounded first: 999,999 is 1 million
    for word, factor in _WORDS:
        if abs(value) >= factor:
            return f"{value / factor:,.3g} {word}" if abs(value) < 1000 * factor else f"{value / factor:,.0f} {word}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_count(number: float) -> str:
    """Write how many there are of something: `9,314`; from a million on as `format_number` does."""
    return f"{number:,.0f}" if number < 999_999.5 else format_number(number)


def format_range(low: str, high: str) -> str:
    """Write two ends, with their unit once where it is the same: `39.5 - 58.8 ms`."""
    (number, _, unit), (_, _, other) = low.partition(" "), high.partition(" ")
    return f"{number if unit == other else low} - {high}"


def size_option(size_bytes: float) -> str:
    """Write bytes as an option's value that is no smaller: `3215MB`."""
    return f"{math.ceil(size_bytes / 1e6)}MB"
