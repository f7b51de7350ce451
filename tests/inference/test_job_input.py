"""The input of a batch job as a whole: what is no JSONL is refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.errors import InvalidRequestError
from headrace.inference.batching.job_input import Encoder, JobInput
from headrace.inference.batching.request import Defaults


def tokenizer(text: str) -> dict[str, list[int]]:
    return {"input_ids": list(text.encode())}


def read(path: Path, data: bytes) -> JobInput:
    path.write_bytes(data)
    wide: Any = tokenizer
    return JobInput(path, Encoder(wide, context_tokens=100, vocab_size=256), Defaults(), job="job")


@pytest.mark.parametrize(
    "data",
    [
        b'{\n "prompt": "a"\n}',
        b'[{"prompt": "a"}, {"prompt": "b"}]',
        b'[\n{"prompt": "a"},\n{"prompt": "b"}\n]',  # its last object stands in a line of its own
        b"prompt\na\nb\n",
        b"\xef\xbb\xbf\n[1]",
        '{"prompt": "a"}\n'.encode("utf-16"),
    ],
)
def test_other_formats_are_refused_as_a_whole(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"is not JSONL: line [12] "):
        read(tmp_path / "in.jsonl", data)


def test_a_byte_order_mark_changes_nothing(tmp_path: Path) -> None:
    lines = b'{"prompt": "ab"}\n{"prompt": "c"}\n'
    marked, plain = read(tmp_path / "a", b"\xef\xbb\xbf" + lines), read(tmp_path / "b", lines)
    assert marked.ids == plain.ids
    assert [marked.read(entry).prompt for entry in marked.entries] == [[97, 98], [99]]


def test_one_broken_line_among_good_ones_is_that_lines_own(tmp_path: Path) -> None:
    source = read(tmp_path / "in.jsonl", b'{"prompt": \n{"prompt": "c"}\n')
    assert [line.custom_id for line in source.refused] == ["line-1"]
    assert [entry.custom_id for entry in source.entries] == ["line-2"]
