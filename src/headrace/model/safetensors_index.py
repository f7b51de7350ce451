"""Where every tensor of a checkpoint lies on disk: file, byte offset, size, dtype and shape.

Only headers are read: eight bytes, then at most 100 MB of JSON per safetensors file. Nothing in them is believed before
it is checked, so an index never points outside a file, at overlapping tensors or at bytes of the wrong length.
The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple, NoReturn, TypeGuard

from headrace.dtypes import STORED_BYTES
from headrace.errors import CheckpointChangedError, CheckpointCorruptError, CheckpointError

_REFUSED_DTYPES: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("F4", "F6_E2M3", "F6_E3M2"), "whose elements are smaller than a byte")
    | dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"), "which is valid but not supported")
)

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_PICKLE_PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_LARGEST_JSON_BYTES = 100_000_000
_LARGEST_INT = 2**63 - 1
_LFS_START = b"version https://git-lfs"

_SHORT = reprlib.Repr()  # names and values in messages come from the file: they may be megabytes long
_SHORT.maxstring = 160


class TensorEntry(NamedTuple):
    """One tensor on disk: bytes `offset` to `offset + size_bytes` of file `file_index`, row-major, little-endian.

    `dtype` is a key of STORED_BYTES; `offset` counts from the start of the file and need not be aligned.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file_index: int
    offset: int
    size_bytes: int

    @property
    def num_elements(self) -> int:
        """The product of the shape: 1 for a scalar, 0 for an empty tensor."""
        return self.size_bytes // STORED_BYTES[self.dtype]


class ShardFile(NamedTuple):
    """One safetensors file and its identity when its header was read, with links followed. `mtime_ns` in ns."""

    path: Path
    size_bytes: int
    mtime_ns: int
    inode: int
    device: int


class ShardHeader(NamedTuple):
    """What one safetensors file says about itself; `entries` in order of offset."""

    file: ShardFile
    entries: tuple[TensorEntry, ...]


