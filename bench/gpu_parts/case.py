"""How much a run measures: the full one, a quick one, and one on the made-up accelerator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.planning.scenario import CHUNK_BYTES
from make_checkpoint import SHAPES, Shape


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes by name, and who plays which part; numbers of repetitions."""

    name: str
    shapes: Mapping[str, Shape]
    small: str
    """exactness in every dtype; compiled layers"""
    main: str
    """whatever is compared"""
    large: str | None
    """streamed with as many layers as fit; None: not at all"""
    large_most_bytes: int = 40_000_000_000
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    """of exactness; the first one with more plans"""
    seconds: float = 480.0
    """for everything, unless another limit is given"""
    rounds: int = 3
    """in which contestants take turns"""
    passes: int = 3
    """in a row, after one that does not count"""
    new_tokens: int = 12
    """generated at batch 1, the first two of which do not count"""
    token_bounds: tuple[int, int] = (512, 32768)
    """within which break-even is looked for"""
    raw_copies: int = 16
    raw_read_s: float = 0.7
    residency: tuple[float, ...] = (1.0, 0.5, 0.25, 0.75)
    read_limit: float | None = None
    """bytes per second of the disk; None: what it gives"""
    ring_bytes: int = 4 * CHUNK_BYTES
    """host memory that no load does without: the ring of a reader with this limit"""
    share_of_time: float = 1.0
    """of what the full case's measuring takes"""


FULL = Case(
    name="full",
    shapes={"1B": SHAPES["llama-1b"], "8B": SHAPES["llama-8b"], "70B": SHAPES["llama-70b"]},
    small="1B",
    main="8B",
    large="70B",
)
QUICK = Case(
    name="quick",
    shapes={"1B": SHAPES["llama-1b"]},
    small="1B",
    main="1B",
    large=None,
    seconds=115.0,
    rounds=2,
    passes=2,
    new_tokens=8,
    raw_read_s=0.3,
    residency=(1.0, 0.5),
    share_of_time=0.5,
)
FAKE = Case(
    name="fake",
    shapes={
        "tiny": Shape(64, 160, 3, 4, 2, 512),
        "little": Shape(64, 160, 5, 4, 2, 512),
        "less little": Shape(128, 256, 80, 4, 2, 512),
    },
    small="tiny",
    main="little",
    large="less little",
    large_most_bytes=3_000_000,
    dtypes=("bfloat16", "float32"),
    seconds=120.0,
    rounds=2,
    passes=2,
    new_tokens=5,
    token_bounds=(16, 64),
    raw_copies=4,
    raw_read_s=0.02,
    residency=(1.0, 0.5),
    read_limit=20e6,  # else the disk would be as good as host memory
    ring_bytes=8 << 20,
    share_of_time=0.02,
)
