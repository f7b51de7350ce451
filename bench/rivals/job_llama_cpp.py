"""Rival in a job of requests: llama.cpp with parallel slots, weights mapped from the file.

As its server does: every pass carries one token of each slot that generates, and prompts of slots that have become
free, up to the batch. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    """Load, answer all requests, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, required=True)
    options = parser.parse_args()
    requests = [json.loads(line) for line in options.requests.read_text().splitlines()]
    requests.sort(key=lambda request: -request["max_tokens"])
    started = time.perf_counter()
    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    model_params.use_extra_bufts = False
    model_params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(options.gguf).encode(), model_params)
    longest = max(len(request["prompt"]) + request["max_tokens"] for request in requests)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = options.slots * (-(-longest // 256) * 256)
    params.n_batch = params.n_ubatch = max(512, options.slots)
    params.n_seq_max = params.n_outputs_max = options.slots
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    params.kv_unified = False
    context = llama_cpp.llama_init_from_model(model, params)
    if not model or not context:
        raise SystemExit("llama.cpp could not load the model")
    memory = llama_cpp.llama_get_memory(context)
    batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
    loaded = time.perf_counter()
    waiting = list(reversed(requests))
    slots: list[dict[str, object] | None] = [None] * options.slots
    generated = passes = 0
    while waiting or any(slots):
        row, outputs = 0, []
        for slot in range(options.slots):
            state = slots[slot]
            if state is None and waiting:
                request = waiting[-1]
                if row + len(request["prompt"]) > params.n_batch - options.slots:
                    continue
                waiting.pop()
                state = slots[slot] = {"tokens": request["prompt"], "place": 0, "left": request["max_tokens"]}
            if state is None:
                continue
            tokens = state["tokens"]
            for index, token in enumerate(tokens):
                batch.token[row] = token
                batch.pos[row] = state["place"] + index
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = slot
                batch.logits[row] = int(index == len(tokens) - 1)
                row += 1
            state["place"] += len(tokens)
            outputs.append((slot, row - 1))
        batch.n_tokens = row
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        passes += 1
        for slot, last in outputs:
            logits = llama_cpp.llama_get_logits_ith(context, last)
            values = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (options.vocabulary,))
            state = slots[slot]
            state["tokens"] = [int(values.argmax())]
            state["left"] -= 1
            generated += 1
            if not state["left"]:
                slots[slot] = None
                llama_cpp.llama_memory_seq_rm(memory, slot, -1, -1)
    found = {"slots": options.slots, "load_s": loaded - started, "total_s": time.perf_counter() - loaded}
    print(json.dumps({**found, "generated": generated, "passes": passes}))


if __name__ == "__main__":
    main()
