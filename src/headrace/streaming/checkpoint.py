"""A Hugging Face checkpoint as it lies on disk, used in place: read-only, never copied.

Turns bytes that have landed in a slot into tensors, reads the small tensors that always stay, and fetches single rows
of the embedding table.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from headrace.errors import CheckpointError
from headrace.model.config_fields import read_config
from headrace.model.layout import HOST_ALIGNMENT_BYTES, PAGE_BYTES, align_down, align_up
from headrace.model.safetensors_index import TensorEntry, TensorIndex
from headrace.model.stored_model import StoredBlock, StoredModel, build_stored_model, with_parts
from headrace.model.structure import Parts
from headrace.streaming.arena import Arena, Piece
from headrace.streaming.source import DirectFiles
from headrace.streaming.torch_dtypes import STORED_TORCH_DTYPES

ROW_WINDOW_BYTES = 256 * 1024
"""Rows that lie within this many bytes of one another are read together."""

ROW_READERS = 4

_SMALL_DTYPES = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool, "F64": torch.float64}
"""of tensors beside the weights, such as a table of which token goes to which expert"""


def view(piece: Piece, position: int, entry: TensorEntry, rows: tuple[int, int] | None = None) -> torch.Tensor:
    """The tensor (or its rows [first, last)) whose bytes begin at `position` of `piece`; no byte is copied.

    Raises CheckpointError for a dtype that no model is computed in.
    """
    shape = entry.shape if rows is None else (rows[1] - rows[0], *entry.shape[1:])
    dtype = torch_dtype(entry)
    size_bytes = dtype.itemsize
    for length in shape:
        size_bytes *= length
    return piece.tensor[position : position + size_bytes].view(dtype).view(shape)


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """The torch dtype of a weight; raises CheckpointError where headrace has none for it."""
    if entry.dtype not in STORED_TORCH_DTYPES:
        known = ", ".join(sorted(STORED_TORCH_DTYPES))
        raise CheckpointError(f"{entry.name} is stored as {entry.dtype}; headrace runs weights in {known}")
    return STORED_TORCH_DTYPES[entry.dtype]


class Checkpoint:
    """One checkpoint directory, opened. Owner of the file descriptors until `close`.

    `cut_head`: a large head becomes several blocks, which only the CPU computes bit for bit
    (see `build_stored_model`).
    """

    def __init__(self, directory: Path, *, cut_head: bool = True) -> None:
        self.directory = directory
        config = read_config(directory / "config.json")
        self.index = TensorIndex.from_directory(directory)
        self.model: StoredModel = build_stored_model(directory.resolve().name, config, self.index, cut_head=cut_head)
        self._rows_lock = threading.Lock()
        self._rows: _RowReader | None = None
        self._row_bytes_read = 0

    def confirm(self, parts: Parts) -> None:
        """Keep to these parts of the checkpoint from now on; raises CheckpointError for a dtype of none that is run."""
        self.model = with_parts(self.model, parts)
        for entry in (*parts.tables, *(own for block in self.model.blocks for own in block.tensors)):
            torch_dtype(entry)

    def is_copied_by_transformers(self) -> bool:
        """Whether weights that transformers loads unconverted lie elsewhere than in a file, modulo 64 bytes.

        Matrix products may depend on that in the last bit. Where it maps the file, a slot holds them at like addresses.
        """
        entries = self.index.entries.values()
        entry = next((own for own in entries if own.offset % HOST_ALIGNMENT_BYTES and own.size_bytes), None)
        if entry is None:
            return False
        with safe_open(self.index.files[entry.file_index].path, framework="pt") as file:
            place = file.get_slice(entry.name)[...].data_ptr()
        return bool((place - entry.offset) % HOST_ALIGNMENT_BYTES)

    def open_source(self) -> DirectFiles:
        """Open the files once more for a reader of its own; the caller closes them."""
        return DirectFiles(self.index.files)

    def read_block(self, block: StoredBlock, piece: Piece) -> None:
        """Read one block now, in this thread, into `piece` (at least its footprint)."""
        source = self.open_source()
        try:
            for extent in block.layout.extents:
                end = extent.slot_offset + extent.length
                source.read_into(extent.file_index, extent.file_offset, piece.buffer[extent.slot_offset : end])
        finally:
            source.close()

    def read_aligned(self, block: StoredBlock) -> torch.Tensor:
        """One block as an accelerator holds it, in host memory of its own: uint8, `block.held_bytes` long."""
        arena = Arena(block.read_bytes)
        try:
            piece = arena.take(block.read_bytes)
            self.read_block(block, piece)
            made = torch.empty(block.held_bytes, dtype=torch.uint8, device="cpu")
            for move in block.aligned.moves:
                end = move.start + move.length
                made[move.target : move.target + move.length].copy_(piece.tensor[move.start : end])
            return made
        finally:
            arena.close()

    def read_tensors(self, entries: Iterable[TensorEntry]) -> dict[str, torch.Tensor]:
        """Read small tensors into memory of their own."""
        source = self.open_source()
        try:
            return {entry.name: _read_tensor(source, entry) for entry in entries}
        finally:
            source.close()

    def read_rows(self, entry: TensorEntry, rows: list[int]) -> torch.Tensor:
        """Return rows of a matrix in the given order: shape (len(rows), columns), dtype as stored."""
        with self._rows_lock:
            if self._rows is None:
                self._rows = _RowReader(self.open_source())
        return self._rows.read(entry, rows)

    @property
    def row_bytes_read(self) -> int:
        """Bytes read for single rows so far."""
        return self._row_bytes_read + (self._rows.bytes_read if self._rows is not None else 0)

    def close(self) -> None:
        """Close what was opened for rows."""
        with self._rows_lock:
            if self._rows is not None:
                self._rows.close()
                self._row_bytes_read += self._rows.bytes_read
                self._rows = None


def _read_tensor(source: DirectFiles, entry: TensorEntry) -> torch.Tensor:
    dtype = _SMALL_DTYPES.get(entry.dtype) or torch_dtype(entry)
    start, end = align_down(entry.offset), align_up(entry.offset + entry.size_bytes)
    with mmap.mmap(-1, max(end - start, PAGE_BYTES)) as bounce, memoryview(bounce) as buffer:
        source.read_into(entry.file_index, start, buffer[: end - start])
        inner = bytes(buffer[entry.offset - start : entry.offset - start + entry.size_bytes])
    if not inner:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(bytearray(inner), dtype=dtype).view(entry.shape)


class _Window(NamedTuple):
    """Rows of one read: (row, first byte) pairs and the page-aligned range that covers them."""

    rows: list[int]
    start: int
    length: int


class _RowReader:
    """Reads scattered rows with a few threads, each through a page-aligned buffer of its own."""

    def __init__(self, source: DirectFiles) -> None:
        self._source = source
        self._pool = ThreadPoolExecutor(ROW_READERS, thread_name_prefix="headrace-rows")
        self._local = threading.local()
        self.bytes_read = 0

    def read(self, entry: TensorEntry, rows: list[int]) -> torch.Tensor:
        row_bytes = entry.size_bytes // entry.shape[0]
        distinct = sorted(set(rows))
        found: dict[int, torch.Tensor] = {}
        for part in self._pool.map(
            lambda window: self._read_window(entry, window, row_bytes), _windows(entry, distinct)
        ):
            found.update(part)
        return torch.stack([found[row] for row in rows])

    def close(self) -> None:
        self._pool.shutdown()
        self._source.close()

    def _read_window(self, entry: TensorEntry, window: _Window, row_bytes: int) -> dict[int, torch.Tensor]:
        bounce = self._bounce(window.length)
        self._source.read_into(entry.file_index, window.start, memoryview(bounce)[: window.length])
        self.bytes_read += window.length
        found = {}
        for row in window.rows:
            start = entry.offset + row * row_bytes - window.start
            data = bytearray(bounce[start : start + row_bytes])
            found[row] = torch.frombuffer(data, dtype=torch_dtype(entry))
        return found

    def _bounce(self, length: int) -> mmap.mmap:
        bounce: mmap.mmap | None = getattr(self._local, "bounce", None)
        if bounce is None or len(bounce) < length:
            bounce = self._local.bounce = mmap.mmap(-1, max(length, ROW_WINDOW_BYTES))
        return bounce


def _windows(entry: TensorEntry, rows: list[int]) -> list[_Window]:
    """Group sorted rows whose covering range stays within ROW_WINDOW_BYTES and wastes less than it holds."""
    row_bytes = entry.size_bytes // entry.shape[0]
    windows: list[_Window] = []
    for row in rows:
        start = align_down(entry.offset + row * row_bytes)
        end = align_up(entry.offset + (row + 1) * row_bytes)
        if windows:
            last = windows[-1]
            near = start - (last.start + last.length) <= PAGE_BYTES
            if near and end - last.start <= ROW_WINDOW_BYTES:
                windows[-1] = _Window([*last.rows, row], last.start, end - last.start)
                continue
        windows.append(_Window([row], start, end - start))
    return windows
