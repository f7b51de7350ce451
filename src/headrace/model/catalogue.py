"""Models by name, scaled names, config files and checkpoints, each as a `Model`.

gpt-3              the catalogue (`models.toml`)
gpt-3*1000         scaled (`headrace.model.scaling`)
gpt-3*1000:depth=0.5    with another share of the growth in depth
llama-3-8b@int4    in another weight format; so Qwen3-8B-AWQ, Qwen3-8B-Q4_K_M
./config.json, a directory with one, a .gguf file
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from headrace.errors import CheckpointError, HeadraceError, InvalidRequestError, near_names
from headrace.model.config_fields import read_config, text_config
from headrace.model.formats import find_format, is_format, requantised
from headrace.model.from_config import MODEL_TYPES, model_from_config
from headrace.model.model import Model
from headrace.model.scaling import DEPTH_SHARE, scaled
from headrace.paths import user_path

_TRAILS = re.compile(
    r"-(instruct|chat|it|hf|base|gguf|mlx|awq|gptq|int4|int8|fp8|fp16|bf16|nvfp4|mxfp4|4bit|8bit|16bit|"
    r"q\d(?:-[01]|-k)?(?:-[sml]|-xl)?|v\d(?:\.\d)?|\d{4})$"
)
_SIZE = re.compile(r"(?<![a-z0-9.])(?:\d+x)?\d+(?:\.\d+)?[bm](?![a-z0-9])")


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model of the catalogue."""

    name: str
    aliases: tuple[str, ...]
    source: str
    config: Mapping[str, Any]

    def model(self) -> Model:
        """The model; the source says where the numbers come from."""
        made = model_from_config(self.config, name=self.name, origin=f"catalogue, {self.name}")
        notes = (self.source,) if self.source.startswith("APPROXIMATION") else ()
        return replace(made, source=self.source, notes=notes)


def find_model(text: str) -> Model:
    """Resolve a name or a path.

    Raises InvalidRequestError with near matches for what is unknown, and what the readers of files raise.
    """
    asked = text.strip()
    path = user_path(asked)
    if asked and path.exists():
        return _from_path(path)
    if asked.endswith((".json", ".gguf")) or asked.startswith((".", "/", "~")):
        raise CheckpointError(f"{asked} does not exist")
    body, _, weights = asked.partition("@")
    name, factor, depth_share = _parse_scaling(body)
    model = named_model(name)
    if factor is not None:
        model = scaled(model, factor, depth_share=depth_share)
    weights = weights or (model_key(name) not in _entries() and _format_in(name)) or ""
    if weights and find_format(weights).name != model.weight_format:
        model = replace(requantised(model, weights), name=f"{model.name}@{find_format(weights).name}")
    return model


def in_catalogue(text: str) -> bool:
    """Whether a name means a model of the catalogue."""
    try:
        return not user_path(text).exists() and bool(find_model(text))
    except HeadraceError:
        return False


def model_entries() -> tuple[ModelEntry, ...]:
    """All models, in the file's order."""
    return tuple({id(entry): entry for entry in _entries().values()}.values())


def model_key(name: str) -> str:
    """Bring a name into the form of the catalogue: lower case, dashes, no organisation, no file ending."""
    key = name.strip().lower().rsplit("/", 1)[-1].removesuffix(".gguf")
    key = re.sub(r"[\s_()]+", "-", key).strip("-")
    return re.sub(r"-+", "-", key)


def named_model(name: str) -> Model:
    """Resolve a catalogue name, also with what publishers add to it (-Instruct, -Q4_K_M.gguf).

    Formats in a name are left aside here: the model has the entry's own. `find_model` applies them.
    """
    known = _entries()
    key = model_key(name)
    tried = key
    while tried not in known:
        shorter = _TRAILS.sub("", tried)
        if shorter == tried:
            break
        tried = shorter
    if tried in known:
        return known[tried].model()
    ancestor = _ancestor(key, known)
    if ancestor is not None:
        made = ancestor.model()
        return replace(made, notes=(*made.notes, f"{name} is taken to have the shape of {ancestor.name}"))
    raise InvalidRequestError(
        f"there is no model {name!r} in the catalogue; {near_names(key, known)}`headrace models` lists them"
    )


def _ancestor(key: str, known: Mapping[str, ModelEntry]) -> ModelEntry | None:
    """The model that a fine-tuned one descends from: its name stands in the other's, and every size that follows."""
    found = [alias for alias in known if len(alias) > 6 and re.search(rf"(?:^|-){re.escape(alias)}(?:-|$)", key)]
    if not found:
        return None
    alias = max(found, key=len)
    left = set(_SIZE.findall(key)) - set(_SIZE.findall(alias))
    return known[alias] if _SIZE.search(alias) and not left else None


def _format_in(name: str) -> str | None:
    """The weight format that a publisher's name ends in (-4bit, -AWQ, -Q4_K_M.gguf), if any."""
    key = model_key(name)
    while True:
        match = _TRAILS.search(key)
        if match is None:
            return None
        text = match[1].replace("-", "_")
        if is_format(text):
            return text
        key = key[: match.start()]


def _parse_scaling(text: str) -> tuple[str, float | None, float]:
    name, star, rest = text.partition("*")
    if not star:
        return text, None, DEPTH_SHARE
    number, _, option = rest.partition(":")
    try:
        factor = float(number)
    except ValueError:
        raise InvalidRequestError(f"{text!r}: {number!r} is no factor; write for instance gpt-3*1000") from None
    if not option:
        return name, factor, DEPTH_SHARE
    key, _, value = option.partition("=")
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if key != "depth" or not 0 <= share <= 1:
        raise InvalidRequestError(
            f"{text!r}: {option!r} is no rule; depth=SHARE is one, with the share of the growth that goes into depth "
            f"between 0 and 1 ({DEPTH_SHARE:.3g} without it)"
        )
    return name, factor, share


def _from_path(path: Path) -> Model:
    if path.is_file() and path.suffix.lower() == ".gguf":
        from headrace.model.from_gguf import model_from_gguf

        return model_from_gguf(path)
    if path.is_dir():
        weights = [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]
        if weights:
            from headrace.model.from_index import model_from_checkpoint

            return model_from_checkpoint(path)
        files = sorted(path.glob("*.gguf"))
        if files:
            return _from_path(files[0])
        config = path / "config.json"
        if not config.is_file():
            raise CheckpointError(f"{path} has no config.json, no safetensors and no .gguf file")
        return model_from_config(read_config(config), name=path.resolve().name, origin=str(config))
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    raw = read_config(path)
    made = model_from_config(raw, name=name or path.stem, origin=str(path))
    levels = (raw, text_config(raw, MODEL_TYPES))
    if any(level.get(key) for level in levels for key in ("torch_dtype", "dtype", "quantization_config")):
        return made
    return replace(
        made,
        notes=(
            *made.notes,
            f"{path.name} names no dtype, so weights are taken as {made.weight_format}; --weights names another format",
        ),
    )


@functools.cache
def _entries() -> dict[str, ModelEntry]:
    text = resources.files("headrace.model").joinpath("models.toml").read_text(encoding="utf-8")
    found: dict[str, ModelEntry] = {}
    for raw in tomllib.loads(text)["model"]:
        entry = ModelEntry(name=raw["name"], aliases=tuple(raw["aliases"]), source=raw["source"], config=raw["config"])
        for alias in {model_key(name) for name in (entry.name, *entry.aliases)}:
            if alias in found:
                raise InvalidRequestError(f"the catalogue has two models {alias!r}")
            found[alias] = entry
    return found
