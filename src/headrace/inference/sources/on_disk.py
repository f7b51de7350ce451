"""Models on this disk, in the hub's cache, in headrace's own and in directories that are named; whether each runs here.

Whether it runs is not guessed from names: transformers builds the model without weights, as a run does before it reads
them. That takes torch and a second or so; what is found, and how large it is, takes neither.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from headrace.errors import HeadraceError
from headrace.model.catalogue import find_model
from headrace.model.model import Model
from headrace.paths import user_directory, user_path
from headrace.streaming.system_memory import default_budget_bytes
from headrace.units import format_bytes

_GGUF = (
    "headrace plans GGUF files (headrace plan FILE) and does not run them; transformers turns one into safetensors: "
    "AutoModelForCausalLM.from_pretrained(DIRECTORY, gguf_file=FILE).save_pretrained(NEW_DIRECTORY)"
)
_DEEPEST = 4
"""folders below one that is named, as far as models are looked for"""
_WEIGHTS = (".safetensors", ".gguf", ".bin")
_OF_A_CHECKPOINT = (".safetensors", ".safetensors.index.json", ".bin")
_FURTHER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


class StoredHere(NamedTuple):
    """A checkpoint's directory or a GGUF file."""

    name: str
    path: Path
    place: str
    """what it was found in, in words"""

    @property
    def size_bytes(self) -> int:
        """Bytes of its files of weights; links are followed."""
        return sum(path.stat().st_size for path in self._weights() if path.is_file())

    def _weights(self) -> list[Path]:
        if self.path.is_dir():
            return [path for path in self.path.iterdir() if path.suffix in _WEIGHTS]
        parts = re.sub(r"-00001-of-(\d{5})\.gguf$", r"-*-of-\1.gguf", self.path.name)
        return [path for path in self.path.parent.iterdir() if path.match(parts)] if "*" in parts else [self.path]

    def described(self) -> Model | None:
        """What planning knows of it; None where its files are not whole."""
        try:
            return find_model(str(self.path.absolute()))
        except HeadraceError:
            return None


class Verdict(NamedTuple):
    """Whether a model runs on this machine, with the memory that is free now."""

    why_not: str = ""
    streamed: bool = False
    """its weights do not fit into that memory all at once"""


def known_places() -> dict[str, Path]:
    """Where models lie without having been put there by name, in words."""
    return {"hub cache": _hub_cache(), "headrace's cache": user_directory("XDG_CACHE_HOME", "~/.cache") / "models"}


def find_stored(directories: Iterable[Path]) -> list[StoredHere]:
    """All models of the known places and of these directories, each once."""
    places = known_places()
    found = list(_in_hub_cache(places["hub cache"]))
    folders = [("headrace's cache", places["headrace's cache"]), *((str(folder), folder) for folder in directories)]
    for place, folder in folders:
        found += (StoredHere(path.name, path, place) for path in _below(folder, _DEEPEST))
    once: dict[Path, StoredHere] = {}
    for entry in found:
        once.setdefault(entry.path.resolve(), entry)
    return list(once.values())


def judged(stored: StoredHere) -> Verdict:
    """Whether it runs here. No error of a model's files, or of its class in transformers, ends the list."""
    if stored.path.suffix == ".gguf":
        return Verdict(why_not=_GGUF)
    try:
        return _judged(stored.path)
    except HeadraceError as error:
        return Verdict(why_not=str(error))
    except Exception as error:
        return Verdict(why_not=f"transformers does not build it: {type(error).__name__}: {error}")


def _judged(directory: Path) -> Verdict:
    from headrace.inference.loading import confirmed
    from headrace.inference.skeleton import read_transformers_config
    from headrace.streaming.checkpoint import Checkpoint

    checkpoint = Checkpoint(directory)
    try:
        confirmed(checkpoint, read_transformers_config(directory))
    finally:
        checkpoint.close()
    model, budget_bytes = checkpoint.model, default_budget_bytes()
    least_bytes = max(block.read_bytes for block in model.blocks) + model.fixed_read_bytes
    if least_bytes > budget_bytes:
        return Verdict(
            why_not=f"one block and what always stays take {format_bytes(least_bytes)}; headrace may hold "
            f"{format_bytes(budget_bytes)} of what is free now: close other programs"
        )
    return Verdict(streamed=model.weights_bytes > budget_bytes)


# -- looking ------------------------------------------------------------------------------------------------------


def _hub_cache() -> Path:
    """The hub's cache as its library finds it, which need not be installed to look there."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return user_path(named)
    home = os.environ.get("HF_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (user_path(home) if home else user_path(cache) / "huggingface") / "hub"


def _in_hub_cache(cache: Path) -> Iterator[StoredHere]:
    """The newest snapshot of each repository that has weights."""
    for repository in sorted(cache.glob("models--*--*")):
        snapshots = sorted(repository.glob("snapshots/*"), key=lambda path: path.stat().st_mtime)
        name = "/".join(repository.name.split("--")[1:3])
        for snapshot in snapshots[-1:]:
            for path in _below(snapshot, 1):
                yield StoredHere(name if path.is_dir() else f"{name}/{path.name}", path, "hub cache")


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Checkpoints' directories and GGUF files (of several parts the first)."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # not there, or nobody's business
        return
    names = [entry.name for entry in entries]
    if "config.json" in names and any(name.endswith(_OF_A_CHECKPOINT) for name in names):
        yield folder
    for entry in entries:
        if entry.suffix == ".gguf" and entry.is_file() and not _FURTHER_PART.search(entry.name):
            yield entry
        elif depth > 1 and entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
            yield from _below(entry, depth - 1)
