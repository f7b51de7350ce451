"""Rival: llama.cpp with the weights mapped, without locking, so that the kernel pages them under a memory limit.

All sequences go through the model in one pass: the batch API carries one token per sequence (the whole prompts in the
first pass). The GGUF is made once by to_gguf.py, beforehand; `--gguf` names it.

Weight repacking is off: a repacked copy lies in anonymous memory, which cannot be paged out without swap.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from measured_run import PassClock, Task, argument_parser, parse_task
from prompts import vocabulary_size


class Sequences:
    """A llama.cpp context that extends several sequences at once, greedily."""

    def __init__(self, gguf_path: Path, task: Task, *, flash_attention: bool) -> None:
        self.vocabulary = vocabulary_size(task.model)
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        model_params.use_extra_bufts = False
        model_params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(gguf_path).encode(), model_params)
        if not self.model:
            raise SystemExit(f"llama.cpp could not load {gguf_path}")
        prompt_total = task.batch * task.prompt_tokens
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = task.batch * (-(-(task.prompt_tokens + task.generate) // 256) * 256)  # whole cells of 256
        # A pass over all the weights per ubatch: all prompts must fit in one, as they do with the other systems.
        params.n_batch = params.n_ubatch = max(prompt_total, task.batch)
        params.n_seq_max = task.batch
        params.n_outputs_max = task.batch
        params.n_threads = params.n_threads_batch = task.threads
        params.kv_unified = False
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp could not make a context")
        self.batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self.lengths = [0] * task.batch

    def extend(self, new_ids: list[list[int]]) -> list[int]:
        """One pass: append ids to every sequence; returns the most likely next token of each."""
        batch = self.batch
        last_rows: list[int] = []
        row = 0
        for sequence, ids in enumerate(new_ids):
            for index, token in enumerate(ids):
                batch.token[row] = token
                batch.pos[row] = self.lengths[sequence] + index
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = int(index == len(ids) - 1)
                row += 1
            self.lengths[sequence] += len(ids)
            last_rows.append(row - 1)
        batch.n_tokens = row
        status = llama_cpp.llama_decode(self.context, batch)
        if status:
            raise SystemExit(f"llama_decode failed with status {status}")
        return [self.best_token(last_row) for last_row in last_rows]

    def best_token(self, row: int) -> int:
        """Return the token with the highest logit after the given row of the last batch."""
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        values = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))
        return int(values.argmax())


def main() -> None:
    """Load, generate and report."""
    parser = argument_parser(__doc__, dtypes=("bfloat16", "float16"))
    parser.add_argument("--gguf", type=Path, required=True, help="the file that to_gguf.py wrote of --model")
    parser.add_argument("--flash-attention", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--verbose", action="store_true", help="let llama.cpp log to stderr")
    task = parse_task(parser)
    if not task.extra.gguf.is_file():
        parser.error(f"--gguf {task.extra.gguf}: no such file; write it with to_gguf.py")
    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    if not task.extra.verbose:
        llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    clock = PassClock(task)
    sequences = Sequences(task.extra.gguf, task, flash_attention=task.extra.flash_attention)
    clock.loaded()
    clock.begin()
    tokens: list[list[int]] = [[] for _ in range(task.batch)]
    new_ids = task.prompts()
    for _ in range(task.generate):
        next_tokens = sequences.extend(new_ids)
        clock.token()
        new_ids = [[token] for token in next_tokens]
        for row, token in zip(tokens, next_tokens, strict=True):
            row.append(token)
    clock.write_report(
        rival="llama.cpp-mmap",
        version=f"llama-cpp-python {llama_cpp.__version__}",
        tokens=tokens,
        settings={
            "flash_attention": task.extra.flash_attention,
            "system": llama_cpp.llama_print_system_info().decode(),
        },
    )


if __name__ == "__main__":
    main()
