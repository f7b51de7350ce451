"""headrace itself, under the same command line, clock and report as its rivals.

It is given no budget: like any user's, its run takes what the control group leaves it.
"""

from __future__ import annotations

import torch
from measured_run import PassClock, argument_parser, parse_task

import headrace


def main() -> None:
    """Load, generate and report."""
    task = parse_task(argument_parser(__doc__, dtypes=("auto", "bfloat16", "float32")))
    torch.set_num_threads(task.threads)
    clock = PassClock(task)
    model = headrace.load(
        task.model,
        device="cpu",
        batch=task.batch,
        prompt_tokens=task.prompt_tokens,
        max_tokens=task.prompt_tokens + task.generate,
        dtype=task.dtype,
    )
    clock.loaded()
    clock.begin()
    prompts = torch.tensor(task.prompts())
    # The hook comes after the pass; sampling the token, some tenths of a millisecond, falls into the next one.
    model.register_forward_hook(lambda *_: clock.token())
    tokens = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=task.generate,
        min_new_tokens=task.generate,
        do_sample=False,
    )
    handle = model.headrace
    measured = handle.measured()
    clock.write_report(
        rival="headrace",
        version=f"headrace {headrace.__version__}",
        tokens=[[int(token) for token in row[-task.generate :]] for row in tokens],
        settings={
            "budget_bytes": handle.plan.budget_bytes,
            "compute_dtype": handle.plan.compute_dtype,
            "resident_blocks": handle.plan.resident_blocks,
            "slots": handle.plan.slots,
            "streamed_bytes_per_pass": handle.plan.streamed_bytes_per_pass,
            "predicted_decode_s_per_pass": handle.prediction.decode_s_per_pass,
            "read_bytes_per_s": measured.read_bytes_per_s,
        },
    )
    model.close()


if __name__ == "__main__":
    main()
