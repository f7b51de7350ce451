"""Arguments and options that several commands share, written once."""

from __future__ import annotations

import math
import re
from enum import StrEnum, auto
from pathlib import Path
from typing import Annotated

import typer

from headrace.errors import InvalidRequestError
from headrace.machine.machine import Machine
from headrace.machine.machine_file import load_machine
from headrace.paths import is_given, user_path
from headrace.planning.workload import DEFAULT_WORKLOAD

_WORDS = {
    "": 1.0,
    "k": 1e3,
    "thousand": 1e3,
    "m": 1e6,
    "million": 1e6,
    "b": 1e9,
    "bn": 1e9,
    "billion": 1e9,
    "t": 1e12,
    "tn": 1e12,
    "trillion": 1e12,
}
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})(?:\.[0-9]{0,40})?|\.[0-9]{1,40}"
_NUMBER = re.compile(rf"([+-]?(?:{_DIGITS})(?:[eE][+-]?[0-9]{{1,3}})?)\s*([A-Za-z]*)")


class StrategyChoice(StrEnum):
    """Values of `--strategy`."""

    AUTO = "auto"
    RESIDENT = "resident"
    SEQUENTIAL = "sequential"
    OVERLAP = "overlap"


class DtypeChoice(StrEnum):
    """Values of `--dtype`."""

    AUTO = "auto"
    FLOAT32 = auto()
    BFLOAT16 = auto()
    FLOAT16 = auto()


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory of a Hugging Face checkpoint (used in place), or a hub id.")
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What weights, KV cache and work space may take together (800MB, 2GiB, 2G) of the computing device's "
        "memory, beyond the interpreter and its libraries. Without it: what is free now, less a reserve.",
    ),
]
StrategyOption = Annotated[
    StrategyChoice,
    typer.Option(
        help="auto: the fastest by prediction; resident: all weights in memory; sequential: load a block, compute it, "
        "drop it; overlap: load the next blocks while one computes."
    ),
]
DtypeOption = Annotated[
    DtypeChoice, typer.Option(help="What is computed in. auto: the stored dtype or float32, whichever is faster here.")
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Who computes: cpu, cuda, cuda:1. auto: what HEADRACE_DEVICE names, else the first GPU, else the cpu.",
    ),
]
HostMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="With a GPU: host memory for blocks that do not fit on it, page-locked where possible; what does not fit "
        "there either comes from the disk. Without it: what is free now, less a reserve.",
        show_default=False,
    ),
]
CpuBlocksOption = Annotated[
    bool,
    typer.Option(
        "--cpu-blocks",
        help="With a GPU: let the CPU compute some layers from host memory, where that is predicted to be "
        "faster. Results then differ from the GPU's own in rounding.",
    ),
]
CacheOnHostOption = Annotated[
    bool,
    typer.Option("--cache-on-host", help="With a GPU: keep keys and values in host memory if they do not fit on it."),
]
ReadLimitOption = Annotated[
    str | None, typer.Option(metavar="RATE", help="Read no faster than this (500MB/s, 1GiB/s), to try a slower disk.")
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Measure this machine again, whatever an earlier start measured.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model, where it has some.")
]
ModelDefaultsOption = Annotated[
    bool,
    typer.Option(
        "--model-defaults/--no-model-defaults",
        help="Follow the penalties, stop texts and ways of drawing of the model's generation_config.json, or not.",
        show_default=False,
    ),
]
PromptTokensOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help=f"Tokens of each prompt. Without it: {DEFAULT_WORKLOAD.prompt_tokens}, or what the context leaves.",
    ),
]
GenerateTokensOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help=f"New tokens of each. Without it: {DEFAULT_WORKLOAD.generate_tokens}, or what the context leaves.",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="One JSON object on standard output, nothing else there; progress on standard error."),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no remarks on standard error, errors alone.")
]


def existing_file(path: Path | None, *, option: str) -> Path | None:
    """Return the path; raises InvalidRequestError where it is not a file."""
    if path is None:
        return None
    found = user_path(path)
    if not is_given(found):
        raise InvalidRequestError(f"{option} {path}: there is no such file")
    return found


def read_machine(path: Path | None) -> Machine | None:
    """The machine that `--machine FILE` describes, if it was given."""
    found = existing_file(path, option="--machine")
    return None if found is None else load_machine(found)


def parse_count(text: str, *, option: str) -> float:
    """Return the number that `text` means; raises InvalidRequestError unless it is finite and above 0."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise InvalidRequestError(f"{option} {text!r} is not a number; write for instance 8e9, 8 billion or 250000")
    word = match[2].lower()
    if word not in _WORDS:
        raise InvalidRequestError(
            f"{option} {text!r} has an unknown word {match[2]!r}; use thousand, million, billion or trillion"
        )
    number = float(match[1].replace(",", "")) * _WORDS[word]
    if not 0 < number < math.inf:
        raise InvalidRequestError(f"{option} {text!r} is not valid; it must be a number above 0")
    return number
