"""The prompts that every system of the benchmark is given: random token ids that depend only on the arguments.

Kept apart so that each rival's environment can import it: nothing but numpy is needed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def vocabulary_size(model: Path) -> int:
    """Return the vocabulary size that the checkpoint's config.json states."""
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def prompt_ids(vocabulary: int, *, batch: int, length: int, seed: int) -> list[list[int]]:
    """Draw `batch` prompts of `length` token ids; ids below 3 are left out, as they are the special tokens."""
    drawn = np.random.default_rng(seed).integers(3, vocabulary - 1, size=(batch, length))
    return [[int(token) for token in row] for row in drawn]
