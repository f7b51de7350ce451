"""The checkpoints of a run, written when they are first asked for; how fast the disk was seen to take and give them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from gpu_parts.outcome import SkippedError
from headrace.model.safetensors_index import TensorIndex
from headrace.streaming.probe.machine import read_rate
from headrace.streaming.source import DirectFiles
from make_checkpoint import Shape, checkpoint_bytes, write_checkpoint

SHARD_BYTES = 2_000_000_000
DISK_SHARE = 0.95
"""of the disk's free bytes that may be written to"""
ASSUMED_BYTES_PER_S = 1e9
"""until the disk was measured"""
LEAST_LAYERS = 2
READ_CHUNK_BYTES, READ_THREADS, READ_S = 8 << 20, 2, 0.4


class CheckpointRack:
    """One folder with a checkpoint of random weights for each shape; owner of what it writes there, until `clear`."""

    def __init__(self, directory: Path, shapes: Mapping[str, Shape]) -> None:
        self._directory = directory
        self._shapes = dict(shapes)
        self._written: list[Path] = []
        self.write_bytes_per_s = ASSUMED_BYTES_PER_S
        self.read_bytes_per_s = ASSUMED_BYTES_PER_S
        self._read_measured = False

    def shape(self, name: str) -> Shape:
        """As it is written, or will be."""
        return self._shapes[name]

    def size_bytes(self, name: str) -> int:
        """Of all weights."""
        return checkpoint_bytes(self._shapes[name])

    def seconds(self, name: str, *, loads: float) -> float:
        """Writing this checkpoint where it is not there yet, and reading it `loads` times."""
        size = self.size_bytes(name)
        written = self._complete(name)
        return (0.0 if written else size / self.write_bytes_per_s) + loads * size / self.read_bytes_per_s

    def cut(self, name: str, *, most_bytes: float) -> int:
        """Leave out layers until the checkpoint has at most `most_bytes` and fits on the disk; returns how many stay.

        Every byte of it is distinct and on the disk: no layer stands for another one. Raises SkippedError where not
        even two layers fit.
        """
        shape = self._shapes[name]
        for layers in range(shape.layers, LEAST_LAYERS - 1, -1):  # of an earlier run that kept its checkpoints
            self._shapes[name] = shape._replace(layers=layers)
            if self._complete(name):
                return layers
        room_bytes = min(most_bytes, self._room_bytes())
        ends_bytes = checkpoint_bytes(shape._replace(layers=0))
        layer_bytes = (checkpoint_bytes(shape) - ends_bytes) // shape.layers
        layers = min(shape.layers, int(room_bytes - ends_bytes) // layer_bytes)
        if layers < LEAST_LAYERS:
            raise SkippedError(
                f"{name}: there is room or time for {max(0.0, room_bytes) / 1e9:.1f} GB, and two layers of it take "
                f"{(ends_bytes + LEAST_LAYERS * layer_bytes) / 1e9:.1f} GB"
            )
        self._shapes[name] = shape._replace(layers=layers)
        return layers

    def path(self, name: str) -> Path:
        """The checkpoint's folder, once it is there; the first one also tells how fast the disk is read."""
        directory = self._path(name)
        if not self._complete(name):
            size = self.size_bytes(name)
            self._written.append(directory)
            room_bytes = self._room_bytes()
            if size > room_bytes:
                raise SkippedError(
                    f"{name} takes {size / 1e9:.1f} GB, and the disk has room for {room_bytes / 1e9:.1f} GB"
                )
            began = time.perf_counter()
            write_checkpoint(directory, self._shapes[name], shard_bytes=SHARD_BYTES, seed=0, fast=True)
            self.write_bytes_per_s = size / (time.perf_counter() - began)
            (directory / "shape.json").write_text(json.dumps(self._shapes[name]))  # complete
        if not self._read_measured:
            self._read_measured = True
            files = TensorIndex.from_directory(directory).files
            source = DirectFiles(files)
            try:
                rate = read_rate(source, files, chunk_bytes=READ_CHUNK_BYTES, threads=READ_THREADS, seconds=READ_S)
            finally:
                source.close()
            self.read_bytes_per_s = rate or ASSUMED_BYTES_PER_S
        return directory

    def clear(self) -> None:
        """Remove what was written."""
        while self._written:
            shutil.rmtree(self._written.pop(), ignore_errors=True)

    def _room_bytes(self) -> float:
        self._directory.mkdir(parents=True, exist_ok=True)
        return DISK_SHARE * shutil.disk_usage(self._directory).free

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}-{self._shapes[name].layers}-layers".lower().replace(" ", "-")

    def _complete(self, name: str) -> bool:
        mark = self._path(name) / "shape.json"
        return mark.exists() and json.loads(mark.read_text()) == list(self._shapes[name])
