"""Rival: DeepSpeed's ZeRO-Inference with the parameters offloaded to a disk ("nvme"), on the CPU accelerator.

ZeRO stage 3 in one process: while the checkpoint loads, every matrix is written to the swap folder (under --work-dir);
in every pass it is read back with direct asynchronous I/O into one of a few pinned buffers just before its use, while
the matrix before it is being used. All buffers have the size of the model's largest matrix. Matrices smaller than an
I/O block stay in memory, hence the block size is chosen by --memory-bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

from measured_run import PassClock, Task, argument_parser, parse_task

MEBIBYTE = 1 << 20
BASE_BYTES = 350 * MEBIBYTE  # the interpreter with torch, transformers and DeepSpeed, as measured
LOADING_COPIES = 3  # of the largest tensor: as it is initialized, gathered and read


def tensor_elements(model: Path) -> list[int]:
    """Return the element counts of the checkpoint's tensors."""
    counts: list[int] = []
    for file_path in model.glob("*.safetensors"):
        with open(file_path, "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        counts += [math.prod(entry["shape"]) for entry in header.values()]
    if not counts:
        raise SystemExit(f"{model}: no safetensors files there")
    return counts


def block_mib_for(task: Task, counts: list[int]) -> int:
    """Choose the I/O block size, which also decides what stays in memory.

    DeepSpeed keeps tensors smaller than a block in memory, and this is the one setting through which it can use memory
    to spare (`max_in_cpu` is read by nothing, and larger persistence thresholds run out of buffers). So: the smallest
    block that keeps the most, by an estimate that has room for what loading needs beside the buffers.
    """
    if not task.memory_bytes:
        return 1
    fixed = BASE_BYTES + (task.extra.buffers + LOADING_COPIES) * 2 * max(counts)
    best_block, best_kept = 1, -1
    for block in (1, 2, 4, 8, 16, 32, 64):
        kept = sum(2 * count for count in counts if 2 * count < block * MEBIBYTE)
        fits = fixed + kept <= 0.92 * task.memory_bytes
        if kept > best_kept and (fits or best_kept < 0):
            best_block, best_kept = block, kept
    return best_block


def zero_config(task: Task) -> dict[str, object]:
    """Return the settings that were the fastest of those tried; all can be changed by options."""
    extra = task.extra
    counts = tensor_elements(task.model)
    block_mib = extra.block_mib or block_mib_for(task, counts)
    return {
        "train_micro_batch_size_per_gpu": task.batch,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            # With this bucket above zero one matrix is fetched ahead of the one in use.
            "stage3_prefetch_bucket_size": extra.prefetch_elements,
            "stage3_max_live_parameters": 10**9,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": extra.persistence_elements,
            "offload_param": {
                "device": "nvme",
                "nvme_path": str(task.work_dir.resolve() / "deepspeed-swap"),
                "pin_memory": True,
                "buffer_count": extra.buffers,
                "buffer_size": max(counts),
                "max_in_cpu": 0,
            },
        },
        "aio": {
            "block_size": block_mib * MEBIBYTE,
            "queue_depth": extra.queue_depth,
            "intra_op_parallelism": extra.io_threads,
            "single_submit": False,
            "overlap_events": True,
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def join_group_of_one() -> None:
    """DeepSpeed wants a process group even for one process; this one needs no launcher and no open port."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def main() -> None:
    """Load, generate and report."""
    parser = argument_parser(__doc__, dtypes=("bfloat16",))
    parser.add_argument("--buffers", type=int, default=2, help="swap buffers (default: %(default)s)")
    parser.add_argument("--block-mib", type=int, default=0, help="MiB per I/O request (default: by --memory-bytes)")
    parser.add_argument("--queue-depth", type=int, default=32)
    parser.add_argument("--io-threads", type=int, default=1, help="threads that share one read (default: %(default)s)")
    parser.add_argument("--prefetch-elements", type=int, default=200_000_000)
    parser.add_argument(
        "--persistence-elements", type=int, default=100_000, help="tensors up to this size stay in memory"
    )
    task = parse_task(parser)
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("OMP_NUM_THREADS", str(task.threads))

    # Imported only now, since DeepSpeed chooses its accelerator when it is imported.
    import deepspeed
    import torch
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig
    from transformers_generate import greedy_tokens

    torch.set_num_threads(task.threads)
    clock = PassClock(task)
    join_group_of_one()
    config = zero_config(task)
    keep_alive = HfDeepSpeedConfig(config)  # from_pretrained partitions while it loads, as long as this object lives
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.bfloat16)
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.module.eval()
    clock.loaded()
    tokens = greedy_tokens(engine.module, clock)
    del keep_alive
    clock.write_report(
        rival="deepspeed-nvme",
        version=f"deepspeed {deepspeed.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
        tokens=tokens,
        settings={"zero": config["zero_optimization"], "aio": config["aio"]},
    )


if __name__ == "__main__":
    main()