@dataclass(frozen=True, kw_only=True)
class TensorIndex:
    """All tensors of a checkpoint directory, by name; `entries` in order of file and offset.

    `TensorEntry.file_index` indexes `files`. Nothing is kept open: `check_unchanged` tells whether it all still holds.
    """

    directory: Path
    files: tuple[ShardFile, ...]
    entries: Mapping[str, TensorEntry]

    @property
    def total_bytes(self) -> int:
        """Bytes of all indexed tensors, without headers and without tensors that the index leaves out."""
        return sum(entry.size_bytes for entry in self.entries.values())

    @classmethod
    def from_directory(cls, directory: Path) -> TensorIndex:
        """Read the headers of the safetensors files in `directory`.

        `model.safetensors` alone counts where it is there (as in the transformers library); without it
        `model.safetensors.index.json` decides which files and tensors count; without that all `*.safetensors` do,
        provided that no name occurs twice.

        Raises CheckpointCorruptError for a header or an index that lies and for missing or truncated files;
        CheckpointError for anything else that cannot be used: no such directory, other formats, unreadable files.
        """
        names = _list_names(directory)
        if _INDEX_NAME in names and _SINGLE_NAME not in names:
            return cls._from_weight_map(directory, _read_weight_map(directory / _INDEX_NAME))
        shard_names = [name for name in names if name.endswith(".safetensors")]
        if not shard_names:
            _refuse_without_safetensors(directory, names)
        if _SINGLE_NAME in shard_names:
            shard_names = [_SINGLE_NAME]
        headers = [read_safetensors_header(directory / name, file_index=i) for i, name in enumerate(shard_names)]
        return cls._from_headers(directory, headers)

    @classmethod
    def _from_weight_map(cls, directory: Path, weight_map: Mapping[str, str]) -> TensorIndex:
        shard_names = sorted(set(weight_map.values()))
        missing = [name for name in shard_names if not os.access(directory / name, os.F_OK)]  # follows links
        if missing:
            raise CheckpointCorruptError(
                f"{directory}: {len(missing)} of the {len(shard_names)} files that {_INDEX_NAME} names are missing: "
                f"{_some(missing)}; repeat the download"
            )
        headers = []
        for file_index, shard_name in enumerate(shard_names):
            header = read_safetensors_header(directory / shard_name, file_index=file_index)
            placed_here = tuple(entry for entry in header.entries if weight_map.get(entry.name) == shard_name)
            headers.append(header._replace(entries=placed_here))
        absent = sorted(weight_map.keys() - {entry.name for header in headers for entry in header.entries})
        if absent:
            raise CheckpointCorruptError(
                f"{directory / weight_map[absent[0]]}: {_INDEX_NAME} places {_SHORT.repr(absent[0])} in this file, "
                f"which does not hold it ({len(absent)} such tensors in all); index and files do not belong together"
            )
        return cls._from_headers(directory, headers)

    @classmethod
    def _from_headers(cls, directory: Path, headers: Iterable[ShardHeader]) -> TensorIndex:
        files: list[ShardFile] = []
        entries: dict[str, TensorEntry] = {}
        for header in headers:
            files.append(header.file)
            for entry in header.entries:
                if entry.name in entries:
                    first = files[entries[entry.name].file_index].path.name
                    raise CheckpointError(
                        f"{directory}: {_SHORT.repr(entry.name)} is in {first} and in {header.file.path.name} and no "
                        f"{_INDEX_NAME} says which counts; leave only the files of one checkpoint in the directory"
                    )
                entries[entry.name] = entry
        if not entries:
            raise CheckpointCorruptError(f"{directory}: the checkpoint holds no tensors")
        return cls(directory=directory, files=tuple(files), entries=MappingProxyType(entries))

    def check_unchanged(self) -> None:
        """Compare size, mtime, inode and device of every file with those at the time its header was read.

        Raises CheckpointChangedError naming the first file that differs or cannot be found any more.
        """
        for file in self.files:
            try:
                now = _shard_file(file.path, file.path.stat())
            except OSError as error:
                raise CheckpointChangedError(f"{file.path}: was indexed and is gone ({error.strerror})") from error
            for field, before, after in zip(ShardFile._fields, file, now, strict=True):
                if before != after:
                    raise CheckpointChangedError(
                        f"{file.path}: changed since it was indexed ({field} was {before}, is {after}); start again"
                    )


