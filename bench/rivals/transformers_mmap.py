"""Rival: plain transformers. The safetensors shards are memory-mapped, so the kernel may drop and re-read weights.

In bfloat16 the weights stay the pages of the mapped files: under a memory limit below the model's size the kernel
pages them. In float32 they would be converted copies, which cannot be paged out without swap: --dtype float32 is for
comparisons of speed where there is memory enough.
"""

from __future__ import annotations

import torch
import transformers
from measured_run import PassClock, argument_parser, parse_task
from transformers import AutoModelForCausalLM
from transformers_generate import greedy_tokens


def main() -> None:
    """Load, generate and report."""
    task = parse_task(argument_parser(__doc__, dtypes=("bfloat16", "float32")))
    torch.set_num_threads(task.threads)
    clock = PassClock(task)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=getattr(torch, task.dtype))
    model.eval()
    clock.loaded()
    tokens = greedy_tokens(model, clock)
    clock.write_report(
        rival="transformers-mmap",
        version=f"transformers {transformers.__version__}, torch {torch.__version__}",
        tokens=tokens,
        settings={"attention": model.config._attn_implementation},
    )


if __name__ == "__main__":
    main()
