"""Find the checkpoint that a MODEL argument means: a directory, or a hub id where a hub can be reached."""

from __future__ import annotations

import re
from pathlib import Path

from headrace.errors import CheckpointError
from headrace.inference.sources.hub import fetch
from headrace.model.catalogue import in_catalogue
from headrace.paths import user_path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model(model: str | Path) -> Path:
    """Return the checkpoint's directory; downloads a hub id.

    Raises CheckpointError where there is nothing of that name, for a lone GGUF file, for a name of the catalogue, or
    when the hub does not answer.
    """
    path = user_path(model)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        raise CheckpointError(
            f"{path} is a GGUF file, which headrace does not stream yet; transformers can turn it into safetensors "
            "(from_pretrained with GgufConfig(dequantize=True), then save_pretrained)"
        )
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json and the safetensors files")
    text = str(model)
    if not HUB_ID.fullmatch(text):
        if in_catalogue(text):
            raise CheckpointError(
                f"there is no directory {text}; {text} is a catalogue entry: it can be planned (headrace plan {text} "
                "--machine NAME) but there are no weights to run; give a checkpoint directory or a hub id"
            )
        raise CheckpointError(f"there is no directory {text}, and {text!r} is no hub id (those look like owner/name)")
    try:
        return fetch(text).directory
    except CheckpointError as error:
        planned = f"; headrace plan {text} --machine NAME needs no weights" if in_catalogue(text) else ""
        raise CheckpointError(f"there is no directory {text}, and from the hub: {error}{planned}") from error
