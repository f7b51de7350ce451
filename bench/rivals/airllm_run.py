"""Rival: AirLLM, which keeps one file per layer and loads the next layer in a thread while one is used.

It needs the checkpoint split into such files once: `--prepare` does that and ends (outside of any timed run).
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch
from airllm import AutoModel
from measured_run import PassClock, argument_parser, parse_task
from transformers_generate import greedy_tokens


def main() -> None:
    """Load, generate and report."""
    parser = argument_parser(__doc__, dtypes=("bfloat16",))
    parser.add_argument("--shards", type=Path, required=True, help="directory of the split checkpoint")
    parser.add_argument("--prepare", action="store_true", help="only split the checkpoint")
    task = parse_task(parser)
    torch.set_num_threads(task.threads)
    clock = PassClock(task)
    model = AutoModel.from_pretrained(
        str(task.model),
        device="cpu",
        dtype=torch.bfloat16,
        layer_shards_saving_path=str(task.extra.shards),
        max_seq_len=task.prompt_tokens + task.generate,
    )
    if task.extra.prepare:
        sys.exit(0)
    clock.loaded()
    tokens = greedy_tokens(model.model, clock)
    version = importlib.metadata.version("airllm")
    clock.write_report(
        rival="airllm", version=f"airllm {version}, torch {torch.__version__}", tokens=tokens, settings={}
    )


if __name__ == "__main__":
    main()
