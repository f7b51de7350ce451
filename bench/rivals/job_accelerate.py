"""Rival in a job of requests: accelerate's disk offload with a fixed batch, requests sorted by length, left-padded.

Each batch runs until its longest answer is done, as `generate` does. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    """Load, answer all requests, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    requests = [json.loads(line) for line in options.requests.read_text().splitlines()]
    requests.sort(key=lambda request: request["max_tokens"])
    layers = AutoConfig.from_pretrained(options.model).num_hidden_layers
    device_map = dict.fromkeys([f"model.layers.{index}" for index in range(layers)] + ["lm_head"], "disk")
    device_map |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb"], "cpu")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype), device_map=device_map, offload_folder=folder
        ).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        loaded = time.perf_counter()
        generated, seconds = 0, []
        for first in range(0, len(requests), options.batch):
            part = requests[first : first + options.batch]
            width = max(len(request["prompt"]) for request in part)
            ids = torch.tensor([[0] * (width - len(r["prompt"])) + r["prompt"] for r in part])
            mask = torch.tensor([[0] * (width - len(r["prompt"])) + [1] * len(r["prompt"]) for r in part])
            begun = time.perf_counter()
            with torch.inference_mode():
                new = max(request["max_tokens"] for request in part)
                model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
            seconds.append(time.perf_counter() - begun)
            generated += sum(request["max_tokens"] for request in part)
    found = {"batch": options.batch, "load_s": loaded - started, "total_s": sum(seconds), "generated": generated}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
