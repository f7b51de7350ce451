"""`headrace models`: what the catalogue knows of models, with sources."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from headrace.cli.command import Command
from headrace.cli.options import JsonOption
from headrace.cli.output import Output
from headrace.cli.table import Table
from headrace.model.catalogue import ModelEntry, find_model, model_entries
from headrace.model.model import Model
from headrace.planning.answer_json import model_json
from headrace.units import format_bytes, format_count, format_number

EXAMPLES = ("headrace models", "headrace models deepseek-v3", "headrace models 'gpt-3*1000' --json")


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="One model in detail: a name, a scaled name, a config.json, a checkpoint, a .gguf."
        ),
    ] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """List the models that planning knows by name, or describe one."""
    output = Output(as_json=as_json)
    if name is not None:
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


MODELS = Command("models", models, EXAMPLES)
