"""Sizes and rates mean what people mean, exactly, and what is printed can be read back."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.errors import InvalidRequestError
from headrace.units import format_bytes, format_rate, format_seconds, parse_rate, parse_size

FACTORS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "PB": 10**15,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "PiB": 2**50,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
    "P": 2**50,
}


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("800MB", 800_000_000),
        ("2GiB", 2 << 30),
        ("2G", 2 << 30),
        ("1.5 GiB", 3 << 29),
        (" 4096 ", 4096),
        (".5kb", 500),
        ("3.gb", 3_000_000_000),
        ("0.3GB", 300_000_000),
        ("4.35GB", 4_350_000_000),
        ("1.9B", 1),
        ("1048576", 1 << 20),
        ("9007199254740993", 9007199254740993),  # beyond the whole numbers that a float holds
        ("1024PiB", 1 << 60),
    ],
)
def test_sizes_as_people_write_them(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@given(
    whole=st.integers(0, 10**6),
    decimals=st.text("0123456789", max_size=6),
    unit=st.sampled_from(sorted(FACTORS)),
    spelling=st.sampled_from([str, str.upper, str.lower]),
    gap=st.sampled_from(["", " "]),
)
def test_sizes_are_exact(whole: int, decimals: str, unit: str, spelling: type[str], gap: str) -> None:
    exact = Fraction(f"{whole}.{decimals or 0}") * FACTORS[unit]
    text = f"{whole}{'.' if decimals else ''}{decimals}{gap}{spelling(unit)}"
    if 1 <= exact <= 2**60:
        assert parse_size(text) == math.floor(exact)
    else:
        with pytest.raises(InvalidRequestError):
            parse_size(text)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not a size"),
        ("GB", "not a size"),
        ("-1GB", "not a size"),
        ("1e9", "not a size"),
        ("1.5e9", "not a size"),
        ("1,5GB", "not a size"),
        ("1.2.3GB", "not a size"),
        ("\u0661GB", "not a size"),
        ("nan", "not a size"),
        ("inf", "not a size"),
        ("1GB!", "not a size"),
        ("12", "no unit"),
        ("4095", "no unit"),
        ("12.5", "no unit"),
        ("1XB", "unknown unit"),
        ("1Gbit", "unknown unit"),
        ("1EiB", "unknown unit"),
        ("0GB", "not a usable size"),
        ("0.1B", "not a usable size"),
        ("1025PiB", "not a usable size"),
        ("9" * 40 + "PB", "not a usable size"),
        ("9" * 5000 + "PB", "not a size"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        size_bytes = parse_size(text)
    except InvalidRequestError:
        return
    assert 1 <= size_bytes <= 2**60


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("500MB/s", 5e8),
        ("500MB", 5e8),
        ("500MBps", 5e8),
        ("1GiB/s", float(1 << 30)),
        (" 2GB/s ", 2e9),
        ("8192", 8192.0),
    ],
)
def test_rates(text: str, bytes_per_s: float) -> None:
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize("text", ["500Mbps", "1Gbps", "500ps", "MB/s", "0MB/s", "5MB/h"])
def test_rates_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_rate(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (12, "12 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (640_000_000, "640 MB"),
        (1_234_000_000, "1.23 GB"),
        (12_340_000_000, "12.3 GB"),
        (999_499, "999 KB"),
        (999_500, "1.00 MB"),
        (999_999_999, "1.00 GB"),
        (9_996_000, "10.0 MB"),
        (-5_000_000, "-5.00 MB"),
        (12_345 * 10**15, "12300 PB"),
    ],
)
def test_bytes_are_written_with_three_digits(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text
    assert format_rate(size_bytes) == text + "/s"


@given(st.integers(1000, 2**59))
@example(999_999)
@example(999_500_000)
def test_written_bytes_can_be_read_back(size_bytes: int) -> None:
    text = format_bytes(size_bytes)
    assert re.fullmatch(r"(\d\.\d\d|\d\d\.\d|\d\d\d) [KMGTP]B", text), text
    assert parse_size(text) == pytest.approx(size_bytes, rel=0.005)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 us"),
        (5e-5, "50 us"),
        (0.0123, "12.3 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1 s"),
        (0.0009994, "999 us"),
        (0.0009996, "1 ms"),
        (4.56, "4.56 s"),
        (119.4, "119 s"),
        (200, "3 min 20 s"),
        (7199.7, "2 h 0 min"),
        (90_000, "25 h 0 min"),
        (-0.0123, "-12.3 ms"),
    ],
)
def test_seconds_in_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.floats(0, 1e9))
def test_seconds_are_never_written_with_an_exponent(seconds: float) -> None:
    assert re.fullmatch(r"[0-9.]+ (us|ms|s)|\d+ (min \d+ s|h \d+ min)", format_seconds(seconds))
