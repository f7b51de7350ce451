"""`headrace models`: what the catalogue knows of models, with sources; and those that are on this disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.command import Command, load_run_libraries, require_run_libraries
from headrace.cli.options import JsonOption, QuietOption
from headrace.cli.output import Output
from headrace.cli.table import Table
from headrace.errors import DependencyError, InvalidRequestError
from headrace.model.catalogue import ModelEntry, find_model, model_entries
from headrace.model.model import Model
from headrace.paths import user_path
from headrace.planning.answer_json import model_json
from headrace.units import format_bytes, format_count, format_number

if TYPE_CHECKING:
    from headrace.inference.sources.on_disk import StoredHere, Verdict

EXAMPLES = (
    "headrace models",
    "headrace models deepseek-v3",
    "headrace models 'gpt-3*1000' --json",
    "headrace models --here --dir /mnt/models",
)


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="One model in detail: a name, a scaled name, a config.json, a checkpoint, a .gguf."
        ),
    ] = None,
    *,
    here: Annotated[
        bool,
        typer.Option(
            "--here",
            help="Those on this disk, in the hub's cache, in headrace's and in --dir, with their sizes, and whether "
            "they run here.",
        ),
    ] = False,
    directories: Annotated[
        list[Path] | None,
        typer.Option(
            "--dir", metavar="DIR", help="With --here: look there and below, too; may be given several times."
        ),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the models that planning knows by name, describe one, or list those on this disk."""
    output = Output(as_json=as_json, quiet=quiet)
    if directories and not here:
        raise InvalidRequestError("--dir says where to look for models on this disk; give --here as well")
    if here:
        if name is not None:
            raise InvalidRequestError(f"--here lists what is on this disk; leave out {name}, or --here")
        with output.reserved():
            _show_here(output, directories or [])
    elif name is not None:
        model = find_model(name)
        output.json(model_json(model)) if as_json else _show_one(output, model)
    elif as_json:
        output.json({"models": [entry_json(entry) for entry in model_entries()]})
    else:
        _show_all(output)


def entry_json(entry: ModelEntry) -> dict[str, Any]:
    """Describe a catalogue entry: its layers and the names that it goes by."""
    return {**model_json(entry.model()), "name": entry.name, "aliases": list(entry.aliases)}


def _show_all(output: Output) -> None:
    rows = []
    for entry in model_entries():
        model = entry.model()
        experts = any(group.layer.num_experts for group in model.groups)
        rows.append(
            [
                entry.name,
                format_number(model.parameters),
                format_number(model.active_parameters) if experts else "",
                str(model.num_layers),
                format_count(model.hidden_size),
                format_bytes(model.weights_bytes),
                model.weight_format,
                format_bytes(model.kv_bytes_per_token()),
                format_count(model.context_tokens),
            ]
        )
    columns = ("model", "parameters", "active", "layers", "width", "weights", "format", "KV per token", "context")
    output.show(
        Table(columns=columns, rows=rows, least=("width", "layers", "format", "active", "KV per token")),
        "Scale one with NAME*1000, change its weights with NAME@int4; `headrace models NAME` tells its source.",
    )


def _show_one(output: Output, model: Model) -> None:
    output.show(
        f"{model.name}: {format_number(model.parameters)} parameters, {format_number(model.active_parameters)} used by "
        "a token",
        f"{format_bytes(model.weights_bytes)} of weights ({model.weight_format}), "
        f"{format_bytes(model.kv_bytes_per_token())} of KV cache per token, {format_count(model.context_tokens)} "
        "tokens at most\n",
    )
    rows = [
        [
            f"{group.count} layers",
            format_number(group.layer.parameters),
            format_bytes(group.layer.size_bytes),
            f"{group.layer.query_heads} / {group.layer.kv_heads}",
            f"{group.layer.experts_per_token} of {group.layer.num_experts}" if group.layer.num_experts else "",
            format_count(group.layer.window_tokens) if group.layer.window_tokens else "all",
        ]
        for group in model.groups
    ]
    columns = ("", "parameters each", "bytes each", "heads / KV heads", "experts", "tokens seen")
    output.show(Table(columns=columns, rows=rows), "")
    output.show(f"source: {model.source}", *(f"note: {note}" for note in model.notes), hanging=2)


def _show_here(output: Output, directories: Sequence[Path]) -> None:
    from headrace.inference.sources.on_disk import Verdict, find_stored, judged, known_places

    folders = [user_path(directory) for directory in directories]
    for folder in folders:
        if not folder.is_dir():
            raise InvalidRequestError(f"--dir {folder}: there is no such directory")
    stored = find_stored(folders)
    missing = ""
    try:
        require_run_libraries("running a model")
    except DependencyError as error:
        missing = str(error)
    found = []
    with output.to_stderr.status("seeing whether they run here ..."):
        if stored and not missing:
            load_run_libraries()
        for entry in stored:
            found.append((entry, entry.described(), Verdict(why_not=missing) if missing else judged(entry)))
    if output.as_json:
        output.json({"here": [_here_json(*item) for item in found]})
        return
    if not found:
        places = ", ".join(str(place) for place in (*known_places().values(), *folders))
        output.show(f"no models in {places}; headrace pull OWNER/NAME fetches one, --dir DIR looks elsewhere")
        return
    rows = [
        [
            entry.name,
            format_bytes(entry.size_bytes),
            "" if model is None else model.weight_format,
            "" if model is None else format_number(model.parameters),
            "no" if verdict.why_not else "streamed" if verdict.streamed else "yes",
            entry.place,
        ]
        for entry, model, verdict in found
    ]
    columns = ("model", "on disk", "weights", "parameters", "runs here", "where")
    output.show(Table(columns=columns, rows=rows, least=("where", "parameters", "weights")), "")
    reasons: dict[str, list[str]] = {}
    for entry, _, verdict in found:
        reasons.setdefault(verdict.why_not, []).append(entry.name)
    output.show(*(f"{', '.join(names)}: {reason}" for reason, names in reasons.items() if reason), hanging=2)


def _here_json(entry: StoredHere, model: Model | None, verdict: Verdict) -> dict[str, Any]:
    return {
        "name": entry.name,
        "path": str(entry.path),
        "place": entry.place,
        "size_bytes": entry.size_bytes,
        "parameters": None if model is None else model.parameters,
        "weights_bytes": None if model is None else model.weights_bytes,
        "weight_format": None if model is None else model.weight_format,
        "runs_here": not verdict.why_not,
        "streamed": verdict.streamed,
        "why_not": verdict.why_not or None,
    }


MODELS = Command("models", models, EXAMPLES)
