"""The tensor index believes nothing that a header or an index says before it has checked it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.dtypes import STORED_BYTES
from headrace.errors import CheckpointChangedError, CheckpointCorruptError, CheckpointError
from headrace.model.safetensors_index import ShardHeader, TensorEntry, TensorIndex, read_safetensors_header

Header = dict[str, object]
INDEX_NAME = "model.safetensors.index.json"


def tensor(dtype: str, shape: object, begin: object, end: object) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw_file(header: bytes, data: bytes = b"", *, header_bytes: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if header_bytes is None else header_bytes) + header + data


def safetensors(header: object, data_bytes: int) -> bytes:
    return raw_file(json.dumps(header).encode(), bytes(data_bytes))


def two_tensors() -> Header:
    """Describe `a`, 2 x 3 F16 at 0..12, and `b`, 4 U8 at 12..16."""
    return {"a": tensor("F16", [2, 3], 0, 12), "b": tensor("U8", [4], 12, 16)}


def shard_of(*names: str) -> bytes:
    """Return a file with one 4-byte U8 tensor for each name."""
    header = {name: tensor("U8", [4], 4 * i, 4 * i + 4) for i, name in enumerate(names)}
    return safetensors(header, 4 * len(names))


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def read(tmp_path: Path, content: bytes) -> ShardHeader:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    return read_safetensors_header(path)


def assert_corrupt(tmp_path: Path, content: bytes, *words: str) -> None:
    with pytest.raises(CheckpointCorruptError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'file.safetensors'}: ")
    for word in words:
        assert word in message.replace(str(tmp_path), "")  # the path holds the name of the test


def assert_consistent(header: ShardHeader, content: bytes) -> None:
    """Check every property that a reader of these bytes relies on, computed anew."""
    assert header.file.size_bytes == len(content)
    assert len({entry.name for entry in header.entries}) == len(header.entries)
    covered_to: int = 8 + struct.unpack("<Q", content[:8])[0]
    for entry in header.entries:
        assert all(type(length) is int and length >= 0 for length in entry.shape)
        assert entry.size_bytes == math.prod(entry.shape) * STORED_BYTES[entry.dtype]
        assert entry.num_elements == math.prod(entry.shape)
        assert entry.offset == covered_to
        covered_to += entry.size_bytes
    assert covered_to == len(content)


# One file that is as it should be


def test_entries_hold_absolute_offsets_and_sizes(tmp_path: Path) -> None:
    content = safetensors(two_tensors(), 16)
    header = read(tmp_path, content)
    data_start = len(content) - 16
    assert header.entries == (
        TensorEntry("a", "F16", (2, 3), 0, data_start, 12),
        TensorEntry("b", "U8", (4,), 0, data_start + 12, 4),
    )
    assert [entry.num_elements for entry in header.entries] == [6, 4]
    assert_consistent(header, content)


def test_file_identity_is_that_of_the_file_behind_a_link(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(shard_of("a"))
    link = tmp_path / "link.safetensors"
    link.symlink_to(blob)
    file = read_safetensors_header(link, file_index=7).file
    now = blob.stat()
    assert file == (link, now.st_size, now.st_mtime_ns, now.st_ino, now.st_dev)
    assert read_safetensors_header(link, file_index=7).entries[0].file_index == 7


@pytest.mark.parametrize(
    ("dtypes", "element_bytes"),
    [
        ("BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0", 1),
        ("I16 U16 F16 BF16", 2),
        ("I32 U32 F32", 4),
        ("I64 U64 F64", 8),
    ],
)
def test_every_whole_byte_dtype_is_read(tmp_path: Path, dtypes: str, element_bytes: int) -> None:
    for dtype in dtypes.split():
        header = read(tmp_path, safetensors({"x": tensor(dtype, [3], 0, 3 * element_bytes)}, 3 * element_bytes))
        assert header.entries[0].size_bytes == 3 * element_bytes


def test_dtype_table_is_complete_and_read_only() -> None:
    assert len(STORED_BYTES) == 16
    assert isinstance(STORED_BYTES, MappingProxyType)


def test_metadata_padding_scalars_empty_tensors_and_unknown_fields_are_accepted(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "last": tensor("F32", [0, 2**40], 12, 12),
        "scalar": {**tensor("F64", [], 4, 12), "note": "fields to come"},
        "first": tensor("U8", [0], 0, 0),
        "x": tensor("F32", [1, 1], 0, 4),
    }
    content = raw_file(json.dumps(header).encode() + b"   ", bytes(12))
    entries = read(tmp_path, content).entries
    assert [(entry.name, entry.num_elements) for entry in entries] == [
        ("first", 0),
        ("x", 1),
        ("scalar", 1),
        ("last", 0),
    ]
    assert_consistent(read(tmp_path, content), content)


def test_file_without_tensors_is_valid_by_itself(tmp_path: Path) -> None:
    assert read(tmp_path, safetensors({}, 0)).entries == ()


# One file that lies


@pytest.mark.parametrize("missing_bytes", [1, 15, 16])
def test_truncated_data_says_how_much_is_missing(tmp_path: Path, missing_bytes: int) -> None:
    content = safetensors(two_tensors(), 16)[:-missing_bytes]
    assert_corrupt(tmp_path, content, f"{missing_bytes} bytes are missing", "truncated", "repeat the download")


def test_truncated_header_says_how_much_is_missing_at_least(tmp_path: Path) -> None:
    content = safetensors(two_tensors(), 16)[:-26]
    assert_corrupt(tmp_path, content, "truncated, at least 10 bytes are missing", "repeat the download")


@pytest.mark.parametrize("size_bytes", [0, 1, 7])
def test_file_shorter_than_the_length_field(tmp_path: Path, size_bytes: int) -> None:
    assert_corrupt(tmp_path, bytes(size_bytes), f"{size_bytes} bytes in all", "repeat the download")


def test_trailing_bytes(tmp_path: Path) -> None:
    assert_corrupt(tmp_path, safetensors(two_tensors(), 16) + b"???", "3 trailing bytes")
    assert_corrupt(tmp_path, safetensors({}, 5), "5 trailing bytes")


@pytest.mark.parametrize("header_bytes", [100_000_001, 2**63, 2**64 - 1])
def test_header_length_above_the_limit(tmp_path: Path, header_bytes: int) -> None:
    assert_corrupt(tmp_path, raw_file(b"{}", header_bytes=header_bytes), "not a safetensors file", str(header_bytes))


def test_header_length_above_the_limit_in_a_file_that_large(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(raw_file(b"{}", header_bytes=100_000_001))
    os.truncate(path, 100_000_100)  # sparse
    with pytest.raises(CheckpointCorruptError, match="100000000 at most"):
        read_safetensors_header(path)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    assert_corrupt(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull")
    assert_corrupt(tmp_path, b"version ", "not a safetensors file")


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"", "JSON"),
        (b"nonsense", "JSON"),
        (b'{"a": ', "JSON"),
        (b"{}{}", "JSON"),
        (b"\xff\xfe{}", "UTF-8"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b'{"__metadata__": {"a": "\xff"}}', "UTF-8"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b'"text"', "not an object"),
        (b"[" * 100_000, "JSON"),
        (b'{"a":' * 100_000, "JSON"),
        (b"1" * 5000, "JSON"),
        (b'{"a": {"dtype": "U8", "shape": [], "data_offsets": [0, 1], "note": NaN}}', "NaN"),
        (b'{"a": {"dtype": "U8", "shape": [], "data_offsets": [0, 1], "note": -Infinity}}', "-Infinity"),
        (b'{"\\ud800": {}}', "surrogates"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' occurs twice"),
        (b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [], "data_offsets": [0, 1]}}', "'dtype' occurs twice"),
    ],
)
def test_header_that_is_not_one_json_object(tmp_path: Path, header: bytes, word: str) -> None:
    assert_corrupt(tmp_path, raw_file(header, b"?"), word)


@pytest.mark.parametrize("metadata", [None, [], "pt", 1, {"format": 1}, {"format": None}, {"a": {"b": "c"}}])
def test_metadata_that_is_not_a_map_of_strings(tmp_path: Path, metadata: object) -> None:
    assert_corrupt(tmp_path, safetensors({"__metadata__": metadata}, 0), "__metadata__")


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (None, "object"),
        ([], "object"),
        ({}, "dtype"),
        ({"dtype": "U8", "shape": [4]}, "data_offsets"),
        ({"dtype": "U8", "data_offsets": [0, 4]}, "shape"),
        (tensor("F128", [4], 0, 4), "unknown dtype 'F128'"),
        (tensor("u8", [4], 0, 4), "unknown dtype"),
        ({**tensor("U8", [4], 0, 4), "dtype": 8}, "unknown dtype"),
        ({**tensor("U8", [4], 0, 4), "dtype": ["U8"]}, "unknown dtype"),
        ({**tensor("U8", [4], 0, 4), "dtype": {}}, "unknown dtype"),
        (tensor("U8", 4, 0, 4), "shape"),
        (tensor("U8", "4", 0, 4), "shape"),
        (tensor("U8", [4.0], 0, 4), "shape"),
        (tensor("U8", [-2, -2], 0, 4), "shape"),
        (tensor("U8", [4, True], 0, 4), "shape"),
        (tensor("U8", [4, None], 0, 4), "shape"),
        (tensor("U8", [0, 2**63], 0, 4), "shape"),
        (tensor("U8", [10**4000], 0, 4), "shape"),
        (tensor("F64", [2**62, 4], 0, 4), "4 bytes, which is not F64"),
        (tensor("U8", [2**32] * 1000, 0, 4), "4 bytes, which is not U8"),
        (tensor("U8", [0], 0, 4), "4 bytes, which is not U8"),
        (tensor("U8", [5], 0, 4), "4 bytes, which is not U8"),
        (tensor("I16", [4], 0, 4), "4 bytes, which is not I16"),
        (tensor("U8", [], 0, 4), "4 bytes, which is not U8"),
        ({**tensor("U8", [4], 0, 4), "data_offsets": [4]}, "data_offsets"),
        ({**tensor("U8", [4], 0, 4), "data_offsets": [0, 4, 8]}, "data_offsets"),
        ({**tensor("U8", [4], 0, 4), "data_offsets": "04"}, "data_offsets"),
        (tensor("U8", [4], 4, 0), "data_offsets"),
        (tensor("U8", [4], -4, 0), "data_offsets"),
        (tensor("U8", [4], 0.0, 4.0), "data_offsets"),
        (tensor("U8", [1], False, True), "data_offsets"),
        (tensor("U8", [4], 10**4000, 10**4000 + 4), "data_offsets"),
    ],
)
def test_tensor_that_contradicts_itself(tmp_path: Path, raw: object, word: str) -> None:
    assert_corrupt(tmp_path, safetensors({"weird\nname": raw}, 4), word, r"tensor 'weird\nname'")


@pytest.mark.parametrize(
    ("header", "data_bytes", "word"),
    [
        ({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [4], 3, 7)}, 7, "'b' overlaps tensor 'a'"),
        ({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [4], 0, 4)}, 4, "overlaps"),
        ({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [0], 2, 2)}, 4, "'b' overlaps tensor 'a'"),
        ({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [4], 6, 10)}, 10, "'b' leaves 2 bytes unused after"),
        ({"a": tensor("U8", [4], 1, 5)}, 5, "'a' leaves 1 bytes unused after the header"),
        ({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [0], 5, 5)}, 5, "'b' leaves 1 bytes"),
    ],
)
def test_tensors_that_overlap_or_leave_holes(tmp_path: Path, header: Header, data_bytes: int, word: str) -> None:
    assert_corrupt(tmp_path, safetensors(header, data_bytes), word)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "C64"])
def test_valid_dtype_that_is_not_read_is_no_corruption(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(CheckpointError, match=f"dtype {dtype}, .*headrace reads BOOL") as caught:
        read(tmp_path, safetensors({"x": tensor(dtype, [8], 0, 8)}, 8))
    assert not isinstance(caught.value, CheckpointCorruptError)
    assert ("smaller than a byte" in str(caught.value)) == dtype.startswith(("F4", "F6"))


@pytest.mark.timeout(20)  # without a bound on the product, minutes
def test_shape_with_a_million_huge_lengths_is_refused_at_once(tmp_path: Path) -> None:
    assert_corrupt(tmp_path, safetensors({"a": tensor("U8", [2**62] * 1_000_000, 0, 4)}, 4), "4 bytes, which is not U8")


def test_messages_stay_short_whatever_the_file_holds(tmp_path: Path) -> None:
    for raw in (tensor("x" * 10**6, [1], 0, 1), tensor("U8", [10**1000] * 1000, 0, 1), "y" * 10**6):
        with pytest.raises(CheckpointCorruptError) as caught:
            read(tmp_path, safetensors({"n" * 10**6: raw}, 1))
        assert len(str(caught.value)) < 1000 + len(str(tmp_path))


# Files that cannot be read at all


def assert_unreadable(path: Path, word: str) -> None:
    with pytest.raises(CheckpointError, match=word) as caught:
        read_safetensors_header(path)
    assert not isinstance(caught.value, CheckpointCorruptError)
    assert str(path) in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    assert_unreadable(tmp_path / "directory", "Is a directory")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert_unreadable(tmp_path / "loop", "cannot be read")
    assert_unreadable(Path("/dev/zero"), "not a regular file")


@pytest.mark.timeout(10)
def test_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert_unreadable(tmp_path / "fifo", "not a regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path: Path) -> None:
    path = tmp_path / "secret.safetensors"
    path.write_bytes(shard_of("a"))
    path.chmod(0)
    assert_unreadable(path, "Permission denied")


def test_missing_file_and_broken_link(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "no_such_blob")
    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors: is missing, or a link"):
        TensorIndex.from_directory(tmp_path)


# Directories


def test_single_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors(two_tensors(), 16))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not looked at")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    index = TensorIndex.from_directory(tmp_path)
    assert index.directory == tmp_path
    assert [file.path.name for file in index.files] == ["model.safetensors"]
    assert list(index.entries) == ["a", "b"]
    assert index.total_bytes == 16


def test_index_is_frozen(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(shard_of("a"))
    index = TensorIndex.from_directory(tmp_path)
    assert isinstance(index.entries, MappingProxyType)
    with pytest.raises(dataclasses.FrozenInstanceError):
        index.files = ()  # type: ignore[misc]


def test_only_file_may_have_any_name_and_hidden_files_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(shard_of("a"))
    (tmp_path / "._weights.safetensors").write_bytes(b"left by macOS")
    assert list(TensorIndex.from_directory(tmp_path).entries) == ["a"]


def test_shards_without_an_index_are_merged(tmp_path: Path) -> None:
    (tmp_path / "two.safetensors").write_bytes(shard_of("c"))
    (tmp_path / "one.safetensors").write_bytes(shard_of("b", "a"))
    index = TensorIndex.from_directory(tmp_path)
    assert [file.path.name for file in index.files] == ["one.safetensors", "two.safetensors"]
    assert {name: entry.file_index for name, entry in index.entries.items()} == {"b": 0, "a": 0, "c": 1}


def test_the_same_name_twice_without_an_index(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(shard_of("a", "b"))
    (tmp_path / "two.safetensors").write_bytes(shard_of("b"))
    with pytest.raises(CheckpointError, match=r"'b' is in one\.safetensors and in two\.safetensors"):
        TensorIndex.from_directory(tmp_path)


def test_sharded_checkpoint_behind_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "0").write_bytes(shard_of("a"))
    (blobs / "1").write_bytes(shard_of("b", "c"))
    for i in range(2):
        (snapshot / f"model-{i}.safetensors").symlink_to(Path("../../blobs") / str(i))
    write_index(blobs, {"a": "model-0.safetensors", "b": "model-1.safetensors", "c": "model-1.safetensors"})
    (snapshot / INDEX_NAME).symlink_to(blobs / INDEX_NAME)
    index = TensorIndex.from_directory(snapshot)
    assert {name: entry.file_index for name, entry in index.entries.items()} == {"a": 0, "b": 1, "c": 1}
    assert index.files[1].path == snapshot / "model-1.safetensors"
    assert index.files[1].inode == (blobs / "1").stat().st_ino
    assert index.total_bytes == 12
    index.check_unchanged()


def test_the_index_decides_where_a_tensor_is_and_which_count(tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"not named by the index")
    (tmp_path / "x.safetensors").write_bytes(shard_of("a", "b", "extra"))
    (tmp_path / "y.safetensors").write_bytes(shard_of("a", "b"))
    write_index(tmp_path, {"a": "y.safetensors", "b": "x.safetensors"})
    index = TensorIndex.from_directory(tmp_path)
    assert [file.path.name for file in index.files] == ["x.safetensors", "y.safetensors"]
    assert {name: entry.file_index for name, entry in index.entries.items()} == {"b": 0, "a": 1}
    assert index.total_bytes == 8


def test_a_single_file_counts_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(shard_of("a"))
    write_index(tmp_path, {"a": "elsewhere.safetensors"})
    assert list(TensorIndex.from_directory(tmp_path).entries) == ["a"]


def test_missing_shards_are_named_and_counted(tmp_path: Path) -> None:
    (tmp_path / "m-1.safetensors").write_bytes(shard_of("a"))
    (tmp_path / "m-3.safetensors").symlink_to(tmp_path / "no_such_blob")
    write_index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-3.safetensors"})
    message = r"2 of the 3 files .* are missing: 'm-2\.safetensors', 'm-3\.safetensors'; repeat the download"
    with pytest.raises(CheckpointCorruptError, match=message):
        TensorIndex.from_directory(tmp_path)


def test_many_missing_shards_make_a_short_message(tmp_path: Path) -> None:
    write_index(tmp_path, {f"t{i}": f"m-{i:03}.safetensors" for i in range(200)})
    with pytest.raises(CheckpointCorruptError, match=r"200 of the 200 .*'m-004\.safetensors' and 195 more;"):
        TensorIndex.from_directory(tmp_path)


def test_tensor_that_the_index_names_and_its_shard_lacks(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(shard_of("a"))
    (tmp_path / "y.safetensors").write_bytes(shard_of("b"))
    write_index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"})
    with pytest.raises(CheckpointCorruptError, match=r"x\.safetensors: .* places 'b' .*2 such tensors"):
        TensorIndex.from_directory(tmp_path)


def test_corrupt_shard_of_an_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(shard_of("a")[:-1])
    write_index(tmp_path, {"a": "x.safetensors"})
    with pytest.raises(CheckpointCorruptError, match=r"x\.safetensors: truncated, 1 bytes are missing"):
        TensorIndex.from_directory(tmp_path)


@pytest.mark.parametrize(
    "file_name",
    [
        "",
        ".",
        "..",
        "../x.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "a\\b",
        "x\0",
        "x\n",
        "\ud800",
        1,
        None,
        [],
    ],
)
def test_index_that_points_elsewhere(tmp_path: Path, file_name: object) -> None:
    write_index(tmp_path, {"a": file_name})
    with pytest.raises(CheckpointCorruptError, match=r"index\.json: tensor 'a' .* not a plain file name"):
        TensorIndex.from_directory(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        "[" * 10**5,
    ],
)
def test_index_that_is_malformed(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(CheckpointCorruptError, match=r"index\.json"):
        TensorIndex.from_directory(tmp_path)


def test_index_that_is_too_large(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).touch()
    os.truncate(tmp_path / INDEX_NAME, 100_000_001)  # sparse
    with pytest.raises(CheckpointCorruptError, match="larger than 100000000 bytes"):
        TensorIndex.from_directory(tmp_path)


def test_shard_name_too_long_for_the_file_system(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "x" * 10**6})
    with pytest.raises(CheckpointError) as caught:
        TensorIndex.from_directory(tmp_path)
    assert len(str(caught.value)) < 1000 + len(str(tmp_path))


def test_checkpoint_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors({"__metadata__": {"format": "pt"}}, 0))
    with pytest.raises(CheckpointCorruptError, match="no tensors"):
        TensorIndex.from_directory(tmp_path)
    write_index(tmp_path, {})
    with pytest.raises(CheckpointCorruptError, match="no tensors"):
        TensorIndex.from_directory(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth", "last.ckpt"]
)
def test_pickle_weights_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"can run code.*use_safetensors=False\)\.save_pretrained") as caught:
        TensorIndex.from_directory(tmp_path)
    assert name in str(caught.value)


def test_gguf_is_refused_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "model.Q4_0.gguf"
    file.write_bytes(b"GGUF")
    for path in (tmp_path, file):
        with pytest.raises(CheckpointError, match=r"not streamed yet.*GgufConfig\(dequantize=True\)") as caught:
            TensorIndex.from_directory(path)
        assert str(file) in str(caught.value)


def test_directory_without_weights_or_no_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(CheckpointError, match=r"no weights here; expected .*model\.safetensors"):
        TensorIndex.from_directory(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        TensorIndex.from_directory(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        TensorIndex.from_directory(tmp_path / "config.json")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="cannot be listed"):
        TensorIndex.from_directory(tmp_path / "loop")


# Files that change afterwards


def rewrite_longer(path: Path) -> None:
    before = path.stat()
    path.write_bytes(path.read_bytes() + b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def touch_later(path: Path) -> None:
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))


def replace_by_twin(path: Path) -> None:
    before = path.stat()
    twin = path.with_name("twin")
    twin.write_bytes(path.read_bytes())
    os.utime(twin, ns=(before.st_atime_ns, before.st_mtime_ns))
    twin.replace(path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (rewrite_longer, "size_bytes was"),
        (touch_later, "mtime_ns was"),
        (replace_by_twin, "inode was"),
        (Path.unlink, "gone"),
    ],
)
def test_changed_file_is_named(tmp_path: Path, change: Callable[[Path], None], word: str) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.safetensors").write_bytes(shard_of(name))
    index = TensorIndex.from_directory(tmp_path)
    index.check_unchanged()
    change(tmp_path / "two.safetensors")
    with pytest.raises(CheckpointChangedError, match=rf"two\.safetensors: .*{word}"):
        index.check_unchanged()


def test_changed_device_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(shard_of("a"))
    index = TensorIndex.from_directory(tmp_path)
    elsewhere = index.files[0]._replace(device=index.files[0].device + 1)
    with pytest.raises(CheckpointChangedError, match="device was"):
        dataclasses.replace(index, files=(elsewhere,)).check_unchanged()


# Fuzzing: whatever lies there, consistent entries or a CheckpointError


@pytest.fixture(scope="module")
def fuzzed_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory) / "model.safetensors"


def assert_consistent_or_refused(path: Path, content: bytes) -> bool:
    """Whether the file was accepted; both readers must agree about that."""
    path.write_bytes(content)
    try:
        header = read_safetensors_header(path)
    except CheckpointError:
        with pytest.raises(CheckpointError):
            TensorIndex.from_directory(path.parent)
        return False
    assert_consistent(header, content)
    if header.entries:
        assert tuple(TensorIndex.from_directory(path.parent).entries.values()) == header.entries
    return True


@st.composite
def valid_headers(draw: st.DrawFn) -> tuple[Header, int]:
    """Draw a header whose tensors cover the data in any order of names, and the number of data bytes."""
    names = draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=5, unique=True))
    header: Header = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    position = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(STORED_BYTES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        end = position + math.prod(shape) * STORED_BYTES[dtype]
        header[name] = tensor(dtype, shape, position, end)
        position = end
    return dict(draw(st.permutations(list(header.items())))), position


@given(st.binary(max_size=200))
@example(raw_file(b"{}"))
def test_random_bytes(fuzzed_file: Path, content: bytes) -> None:
    assert_consistent_or_refused(fuzzed_file, content)


@given(st.binary(max_size=200), st.binary(max_size=8))
def test_random_header_of_the_right_length(fuzzed_file: Path, header: bytes, data: bytes) -> None:
    assert_consistent_or_refused(fuzzed_file, raw_file(header, data))


@given(valid_headers())
def test_valid_files_are_accepted(fuzzed_file: Path, valid: tuple[Header, int]) -> None:
    assert assert_consistent_or_refused(fuzzed_file, safetensors(*valid))


@given(valid_headers(), st.data())
def test_flipped_inserted_and_deleted_bytes(fuzzed_file: Path, valid: tuple[Header, int], data: st.DataObject) -> None:
    content = bytearray(safetensors(*valid))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        replacement = data.draw(st.one_of(st.binary(max_size=2), st.sampled_from([b"0", b"9", b",", b'"', b"{", b"]"])))
        content[place : place + data.draw(st.integers(0, 1))] = replacement
    assert_consistent_or_refused(fuzzed_file, bytes(content))


@given(valid_headers(), st.integers(-20, 20).filter(bool))
def test_wrong_length_of_the_file_is_never_accepted(fuzzed_file: Path, valid: tuple[Header, int], by: int) -> None:
    content = safetensors(*valid)
    assert not assert_consistent_or_refused(fuzzed_file, content + bytes(by) if by > 0 else content[:by])


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-4, 40),
        st.integers(2**61, 2**66),
        st.integers(10**4200, 10**4210),
        st.floats(),
        st.text(max_size=4),
        st.sampled_from([*STORED_BYTES, "F4", "C64"]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(valid_headers(), st.data())
def test_replaced_fields(fuzzed_file: Path, valid: tuple[Header, int], data: st.DataObject) -> None:
    header, data_bytes = valid
    name = data.draw(st.sampled_from(sorted(header)))
    original = header[name]
    fields: Header = {**original} if isinstance(original, dict) else {}
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    sizes = st.lists(st.integers(-1, 40), max_size=3)
    fields[field] = data.draw(st.one_of(JSON, sizes, st.sampled_from(sorted(STORED_BYTES))))
    header[name] = data.draw(st.one_of(st.just(fields), st.just(fields), JSON))
    assert_consistent_or_refused(fuzzed_file, safetensors(header, data_bytes))


@given(JSON)
def test_replaced_weight_map(fuzzed_file: Path, weight_map: object) -> None:
    fuzzed_file.unlink(missing_ok=True)
    (fuzzed_file.parent / "shard.safetensors").write_bytes(shard_of("a"))
    write_index(fuzzed_file.parent, weight_map)
    try:
        with pytest.raises(CheckpointError):
            TensorIndex.from_directory(fuzzed_file.parent)
    finally:
        (fuzzed_file.parent / INDEX_NAME).unlink()
        (fuzzed_file.parent / "shard.safetensors").unlink()
