"""`headrace probe`: measure this machine, for plans here or elsewhere."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace import __version__
from headrace.cli.command import Command
from headrace.cli.dependencies import require_run_libraries
from headrace.cli.options import JsonOption
from headrace.cli.output import Output
from headrace.cli.trace_file import check_writable
from headrace.errors import InvalidRequestError
from headrace.planning.probed_machine import ProbedMachine
from headrace.units import format_rate

if TYPE_CHECKING:
    from headrace.streaming.probe import Progress

EXAMPLES = (
    "headrace probe > machine.toml",
    "headrace probe --dir /mnt/models --out machine.toml",
    "headrace plan ./my-model --machine machine.toml",
)


def probe(
    *,
    directory: Annotated[
        Path,
        typer.Option(
            "--dir", metavar="DIR", help="Measure the disk that this directory lies on; 512 MiB are written there."
        ),
    ] = Path(),
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the description there instead of to standard output.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine: its disk, its arithmetic.

    Also how much reading and computing slow each other. Takes about twenty seconds, writes a file of 512 MiB to the
    disk in question and removes it again.
    """
    if not directory.is_dir():
        raise InvalidRequestError(f"--dir {directory}: there is no such directory")
    if out is not None:
        check_writable(out, option="--out")
    require_run_libraries("measuring this machine")
    output = Output(as_json=as_json)
    with output.reserved():
        from headrace.streaming.probe import probe_machine

        with _shown(output) as progress:
            machine = probe_machine(directory, progress=progress)
        _report(output, machine, out)


def _report(output: Output, machine: ProbedMachine, out: Path | None) -> None:
    text = machine.to_toml()
    if out is not None:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InvalidRequestError(f"--out {out} cannot be written: {error.strerror}") from error
    if output.as_json:
        output.json({**tomllib.loads(text), "out": None if out is None else str(out), "headrace_version": __version__})
    elif out is None:
        output.text(text)
    else:
        output.note(f"{machine.name}: reads {format_rate(machine.read_bytes_per_s)}; written to {out}")


@contextmanager
def _shown(output: Output) -> Iterator[Progress]:
    """Show a bar on a terminal, a line for each step elsewhere."""
    if not output.to_stderr.is_terminal:
        yield lambda what, share: output.note(f"{share:.0%} {what}")
        return
    from rich.progress import Progress as Bar

    with Bar(console=output.to_stderr, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


PROBE = Command("probe", probe, EXAMPLES)
