"""`headrace run`: generate text, streaming it as it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrace.accuracy.history_file import add_to_history
from headrace.cli.command import Command
from headrace.cli.options import (
    CacheOnHostOption,
    CpuBlocksOption,
    DeviceOption,
    DtypeChoice,
    DtypeOption,
    FreshOption,
    HostMemoryOption,
    JsonOption,
    MemoryOption,
    ModelArgument,
    ModelDefaultsOption,
    QuietOption,
    ReadLimitOption,
    StrategyChoice,
    StrategyOption,
    TrustOption,
    read_machine,
)
from headrace.cli.output import Output, check_writable, write_trace
from headrace.cli.prompt import read_prompts
from headrace.cli.run_report import draft_summary, record_of, run_json, run_summary, run_table
from headrace.cli.run_session import DEFAULT_DRAFT_TOKENS, DEFAULT_NEW_TOKENS, RunRequest, RunResult, perform
from headrace.cli.sampling import Sampling
from headrace.inference.load_options import LoadOptions

EXAMPLES = (
    "headrace run ./my-model --memory 4GiB --prompt 'Name three rivers.'",
    "headrace run ./my-model --prompt-file ask.txt --temperature 0.7 --seed 1",
    "cat question.txt | headrace run ./my-model --quiet > answer.txt",
    "headrace run ./my-model --prompt 'Red is' --prompt 'The sea is' --no-chat",
    "headrace run ./my-70b --device cuda --memory 40GiB --prompt 'Two rivers.'",
)


def run(
    model: ModelArgument,
    *,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="What to go on from; - is standard input, which is read without this option too where something is "
            "piped to it. Given several times: a batch, whose texts are shown at the end.",
        ),
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Read the prompt from a file; - is standard input.")
    ] = None,
    memory: MemoryOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help=f"Stop after this many new tokens.  [default: {DEFAULT_NEW_TOKENS}]")
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Do not end the text before this many new tokens.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the model's end of text, up to --max-new-tokens.")
    ] = False,
    model_defaults: ModelDefaultsOption = True,
    device: DeviceOption = "auto",
    host_memory: HostMemoryOption = None,
    cpu_blocks: CpuBlocksOption = False,
    cache_on_host: CacheOnHostOption = False,
    compile_layers: Annotated[
        bool,
        typer.Option(
            "--compile", help="Fuse small operations with torch.compile (slow start; results may differ in rounding)."
        ),
    ] = False,
    strategy: StrategyOption = StrategyChoice.AUTO,
    dtype: DtypeOption = DtypeChoice.AUTO,
    read_limit: ReadLimitOption = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the model's chat template around the prompt, or not. Without either: if the tokenizer has one.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message for the chat template.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="X", help="Draw tokens at this temperature; 0 is greedy.", show_default=False),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="X", help="Draw from the likeliest tokens that make up this share.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(metavar="N", help="Draw from the N likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Make the draws repeatable.")] = None,
    num_beams: Annotated[int, typer.Option(metavar="N", help="Beam search; the text is shown at the end.")] = 1,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="Check several drafted tokens in each pass, as many as pay. lookup: drafts repeat what followed the "
            "same words before; a model: a small one of the same family, kept in memory.",
            show_default=False,
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Drafted tokens in a pass, at most.  [default: {DEFAULT_DRAFT_TOKENS}]"),
    ] = None,
    greedy: Annotated[
        bool,
        typer.Option(
            "--greedy",
            help="Take the likeliest token each time: the default unless --temperature, --top-p or --top-k is given.",
        ),
    ] = False,
    machine: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What headrace probe found: how best to read the disk, how fast a GPU is.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the measured and the predicted timeline as a Chrome trace (for Perfetto)."
        ),
    ] = None,
    fresh: FreshOption = False,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Generate text with a model bigger than its memory.

    The text goes to standard output as it comes, progress to standard error. Decoding is greedy unless --temperature,
    --top-p or --top-k is given. At the end, predicted times stand next to the measured ones.
    """
    request = RunRequest(
        model=model,
        prompts=read_prompts(prompt, prompt_file),
        options=LoadOptions(
            memory=memory,
            device=device,
            host_memory=host_memory,
            cpu_blocks=cpu_blocks,
            cache_on_host=cache_on_host,
            compile_layers=compile_layers,
            strategy=strategy.value,
            dtype=dtype.value,
            read_limit=read_limit,
            machine=read_machine(machine),
            trust_remote_code=trust_remote_code,
            fresh=fresh,
            draft_tokens=(0 if draft is None else DEFAULT_DRAFT_TOKENS) if draft_tokens is None else draft_tokens,
        ),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        sampling=Sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, num_beams=num_beams, greedy=greedy
        ),
        chat=chat,
        system=system,
        ignore_eos=ignore_eos,
        model_defaults=model_defaults,
        draft=draft,
    )
    if trace is not None:
        check_writable(trace, option="--trace")
    output = Output(as_json=as_json, quiet=quiet)
    with output.reserved():
        show_run(request, output, trace=trace)


def show_run(request: RunRequest, output: Output, *, trace: Path | None = None) -> RunResult:
    """Perform a run and report it, as one object or as text and table."""
    result = perform(request, output, stream_text=not output.as_json)
    streamed = len(result.texts) == 1 and request.sampling.num_beams == 1
    if output.as_json:
        output.json(run_json(result))
    elif streamed:
        output.text("" if result.texts[0].endswith("\n") else "\n")
    else:
        for text, prompt in zip(result.texts, request.prompts, strict=True):
            output.text(f"--- {' '.join(prompt.split())[:70]}\n{text}\n" if len(result.texts) > 1 else f"{text}\n")
    output.note(run_table(result), run_summary(result), *result.warnings)
    if result.drafted is not None:
        output.note(draft_summary(result.drafted))
    remark = add_to_history(record_of(request, result))
    if remark is not None:
        output.note(remark)
    if trace is not None:
        write_trace(trace, measured=result.handle.timeline(), predicted=result.handle.predicted_timeline())
        output.note(f"trace: {trace} (open it in Perfetto)")
    return result


RUN = Command("run", run, EXAMPLES)
