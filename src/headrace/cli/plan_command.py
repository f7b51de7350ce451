"""`headrace plan`: predict every strategy, recommend one, say what binds and what would help."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from headrace import __version__
from headrace.cli.command import Command, load_run_libraries, require_run_libraries
from headrace.cli.options import (
    CacheOnHostOption,
    CpuBlocksOption,
    DtypeChoice,
    DtypeOption,
    FreshOption,
    GenerateTokensOption,
    JsonOption,
    MemoryOption,
    PromptTokensOption,
    QuietOption,
    ReadLimitOption,
)
from headrace.cli.output import Output, check_writable, write_trace
from headrace.cli.plan_report import show_plan
from headrace.inference.plan_api import ModelChanges, plan_answer
from headrace.planning.answer import PlanAnswer
from headrace.planning.answer_json import answer_json
from headrace.planning.prediction import timeline_of
from headrace.planning.scenarios import DEFAULT_ACCEPTANCE, PlanRequest
from headrace.planning.strategies import Strategy

EXAMPLES = (
    "headrace plan ./my-model --memory 4GiB",
    "headrace plan ./my-model --memory 4GiB --machine machine.toml --json",
    "headrace plan ./my-70b --device cuda --memory 40GiB --host-memory 100GiB",
    "headrace plan ./my-70b --machine machine.toml --device cuda:0 --cpu-blocks",
    "headrace plan gpt-3 --machine 8xa100-80 --batch 64",
    "headrace plan llama-3.1-405b --machine rtx-4090 --weights int4",
    "headrace plan 'gpt-3*1000' --machine 72xgb300 --plot latency.png",
)


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Directory of a Hugging Face checkpoint, a .gguf file, a config.json, a hub id, or a name from "
            "`headrace models` (gpt-3; gpt-3*1000 has 1000 times its parameters).",
        ),
    ],
    *,
    machine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="A name from `headrace machines` (h100, 8xh100, 2x8xh100), or a machine file (from headrace probe, or "
            "written by hand). Without it: measure this machine now.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Who computes: cpu, cuda, cuda:1. auto: with a machine file its first GPU, else the cpu; without one "
            "what HEADRACE_DEVICE names, else the first GPU, else the cpu, as headrace run does.",
        ),
    ] = "auto",
    memory: MemoryOption = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Host memory that each computer may use for the model: with a GPU, for the blocks that do not fit on "
            "it.  [default: what is free, less a reserve]",
            show_default=False,
        ),
    ] = None,
    cpu_blocks: CpuBlocksOption = False,
    cache_on_host: CacheOnHostOption = False,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences at once, over all devices.")] = 1,
    prompt_tokens: PromptTokensOption = None,
    generate_tokens: GenerateTokensOption = None,
    strategy: Annotated[
        str, typer.Option(metavar="NAME", help=f"auto: compare all. Or one of: {', '.join(Strategy)}.")
    ] = "auto",
    weights: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Weights in another format: fp16, fp8, int8, int4, q4_k_m, ...")
    ] = None,
    kv_bits: Annotated[int | None, typer.Option(metavar="N", min=1, max=32, help="Bits of a KV cache element.")] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Speculative decoding: draft tokens per sequence and pass.")
    ] = None,
    acceptance: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=1,
            help=f"Probability that a draft token is accepted.  [default: {DEFAULT_ACCEPTANCE}]",
        ),
    ] = None,
    expert_hit_rate: Annotated[
        float | None,
        typer.Option(metavar="SHARE", min=0, max=1, help="Share of a mixture's experts found on the device."),
    ] = None,
    sampling: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="What costs more than greedy decoding: best-of:4, beams:4, revise:2, ..."),
    ] = None,
    dtype: DtypeOption = DtypeChoice.AUTO,
    read_limit: ReadLimitOption = None,
    fresh: FreshOption = False,
    learned: Annotated[
        bool,
        typer.Option("--learned/--no-learned", help="Put what runs learned in place of a machine file's constants."),
    ] = True,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw a picture (.png or .svg): time per token against tokens per pass, cost against model size, "
            "latency against devices.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the predicted timeline in the Chrome trace format (opens in Perfetto)."
        ),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Predict every way to run a model, before running it.

    Names the fastest way that fits, what it waits for, the tokens per pass below which more tokens are free, and what
    would help.
    """
    if plot is not None:
        from headrace.cli.plot import check_plot_path

        check_plot_path(plot)
    if trace is not None:
        check_writable(trace, option="--trace")
    output = Output(as_json=as_json, quiet=quiet)
    request = PlanRequest(
        memory=memory,
        host_memory=host_memory,
        device=device,
        batch=batch,
        prompt_tokens=prompt_tokens,
        generate_tokens=generate_tokens,
        strategy=strategy,
        dtype=dtype.value,
        read_limit=read_limit,
        cpu_blocks=cpu_blocks,
        cache_on_host=cache_on_host,
        draft_tokens=draft_tokens,
        acceptance=acceptance,
        expert_hit_rate=expert_hit_rate,
        fresh=fresh,
    )
    changes = ModelChanges(weights=weights, kv_bits=kv_bits)
    with output.reserved():
        if machine is None:
            require_run_libraries("measuring this machine (or name one: --machine 8xh100)")
        with _measuring(output) if machine is None else contextlib.nullcontext():
            answer = plan_answer(
                model, machine=machine, request=request, changes=changes, sampling=sampling, learned=learned
            )
        _draw(output, answer, plot=plot, trace=trace)
        if output.as_json:
            output.json(answer_json(answer, version=__version__))
        else:
            show_plan(output, answer)


@contextlib.contextmanager
def _measuring(output: Output) -> Iterator[None]:
    with output.to_stderr.status("measuring the disk and one layer ..."):
        load_run_libraries()
        yield


def _draw(output: Output, answer: PlanAnswer, *, plot: Path | None, trace: Path | None) -> None:
    """Write the pictures and the timeline that were asked for."""
    best = answer.best
    for option, path in (("--plot", plot), ("--trace", trace)):
        if path is not None and best is None:
            output.note(f"{option} {path}: nothing fits, so there is nothing to draw")
    if plot is not None and (best is not None or not answer.scenario.is_calibrated):
        from headrace.cli.plot import draw_plan

        draw_plan(plot, answer)
    if trace is not None and best is not None:
        write_trace(trace, predicted=timeline_of(best, answer.scenario))


PLAN = Command("plan", plan, EXAMPLES)
