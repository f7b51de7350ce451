"""`headrace batch`: answer a file of requests, many of them in each pass over the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.batch_progress import BatchProgress
from headrace.cli.command import Command, load_run_libraries, require_run_libraries
from headrace.cli.options import (
    DtypeChoice,
    DtypeOption,
    FreshOption,
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
from headrace.cli.output import Output
from headrace.cli.prompt import load_tokenizer
from headrace.cli.run_progress import displayed
from headrace.errors import InvalidRequestError
from headrace.inference.batching.job_request import BatchJobRequest
from headrace.inference.load_options import LoadOptions
from headrace.inference.sources.model_source import resolve_model

if TYPE_CHECKING:
    from headrace.inference.batching.start import BatchResult

EXAMPLES = (
    "headrace batch ./my-model questions.jsonl answers.jsonl --memory 8GiB",
    "headrace batch ./my-model questions.jsonl answers.jsonl --dry-run",
    """echo '{"custom_id": "a", "prompt": "The sea is"}' > in.jsonl""",
)


def batch(
    model: ModelArgument,
    input_file: Annotated[
        Path,
        typer.Argument(
            metavar="IN.jsonl",
            help='Requests: OpenAI Batch format, or lines such as {"prompt": "…"}.',
        ),
    ],
    output_file: Annotated[
        Path,
        typer.Argument(metavar="OUT.jsonl", help="Answers are appended here; a job that was broken off goes on here."),
    ],
    *,
    memory: MemoryOption = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Length of answers to requests that do not say how long.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(metavar="X", help="Temperature of requests that do not name one; 0 is greedy.")
    ] = 0.0,
    model_defaults: ModelDefaultsOption = True,
    in_flight: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Sequences in flight at most. Without it: the fastest by prediction.",
            show_default=False,
        ),
    ] = None,
    pass_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens of a pass at most. Without it: as above.", show_default=False),
    ] = None,
    answer_share: Annotated[
        float,
        typer.Option(
            metavar="X", help="For the prediction: part of their longest length that answers use, on average."
        ),
    ] = 1.0,
    strategy: StrategyOption = StrategyChoice.AUTO,
    dtype: DtypeOption = DtypeChoice.AUTO,
    read_limit: ReadLimitOption = None,
    machine: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Read with the chunk size and threads found best by headrace probe."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read, measure, plan and predict the job, and do not begin it.")
    ] = False,
    fresh: FreshOption = False,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a file of requests; every pass over the weights carries tokens of many of them.

    Requests join and leave at any pass, prompts are computed in chunks beside the answers of others, and beginnings
    that requests have in common are computed once. Requests without temperature, top_p or top_k are answered greedily.
    The same command started again goes on where a job was broken off.
    """
    request = BatchJobRequest(
        model=model,
        input=input_file,
        output=output_file,
        options=LoadOptions(
            memory=memory,
            strategy=strategy.value,
            dtype=dtype.value,
            read_limit=read_limit,
            machine=read_machine(machine),
            trust_remote_code=trust_remote_code,
            fresh=fresh,
        ),
        max_tokens=max_tokens,
        temperature=temperature,
        model_defaults=model_defaults,
        in_flight=in_flight,
        pass_tokens=pass_tokens,
        answer_share=answer_share,
        dry_run=dry_run,
    )
    output = Output(as_json=as_json, quiet=quiet)
    if as_json and output.goes_to(output_file):
        raise InvalidRequestError(f"--json needs standard output for itself; give another OUT.jsonl than {output_file}")
    with output.reserved():
        result = _perform(request, output)
        from headrace.cli.batch_report import batch_json, batch_summary, batch_table

        if as_json:
            output.json(batch_json(request, result))
        if result.tally is not None:
            output.note(batch_table(result))
        if not dry_run:
            output.note(batch_summary(request, result))
    if result.nothing_answered:
        raise InvalidRequestError(
            f"none of the {result.requests} requests could be answered; correct what their errors name"
        )


def _perform(request: BatchJobRequest, output: Output) -> BatchResult:
    require_run_libraries("running a model")
    directory = resolve_model(request.model)
    progress = BatchProgress(f"loading {request.model}: reading its index and its tokenizer", output.note)
    with displayed(progress, output):
        load_run_libraries()
        from headrace.inference.batching.start import start_job
        from headrace.streaming.checkpoint import Checkpoint

        checkpoint = Checkpoint(directory)
        try:
            tokenizer = load_tokenizer(directory, trust_remote_code=request.options.trust_remote_code)
            return start_job(request, checkpoint, tokenizer, progress)
        finally:
            checkpoint.close()


BATCH = Command("batch", batch, EXAMPLES)