def read_safetensors_header(path: Path, *, file_index: int = 0) -> ShardHeader:
    """Read and check the header of one safetensors file; `file_index` is copied into the entries.

    The entries cover the bytes after the header completely and without overlap, up to the last byte of the file.

    Raises CheckpointCorruptError for anything that contradicts the format or itself; CheckpointError for a file that
    cannot be read or that holds a dtype which is valid but not in STORED_BYTES.
    """
    with _open_regular(path) as (file, file_stat):
        prefix = file.read(8)
        if prefix == _LFS_START[:8] and (prefix + file.read(len(_LFS_START) - 8)) == _LFS_START:
            raise CheckpointCorruptError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`")
        if len(prefix) < 8:
            raise CheckpointCorruptError(f"{path}: truncated, it has {len(prefix)} bytes in all; repeat the download")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > _LARGEST_JSON_BYTES:
            raise CheckpointCorruptError(
                f"{path}: not a safetensors file, its header would have {header_bytes} bytes "
                f"({_LARGEST_JSON_BYTES} at most)"
            )
        text = file.read(header_bytes)
    shard = _shard_file(path, file_stat)
    if len(text) < header_bytes:
        raise _truncated(shard, 8 + header_bytes, at_least=True)
    tensors = _parse_json_object(path, text)
    metadata = tensors.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointCorruptError(f"{path}: __metadata__ is not a map from strings to strings")
    data_start = 8 + header_bytes
    entries = [_check_tensor(path, name, raw, file_index, data_start) for name, raw in tensors.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.size_bytes))
    _check_coverage(shard, entries, data_start)
    return ShardHeader(file=shard, entries=tuple(entries))


def _check_tensor(path: Path, name: str, raw: object, file_index: int, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {_SHORT.repr(name)}"
    if not isinstance(raw, dict):
        raise CheckpointCorruptError(f"{where} is not described by an object but by {_SHORT.repr(raw)}")
    dtype, shape, offsets = raw.get("dtype"), raw.get("shape"), raw.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in STORED_BYTES:
        _refuse_dtype(where, dtype)
    if not _is_sizes(shape):
        raise CheckpointCorruptError(f"{where} has the shape {_SHORT.repr(shape)}, not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointCorruptError(f"{where} has data_offsets {_SHORT.repr(offsets)}, not [begin, end]")
    begin, end = offsets
    if _tensor_bytes(shape, STORED_BYTES[dtype]) != end - begin:
        raise CheckpointCorruptError(
            f"{where} has {end - begin} bytes, which is not {dtype} of shape {_SHORT.repr(shape)}"
        )
    return TensorEntry(name, dtype, tuple(shape), file_index, data_start + begin, end - begin)


def _refuse_dtype(where: str, dtype: object) -> NoReturn:
    readable = f"headrace reads {', '.join(STORED_BYTES)}"
    if isinstance(dtype, str) and dtype in _REFUSED_DTYPES:
        raise CheckpointError(f"{where} has dtype {dtype}, {_REFUSED_DTYPES[dtype]}; {readable}")
    raise CheckpointCorruptError(f"{where} has the unknown dtype {_SHORT.repr(dtype)}; {readable}")


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _LARGEST_INT for item in value)


def _tensor_bytes(shape: list[int], element_bytes: int) -> int | None:
    """Return the bytes of a tensor; None where the product exceeds 2^63 - 1: a header may list millions of lengths."""
    size_bytes = element_bytes
    for length in shape:
        size_bytes *= length
        if size_bytes > _LARGEST_INT:
            return None
    return size_bytes


def _check_coverage(file: ShardFile, entries: Iterable[TensorEntry], data_start: int) -> None:
    covered_to, last_name = data_start, "the header"
    for entry in entries:
        gap_bytes = entry.offset - covered_to
        if gap_bytes != 0:
            fault = f"leaves {gap_bytes} bytes unused after" if gap_bytes > 0 else "overlaps"
            raise CheckpointCorruptError(f"{file.path}: tensor {_SHORT.repr(entry.name)} {fault} {last_name}")
        covered_to, last_name = entry.offset + entry.size_bytes, f"tensor {_SHORT.repr(entry.name)}"
    if file.size_bytes < covered_to:
        raise _truncated(file, covered_to)
    if file.size_bytes > covered_to:
        raise CheckpointCorruptError(
            f"{file.path}: has {file.size_bytes - covered_to} trailing bytes after its last tensor; "
            "it is not the file that its header describes"
        )


def _truncated(file: ShardFile, expected_bytes: int, *, at_least: bool = False) -> CheckpointCorruptError:
    missing = f"{'at least ' if at_least else ''}{expected_bytes - file.size_bytes} bytes are missing"
    return CheckpointCorruptError(
        f"{file.path}: truncated, {missing} (it has {file.size_bytes} of {expected_bytes}); repeat the download"
    )


def _read_weight_map(path: Path) -> dict[str, str]:
    with _open_regular(path) as (file, _):
        text = file.read(_LARGEST_JSON_BYTES + 1)
    if len(text) > _LARGEST_JSON_BYTES:
        raise CheckpointCorruptError(f"{path}: is larger than {_LARGEST_JSON_BYTES} bytes")
    raw = _parse_json_object(path, text).get("weight_map")
    if not isinstance(raw, dict):
        raise CheckpointCorruptError(f"{path}: weight_map is not an object but {_SHORT.repr(raw)}")
    for name, file_name in raw.items():
        if not _is_plain_file_name(file_name):
            raise CheckpointCorruptError(
                f"{path}: tensor {_SHORT.repr(name)} is placed in {_SHORT.repr(file_name)}, not a plain file name"
            )
    return raw


def _is_plain_file_name(name: object) -> TypeGuard[str]:
    """Whether `name` can only mean a file in the same directory (isprintable refuses NUL and lone surrogates)."""
    return isinstance(name, str) and name.isprintable() and name not in {"", ".", ".."} and not set(name) & set("/\\")


def _parse_json_object(path: Path, text: bytes) -> dict[str, object]:
    try:
        # `parse_constant=int` fails on NaN and Infinity, which Python would accept and JSON does not have.
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=int)
    except (ValueError, RecursionError) as error:  # undecodable, malformed, an int of 5000 digits, [[[[[[...
        raise CheckpointCorruptError(f"{path}: is not valid UTF-8 JSON where it should be: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointCorruptError(f"{path}: holds JSON, but not an object: {_SHORT.repr(parsed)}")
    return parsed


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {_SHORT.repr(twice)} occurs twice")
    "".join(result).encode()  # a lone surrogate raises ValueError here rather than when the name is printed
    return result


@contextmanager
def _open_regular(path: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """Open for reading, links followed. O_NONBLOCK: opening a FIFO would otherwise wait for its writer."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            file_stat = os.fstat(file.fileno())
            if not stat.S_ISREG(file_stat.st_mode):
                raise CheckpointError(f"{path}: is not a regular file")
            yield file, file_stat
    except FileNotFoundError as error:
        raise CheckpointCorruptError(f"{path}: is missing, or a link to a file that is; repeat the download") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _shard_file(path: Path, file_stat: os.stat_result) -> ShardFile:
    return ShardFile(path, file_stat.st_size, file_stat.st_mtime_ns, file_stat.st_ino, file_stat.st_dev)


def _list_names(directory: Path) -> list[str]:
    """Return the sorted names without hidden ones: macOS leaves `._model.safetensors` on foreign disks."""
    try:
        return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory}: there is no such checkpoint directory") from error
    except NotADirectoryError as error:
        if directory.suffix == ".gguf":
            _refuse_gguf(directory.parent, directory.name)
        raise CheckpointError(f"{directory}: is a file; name the directory that holds the checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed ({error.strerror})") from error


def _refuse_without_safetensors(directory: Path, names: list[str]) -> NoReturn:
    pickles = [name for name in names if any(fnmatch(name, pattern) for pattern in _PICKLE_PATTERNS)]
    if pickles:
        raise CheckpointError(
            f"{directory}: holds only pickle weights ({_some(pickles)}). Loading a pickle can run code that is hidden "
            "in it, so headrace does not read them. Take the model's safetensors files where they exist. If you trust "
            "these, convert pytorch_model*.bin once, where there is memory enough: AutoModelForCausalLM"
            ".from_pretrained(DIRECTORY, use_safetensors=False).save_pretrained(NEW_DIRECTORY) writes safetensors; "
            "save the tokenizer there in the same way"
        )
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        _refuse_gguf(directory, ggufs[0])
    raise CheckpointError(
        f"{directory}: no weights here; expected {_INDEX_NAME} with its shards, {_SINGLE_NAME}, or *.safetensors"
    )


def _refuse_gguf(directory: Path, name: str) -> NoReturn:
    raise CheckpointError(
        f"{directory / name}: GGUF is not streamed yet. transformers can dequantise it once, where there is memory "
        f"enough: AutoModelForCausalLM.from_pretrained(DIRECTORY, gguf_file={name!r}, "
        "quantization_config=GgufConfig(dequantize=True)).save_pretrained(NEW_DIRECTORY) writes safetensors; "
        "save the tokenizer there in the same way"
    )


def _some(names: list[str]) -> str:
    return ", ".join(_SHORT.repr(name) for name in names[:5]) + (
        f" and {len(names) - 5} more" if len(names) > 5 else ""
    )
