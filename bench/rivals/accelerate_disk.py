"""Rival: accelerate's disk offload. Every decoder layer is on "disk" and read again whenever it is called.

accelerate reads offloaded weights from the checkpoint's own safetensors where their dtype is the wanted one, so nothing
is written anew. The embedding stays in place: it is mapped from the file, a pass touches only a few of its rows, and
offloaded it would be read as a whole in every pass. The head is offloaded like the layers.
"""

from __future__ import annotations

import accelerate
import torch
import transformers
from measured_run import PassClock, argument_parser, parse_task
from transformers import AutoConfig, AutoModelForCausalLM
from transformers_generate import greedy_tokens


def main() -> None:
    """Load, generate and report."""
    parser = argument_parser(__doc__, dtypes=("bfloat16", "float32"))
    parser.add_argument(
        "--resident",
        default="model.embed_tokens,model.norm,model.rotary_emb",
        help="comma-separated modules kept in memory; all others are on disk (default: %(default)s)",
    )
    task = parse_task(parser)
    torch.set_num_threads(task.threads)
    clock = PassClock(task)
    resident = [name for name in task.extra.resident.split(",") if name]
    layers = AutoConfig.from_pretrained(task.model).num_hidden_layers
    modules = ["model.embed_tokens", *(f"model.layers.{index}" for index in range(layers)), "model.norm"]
    modules += ["model.rotary_emb", "lm_head"]
    unknown = sorted(set(resident) - set(modules))
    if unknown:
        parser.error(f"--resident: no such module: {', '.join(unknown)}")
    device_map = {name: "cpu" if name in resident else "disk" for name in modules}
    model = AutoModelForCausalLM.from_pretrained(
        task.model,
        dtype=getattr(torch, task.dtype),
        device_map=device_map,
        offload_folder=task.work_dir / "accelerate-offload",
    )
    model.eval()
    clock.loaded()
    tokens = greedy_tokens(model, clock)
    clock.write_report(
        rival="accelerate-disk",
        version=f"accelerate {accelerate.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
        tokens=tokens,
        settings={"resident": resident, "attention": model.config._attn_implementation},
    )


if __name__ == "__main__":
    main()
