"""The strategies: names for shapes of plans, listed once."""

from __future__ import annotations

from enum import StrEnum


class Strategy(StrEnum):
    """How weights reach what computes, and how the work is divided."""

    RESIDENT = "resident"
    SEQUENTIAL = "sequential"
    OVERLAP = "overlap"
    CPU = "cpu"
    HYBRID = "hybrid"
    EXPERTS = "experts"
    TENSOR = "tensor"
    TENSOR_2D = "tensor-2d"
    PIPELINE = "pipeline"
    TENSOR_PIPELINE = "tensor+pipeline"
    TENSOR_OVERLAP = "tensor+overlap"
    SHARDED = "sharded"

    @property
    def description(self) -> str:
        """What it does, in half a sentence."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    Strategy.RESIDENT: "all weights on one device",
    Strategy.SEQUENTIAL: "load a layer, compute it, drop it",
    Strategy.OVERLAP: "the next layers load while one computes; what fits stays",
    Strategy.CPU: "the host's CPU computes from its own memory",
    Strategy.HYBRID: "the device computes what it holds, the CPU the rest from host memory",
    Strategy.EXPERTS: "of each layer the experts stay as far as they fit, others are fetched when they are needed",
    Strategy.TENSOR: "every layer's width is split over devices",
    Strategy.TENSOR_2D: "every layer's width is split in two directions",
    Strategy.PIPELINE: "each device holds some of the layers",
    Strategy.TENSOR_PIPELINE: "stages of layers, each split by width",
    Strategy.TENSOR_OVERLAP: "split by width, and each device streams its part of the layers that do not fit",
    Strategy.SHARDED: "each device pulls a part of every layer over its own link and gathers the others'",
}

RUNNABLE = (Strategy.RESIDENT, Strategy.SEQUENTIAL, Strategy.OVERLAP)
"""what the runtime runs on one device: other strategies are refused by name"""
