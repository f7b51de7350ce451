"""The output of a batch job survives kills, full disks and power cuts, and belongs to one job."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from headrace.errors import InvalidRequestError
from headrace.inference.batching.output_file import OutputError, OutputFile, line_id

IDS = {name: line_id(name, "digest", "job") for name in "abcd"}


def line(name: str) -> dict[str, str]:
    return {"id": IDS[name], "custom_id": name, "text": "ä" * 20}


def written(path: Path, names: str) -> bytes:
    output = OutputFile(path, IDS)
    for name in names:
        output.write(line(name))
    output.close()
    return path.read_bytes()


def test_second_start_knows_what_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    written(path, "ab")
    output = OutputFile(path, IDS)
    assert output.answered == {"a", "b"}
    assert output.repaired_bytes == 0
    output.write(line("c"))
    output.close()
    assert [json.loads(row)["custom_id"] for row in path.read_text().splitlines()] == ["a", "b", "c"]


def test_torn_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    whole = written(path, "ab")
    first = whole.index(b"\n") + 1
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        output = OutputFile(path, IDS)
        complete = whole[:length].count(b"\n")
        assert output.answered == set("ab"[:complete])
        output.close()
        assert path.read_bytes() == whole[: (0, first, len(whole))[complete]]


def test_zeros_after_a_power_cut_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    whole = written(path, "ab")
    for tail in (b"\0" * 100, b'{"id": "bat' + b"\0" * 50 + b"\n"):
        path.write_bytes(whole + tail)
        output = OutputFile(path, IDS)
        assert output.answered == {"a", "b"}
        assert output.repaired_bytes == len(tail)
        output.close()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"my notes\nmore\n", "no answer of a batch job"),
        (b"my notes", "no output of a batch job"),
        (b'{"custom_id": "a"}\n{"x": 1}\n', "line 1"),
        (json.dumps({"id": "x", "custom_id": "zz"}).encode() + b"\n", "another job"),
        (json.dumps({"id": "x", "custom_id": "a"}).encode() + b"\n", "has changed since"),
        ((json.dumps(line("a")) + "\n").encode() * 2, "second time"),
        ((json.dumps(line("a")) + "\n").encode() + b"junk\n", "line 2"),
    ],
)
def test_files_of_others_are_refused_and_left_alone(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=words):
        OutputFile(path, IDS)
    assert path.read_bytes() == content


def test_two_processes_do_not_share_an_output(tmp_path: Path) -> None:
    output = OutputFile(tmp_path / "out.jsonl", IDS)
    with pytest.raises(InvalidRequestError, match="another process"):
        OutputFile(tmp_path / "out.jsonl", IDS)
    output.close()
    OutputFile(tmp_path / "out.jsonl", IDS).close()


def test_full_disk_keeps_whole_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    output = OutputFile(path, IDS)
    output.write(line("a"))
    before = path.read_bytes()
    real = os.write
    room = [10]

    def write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        count = real(descriptor, data[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr("headrace.inference.batching.output_file.os.write", write)
    with pytest.raises(OutputError, match="No space left"):
        output.write(line("b"))
    monkeypatch.undo()
    output.close()
    assert path.read_bytes() == before


def test_ids_depend_on_everything() -> None:
    ids = {line_id(*parts) for parts in (("a", "b", "c"), ("x", "b", "c"), ("a", "x", "c"), ("a", "b", "x"))}
    assert len(ids) == 4


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be opened"):
        OutputFile(tmp_path, IDS)


def test_a_pipe_takes_lines_and_says_when_its_reader_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    output = OutputFile(path, IDS)
    output.write(line("a"))
    output.sync()
    assert json.loads(os.read(reader, 1000)) == line("a")
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        output.write(line("b"))
    output.close()


def test_a_device_that_takes_nothing_is_named() -> None:
    output = OutputFile(Path("/dev/full"), IDS)
    with pytest.raises(OutputError, match="/dev/full cannot be written"):
        output.write(line("a"))
    output.close()
