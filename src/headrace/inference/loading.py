"""A checkpoint that is being loaded: with which options, onto which device, and how its bytes are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace.inference.dry_pass import Anatomy, examine
from headrace.inference.load_options import Options
from headrace.inference.skeleton import read_transformers_config
from headrace.machine.machine import Disk
from headrace.streaming.checkpoint import Checkpoint
from headrace.streaming.device import Device
from headrace.streaming.device_budget import refuse_what_is_not_free
from headrace.streaming.stream import StreamSettings


@dataclass(frozen=True, kw_only=True)
class Loading:
    """What measuring, planning and building one model have in common."""

    checkpoint: Checkpoint
    options: Options
    device: Device
    config: Any
    """of transformers"""
    anatomy: Anatomy
    """where the transformers model keeps its parts"""
    reader: StreamSettings
    """slots and the like are the plan's business"""

    @classmethod
    def of(cls, checkpoint: Checkpoint, options: Options, device: Device) -> Loading:
        """Begin to load: see how transformers builds the model, and keep to that.

        Raises BudgetError where less memory is free than the options allow, UnsupportedModelError and
        CheckpointCorruptError where the model cannot stream or the checkpoint is not its own.
        """
        refuse_what_is_not_free(device, options.budget_bytes, options.host_budget_bytes)
        trusted = options.asked.trust_remote_code
        config = read_transformers_config(checkpoint.directory, trust_remote_code=trusted)
        anatomy = confirmed(checkpoint, config)
        return cls(
            checkpoint=checkpoint,
            options=options,
            device=device,
            config=config,
            anatomy=anatomy,
            reader=_reader(options),
        )


def confirmed(checkpoint: Checkpoint, config: Any) -> Anatomy:
    """See how transformers builds the model, and let the checkpoint keep to that; raises what `Loading.of` does."""
    anatomy, parts = examine(config, checkpoint.model, checkpoint.index.entries.values())
    checkpoint.confirm(parts)
    return anatomy


def _reader(options: Options) -> StreamSettings:
    disk = None if options.asked.machine is None else options.asked.machine.disk
    chunk_bytes, threads = (Disk.chunk_bytes, Disk.threads) if disk is None else (disk.chunk_bytes, disk.threads)
    limit = options.read_limit_bytes_per_s
    if limit is not None:
        threads = max(threads, 4)  # reads ahead of the limit, so that a slow moment of the disk does not show
        chunk_bytes = min(chunk_bytes, max(1 << 20, int(limit / 100) >> 12 << 12))
    return StreamSettings(
        slots=1, slot_bytes=0, reader_threads=threads, chunk_bytes=chunk_bytes, read_limit_bytes_per_s=limit
    )
