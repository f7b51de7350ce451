"""`headrace pull`: bring a model from the hub onto this disk, before it is run."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.command import HOW_TO_INSTALL, INTERRUPTED, Command
from headrace.cli.options import JsonOption, QuietOption
from headrace.cli.output import Output
from headrace.cli.run_progress import Share, displayed
from headrace.errors import DependencyError, InvalidRequestError
from headrace.inference.sources.hub import Fetched, fetch, remove_unfinished
from headrace.inference.sources.model_source import HUB_ID
from headrace.paths import user_path
from headrace.units import format_bytes, format_rate, format_seconds

EXAMPLES = (
    "headrace pull Qwen/Qwen3-8B",
    "headrace pull Qwen/Qwen3-8B --dir /mnt/models/qwen3-8b",
    "headrace run \"$(headrace pull Qwen/Qwen3-8B)\" --prompt 'Name three rivers.'",
)


def pull(
    hub_id: Annotated[str, typer.Argument(metavar="HUB-ID", help="A model of the hub, as owner/name.")],
    *,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="A branch, a tag or a commit.  [default: main]")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Keep it there.  [default: the hub's cache, where run looks, too]"),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch what running a model takes: config, tokenizer, safetensors.

    Files that are there are not fetched again, so what was broken off goes on with those that are missing. The
    directory goes to standard output.
    """
    if not HUB_ID.fullmatch(hub_id):
        raise InvalidRequestError(f"{hub_id!r} is no hub id; those look like owner/name")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise DependencyError(f"fetching a model needs huggingface_hub, not installed here; {HOW_TO_INSTALL}")
    output = Output(as_json=as_json, quiet=quiet)
    output.own_progress_only()
    with output.reserved():
        progress = PullProgress(hub_id)
        place = None if directory is None else user_path(directory)
        with _ending_at_once(output), displayed(progress, output):
            fetched = fetch(hub_id, revision=revision, directory=place, heard=progress.heard)
        if as_json:
            output.json(_pull_json(hub_id, fetched))
        else:
            output.note(_told(hub_id, fetched), *([fetched.remark] if fetched.remark else []))
            output.text(f"{fetched.directory}\n")


@contextmanager
def _ending_at_once(output: Output) -> Iterator[None]:
    """Let Ctrl-C end the process: the hub's library would finish the files that it has begun, which may take hours."""

    def end(*_: object) -> None:
        remove_unfinished()
        output.to_stderr.show_cursor()
        sys.stderr.write("headrace: interrupted; the same command goes on with the files that are missing\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)

    former = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


class PullProgress:
    """Bytes that are here of those that were missing. `changed` is called after every change."""

    def __init__(self, hub_id: str, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.changed: Callable[[], None] = lambda: None
        self._hub_id = hub_id
        self._clock = clock
        self._started_s = clock()
        self._here_bytes = self._missing_bytes = 0

    def heard(self, here_bytes: int, missing_bytes: int) -> None:
        """Take note of what is here."""
        if not self._missing_bytes:
            self._started_s = self._clock()
        self._here_bytes, self._missing_bytes = here_bytes, missing_bytes
        self.changed()

    @property
    def share(self) -> Share:
        """What is fetched of what was missing."""
        if not self._missing_bytes:
            return Share(0, 1, f"{self._hub_id}: asking the hub what there is")
        words = f"{format_bytes(self._here_bytes)} of {format_bytes(self._missing_bytes)}"
        seconds = self._clock() - self._started_s
        if self._here_bytes and seconds > 0:
            rate = self._here_bytes / seconds
            left_s = (self._missing_bytes - self._here_bytes) / rate
            words += f", {format_rate(rate)}, {format_seconds(left_s)} left"
        return Share(self._here_bytes, self._missing_bytes, words)


def _told(hub_id: str, fetched: Fetched) -> str:
    whole = f"{hub_id}: {fetched.num_files} files, {format_bytes(fetched.size_bytes)}"
    return f"{whole}, of which {format_bytes(fetched.fetched_bytes)} were fetched now"


def _pull_json(hub_id: str, fetched: Fetched) -> dict[str, object]:
    return {
        "model": hub_id,
        "path": str(fetched.directory),
        "files": fetched.num_files,
        "size_bytes": fetched.size_bytes,
        "fetched_bytes": fetched.fetched_bytes,
        "remark": fetched.remark or None,
    }


PULL = Command("pull", pull, EXAMPLES)
