"""`headrace plan`: predict every strategy, recommend one, say what binds and what would help."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.accuracy.history import learn
from headrace.cli.command import Command
from headrace.cli.dependencies import require_run_libraries
from headrace.cli.history_file import read_history
from headrace.cli.machine_plan import MachineAsked, plan_for_machine
from headrace.cli.options import (
    CacheOnHostOption,
    CpuBlocksOption,
    DtypeChoice,
    DtypeOption,
    JsonOption,
    MemoryOption,
    ReadLimitOption,
)
from headrace.cli.output import Output
from headrace.errors import InvalidRequestError, near_names
from headrace.inference.model_source import resolve_model
from headrace.machine.catalogue import find_machine
from headrace.machine.machine import Machine
from headrace.model.catalogue import find_model
from headrace.model.formats import requantised
from headrace.planning.plan import Strategy
from headrace.planning.strategies import STRATEGIES
from headrace.planning.workload import Speculation, Workload
from headrace.units import parse_size

if TYPE_CHECKING:
    from headrace.cli.planning_case import Asked

EXAMPLES = (
    "headrace plan ./my-model --memory 4GiB",
    "headrace plan ./my-model --memory 4GiB --machine machine.toml --json",
    "headrace plan ./my-70b --device cuda --memory 40GiB --host-memory 100GiB",
    "headrace plan ./my-70b --machine machine.toml --device cuda:0 --cpu-blocks",
    "headrace plan gpt-3 --machine 8xa100-80 --batch 64",
    "headrace plan llama-3.1-405b --machine rtx-4090 --weights int4 --prompt-tokens 500",
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
            help="What each computer's host memory may hold of the model: beside a GPU the blocks that do not fit on "
            "it. Without it: what there is, less a reserve.",
            show_default=False,
        ),
    ] = None,
    cpu_blocks: CpuBlocksOption = False,
    cache_on_host: CacheOnHostOption = False,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences at once, over all devices.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each prompt.")] = 16,
    generate_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="New tokens of each sequence.")] = 32,
    strategy: Annotated[
        str, typer.Option(metavar="NAME", help=f"auto: compare all. Or one of: {', '.join(STRATEGIES)}.")
    ] = "auto",
    weights: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Weights in another format: fp16, fp8, int8, int4, q4_k_m, ...")
    ] = None,
    kv_bits: Annotated[int | None, typer.Option(metavar="N", min=1, max=32, help="Bits of a KV cache element.")] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Speculative decoding: draft tokens per sequence and pass.")
    ] = None,
    acceptance: Annotated[
        float, typer.Option(metavar="SHARE", min=0, max=1, help="Probability that a draft token is accepted.")
    ] = 0.7,
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
    as_json: JsonOption = False,
) -> None:
    """Predict every way to run a model, before running it.

    Names the fastest way that fits, what it waits for, the tokens per pass below which more tokens are free, and what
    would help.
    """
    workload = Workload(sequences=batch, prompt_tokens=prompt_tokens, generate_tokens=generate_tokens)
    _check_strategy(strategy)
    if plot is not None:
        from headrace.cli.plot import check_plot_path

        check_plot_path(plot)
    output = Output(as_json=as_json)
    described = None if machine is None else _describe(machine)
    extras = {
        "--weights": weights,
        "--kv-bits": kv_bits,
        "--draft-tokens": draft_tokens,
        "--expert-hit-rate": expert_hit_rate,
        "--sampling": sampling,
    }
    wanted = [name for name, value in extras.items() if value is not None]
    if _is_checkpoint(model) and (described is None or described.is_calibrated) and not wanted:
        from headrace.cli.planning_case import Asked  # not at the top: `--help` would wait for the planner

        asked = Asked(
            memory=memory,
            workload=workload,
            strategy=None if strategy == "auto" else _runtime_strategy(strategy),
            dtype=None if dtype is DtypeChoice.AUTO else dtype.value,
            read_limit=read_limit,
            device=device,
            host_memory=host_memory,
            cpu_blocks=cpu_blocks,
            cache_on_host=cache_on_host,
        )
        if described is not None and learned:
            described, taught_by_runs = learn(described, read_history())
            for sentence in taught_by_runs:
                output.note(f"{sentence} (--no-learned keeps the file's)")
        _plan_checkpoint(model, described, asked, origin=machine or "", plot=plot, output=output)
        return
    _refuse_for_shapes(
        described,
        dtype=dtype is not DtypeChoice.AUTO,
        read_limit=read_limit is not None,
        device=device,
        cpu_blocks=cpu_blocks,
        cache_on_host=cache_on_host,
    )
    with output.reserved():
        if described is None:
            require_run_libraries(f"measuring this machine (or name one: --machine 8xh100; {', '.join(wanted)})")
            with output.to_stderr.status("measuring this machine ..."):
                described = _measure_here(device)
        if described.is_calibrated:
            described = described.on("auto" if machine is None else device, origin=machine or "")
        found = find_model(model)
        if weights is not None:
            found = requantised(found, weights)
        if kv_bits is not None:
            found = found.with_kv_element_bytes(kv_bits / 8)
        drafts = None if draft_tokens is None else Speculation(draft_tokens=draft_tokens, acceptance=acceptance)
        plan_for_machine(
            output,
            MachineAsked(
                model=found,
                machine=described,
                work=workload,
                memory_bytes=None if memory is None else parse_size(memory),
                host_memory_bytes=None if host_memory is None else parse_size(host_memory),
                strategy=None if strategy == "auto" else strategy,
                speculation=drafts,
                expert_hit_rate=expert_hit_rate,
                sampling=sampling,
                plot=plot,
            ),
        )


def _plan_checkpoint(
    model: str,
    described: Machine | None,
    asked: Asked,
    *,
    origin: str,
    plot: Path | None,
    output: Output,
) -> None:
    from headrace.cli.plan_report import plan_json, recommended, show_plan
    from headrace.planning.planner import compare

    with output.reserved():
        if described is not None:
            from headrace.cli.planning_case import from_description

            case = from_description(resolve_model(model), asked, described, origin=origin)
        else:
            require_run_libraries("measuring this machine (without --machine FILE)")
            directory = resolve_model(model)
            with output.to_stderr.status("measuring the disk and one layer ..."):
                from headrace.cli.planning_case import measured_here

                case = measured_here(directory, asked)
        compared = compare(case.scenario, asked.strategy)
        best = recommended(compared)
        if plot is not None and best is None:
            output.note(f"--plot {plot}: nothing fits, so there is nothing to draw")
        elif plot is not None and best is not None:
            from headrace.cli.plot import draw_checkpoint_plan

            draw_checkpoint_plan(plot, case, best)
        if output.as_json:
            output.json(plan_json(case, compared, best))
        else:
            show_plan(output, case, compared, best)


def _describe(text: str) -> Machine:
    """A machine file, or a name from the catalogue."""
    path = Path(text).expanduser()
    if not path.is_file() and (path.suffix == ".toml" or "/" in text):
        raise InvalidRequestError(f"--machine {text}: there is no such file")
    return find_machine(text)


def _is_checkpoint(model: str) -> bool:
    """Whether MODEL is a directory with weights, or a hub id that is to be fetched: what the runtime can run."""
    path = Path(model).expanduser()
    if path.is_dir():
        return any(path.glob("*.safetensors")) or not (path / "config.json").is_file()
    if path.is_file():
        return False
    return "/" in model and not _known(model)


def _known(model: str) -> bool:
    try:
        find_model(model)
    except Exception:
        return False
    return True


def _check_strategy(name: str) -> None:
    if name != "auto" and name not in STRATEGIES:
        raise InvalidRequestError(
            f"--strategy {name}: there is no such strategy; {near_names(name, STRATEGIES)}known: auto, "
            + ", ".join(STRATEGIES)
        )


def _runtime_strategy(name: str) -> Strategy:
    if name not in {item.value for item in Strategy}:
        raise InvalidRequestError(
            f"--strategy {name}: a checkpoint on one computer runs as {', '.join(Strategy)}; for other strategies name "
            "a machine that can do them (--machine 8xh100)"
        )
    return Strategy(name)


def _refuse_for_shapes(
    described: Machine | None,
    *,
    dtype: bool,
    read_limit: bool,
    device: str,
    cpu_blocks: bool,
    cache_on_host: bool,
) -> None:
    """Refuse what only the runtime's own planner heeds, where a model is planned by its shape."""
    compared_anyhow = "here what the host computes, and keys and values that wait there, are compared anyhow"
    for name, given, instead in (
        ("--dtype", dtype, "here use --weights, or a machine file with that link"),
        ("--read-limit", read_limit, "here use --weights, or a machine file with that link"),
        ("--cpu-blocks", cpu_blocks, compared_anyhow),
        ("--cache-on-host", cache_on_host, compared_anyhow),
    ):
        if given:
            raise InvalidRequestError(
                f"{name} applies to a checkpoint on the machine at hand or on one that `headrace probe` measured; "
                f"{instead}"
            )
    if described is not None and not described.is_calibrated and device != "auto":
        raise InvalidRequestError(
            f"--device {device} applies to the machine at hand or to one that `headrace probe` measured; "
            f"{described.name} computes on its own devices"
        )


def _measure_here(device: str) -> Machine:
    from headrace.inference.api import probe

    return probe(device=device)


PLAN = Command("plan", plan, EXAMPLES)
