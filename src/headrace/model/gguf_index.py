"""The header of a GGUF file: metadata and the exact size and place of every tensor; versions 2 and 3.

Written from the format's specification. Whatever a header says is checked against the file's length before anything is
believed, so that a truncated or lying file gives an error and no absurd allocation.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from headrace.errors import CheckpointCorruptError, CheckpointError

_MAGIC = b"GGUF"
_MOST_TENSORS, _MOST_PAIRS, _MOST_ARRAY, _MOST_TEXT, _MOST_DIMENSIONS = 1_000_000, 1_000_000, 50_000_000, 1 << 26, 8

BLOCKS: dict[int, tuple[str, int, int]] = {
    # type number (`ggml_type` of llama.cpp): name, weights per block, bytes per block
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    9: ("q8_1", 32, 40),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1),
    25: ("i16", 1, 2),
    26: ("i32", 1, 4),
    27: ("i64", 1, 8),
    28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    **dict.fromkeys((31, 32, 33), ("q4_0", 32, 18)),  # rows interleaved for ARM; no longer written
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    **dict.fromkeys((36, 37, 38), ("iq4_nl", 32, 18)),  # likewise
    39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
    41: ("q1_0", 128, 18),
    42: ("q2_0", 64, 18),
}
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor: dimensions as the file lists them (the row's length first), bytes, and where they begin."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    size_bytes: int
    offset: int

    @property
    def num_elements(self) -> int:
        """Weights in it."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class GgufIndex:
    """What one model's GGUF files hold."""

    path: Path
    metadata: Mapping[str, Any]
    """arrays of more than a few entries are given by their length alone, as {"length": n}"""
    tensors: tuple[GgufTensor, ...]

    @classmethod
    def from_file(cls, path: Path) -> GgufIndex:
        """Read a file, or all parts of one whose name ends in -00001-of-0000N.gguf.

        Raises CheckpointError where a part is missing, CheckpointCorruptError where a header lies.
        """
        parts = _parts(path)
        metadata: dict[str, Any] = {}
        tensors: list[GgufTensor] = []
        for part in parts:
            found, entries = _read(part)
            metadata = metadata or found
            tensors += entries
        names = [tensor.name for tensor in tensors]
        if len(set(names)) != len(names):
            raise CheckpointCorruptError(f"{path}: a tensor is listed twice")
        if not tensors:
            raise CheckpointCorruptError(f"{path} holds no tensors")
        return cls(path=path, metadata=metadata, tensors=tuple(tensors))


def _parts(path: Path) -> list[Path]:
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(f"{path} is one of {count} parts, of which {len(missing)} are missing: {missing[0]}, ...")
    return parts


class _Reader:
    """Reads little-endian values; whatever goes beyond the file's end raises CheckpointCorruptError."""

    def __init__(self, file: BinaryIO, path: Path, length: int) -> None:
        self.file, self.path, self.length = file, path, length

    def take(self, count: int, what: str) -> bytes:
        data = self.file.read(count) if count <= self.length - self.file.tell() else b""
        if len(data) != count:
            raise CheckpointCorruptError(f"{self.path} ends within {what}")
        return data

    def scalar(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def count(self, most: int, what: str) -> int:
        number = int(self.scalar("<Q", what))
        if number > most:
            raise CheckpointCorruptError(f"{self.path}: {what} is {number}; at most {most} make sense")
        return number

    def text(self, what: str) -> str:
        size = self.count(_MOST_TEXT, f"the length of {what}")
        try:
            return self.take(size, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointCorruptError(f"{self.path}: {what} is no UTF-8 text: {error}") from error

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _TEXT:
            return self.text(what)
        if kind != _ARRAY or depth > 2:
            raise CheckpointCorruptError(f"{self.path}: {what} has the unknown type {kind}")
        inner = int(self.scalar("<I", what))
        length = self.count(_MOST_ARRAY, f"the length of {what}")
        if inner in _SCALARS:
            size = struct.calcsize(_SCALARS[inner])
            data = self.take(size * length, what)
            if length > 4096:
                return {"length": length}
            return [struct.unpack_from(_SCALARS[inner], data, size * index)[0] for index in range(length)]
        items = [self.value(inner, what, depth + 1) for _ in range(length)]
        return items if length <= 64 else {"length": length}


def _read(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            return _parse(_Reader(file, path, length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _parse(reader: _Reader) -> tuple[dict[str, Any], list[GgufTensor]]:
    path = reader.path
    if reader.take(4, "its first four bytes") != _MAGIC:
        raise CheckpointCorruptError(f"{path} is no GGUF file: it does not begin with GGUF")
    version = int(reader.scalar("<I", "its version"))
    if version not in {2, 3}:
        raise CheckpointCorruptError(f"{path} is GGUF version {version}; headrace reads 2 and 3, little-endian")
    num_tensors = reader.count(_MOST_TENSORS, "the number of tensors")
    num_pairs = reader.count(_MOST_PAIRS, "the number of metadata entries")
    metadata: dict[str, Any] = {}
    for number in range(num_pairs):
        key = reader.text(f"the name of metadata entry {number}")
        metadata[key] = reader.value(int(reader.scalar("<I", f"the type of {key}")), f"metadata {key}")
    found = [_tensor_info(reader, number) for number in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise CheckpointCorruptError(f"{path}: general.alignment is {alignment!r}; a power of two is expected")
    begin = -(-reader.file.tell() // alignment) * alignment
    tensors = []
    for name, shape, kind, offset in found:
        if kind not in BLOCKS:
            raise CheckpointCorruptError(f"{path}: {name} has the unknown type {kind}")
        type_name, per_block, block_bytes = BLOCKS[kind]
        if shape[0] % per_block:
            raise CheckpointCorruptError(f"{path}: rows of {shape[0]} in {name} are no whole blocks of {type_name}")
        size_bytes = math.prod(shape) // per_block * block_bytes
        if begin + offset + size_bytes > reader.length:
            raise CheckpointCorruptError(
                f"{path}: {name} would end at byte {begin + offset + size_bytes}, but the file has {reader.length}"
            )
        tensors.append(
            GgufTensor(name=name, shape=shape, type_name=type_name, size_bytes=size_bytes, offset=begin + offset)
        )
    _refuse_overlaps(path, tensors)
    return metadata, tensors


def _tensor_info(reader: _Reader, number: int) -> tuple[str, tuple[int, ...], int, int]:
    name = reader.text(f"the name of tensor {number}")
    dimensions = int(reader.scalar("<I", f"the dimensions of {name}"))
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise CheckpointCorruptError(f"{reader.path}: {name} has {dimensions} dimensions")
    shape = tuple(int(reader.scalar("<Q", f"the shape of {name}")) for _ in range(dimensions))
    if any(size < 1 for size in shape) or math.prod(shape) > 2**50:
        raise CheckpointCorruptError(f"{reader.path}: {name} has the shape {shape}")
    return name, shape, int(reader.scalar("<I", f"the type of {name}")), int(reader.scalar("<Q", f"offset of {name}"))


def _refuse_overlaps(path: Path, tensors: list[GgufTensor]) -> None:
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.size_bytes > after.offset:
            raise CheckpointCorruptError(f"{path}: {before.name} and {after.name} overlap")
