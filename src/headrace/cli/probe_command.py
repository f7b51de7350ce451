"""`headrace probe`: measure this machine, for plans here or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace import __version__
from headrace.cli.command import Command, load_torch, require_run_libraries
from headrace.cli.machines_command import machine_json
from headrace.cli.options import JsonOption, QuietOption
from headrace.cli.output import Output, check_writable
from headrace.errors import InvalidRequestError
from headrace.machine.machine import Machine
from headrace.machine.machine_file import machine_to_toml
from headrace.units import format_bytes, format_rate

if TYPE_CHECKING:
    from headrace.streaming.cuda_device import GpuDescription
    from headrace.streaming.probe.progress import Progress

EXAMPLES = (
    "headrace probe > machine.toml",
    "headrace probe --dir /mnt/models --out machine.toml",
    "headrace probe --device cuda:1 --json",
    "headrace plan ./my-model --machine machine.toml",
    "headrace plan gpt-3 --machine machine.toml",
)


def probe(
    *,
    directory: Annotated[
        Path,
        typer.Option(
            "--dir", metavar="DIR", help="Measure the disk that holds this directory; writes 512 MiB there for a while."
        ),
    ] = Path(),
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the description there instead of to standard output.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="auto|cpu|cuda|cuda:N",
            help="The GPU to measure in addition to the CPU; auto: the first one, where there is one; cpu: none. All "
            "that are seen are listed.",
        ),
    ] = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine: its disk, its arithmetic, a GPU and the link to it.

    Also how much reading and computing slow each other, and copying and computing. Takes about twenty seconds, with a
    GPU ten more; writes a file of 512 MiB to the disk in question and removes it again.
    """
    if not directory.is_dir():
        raise InvalidRequestError(f"--dir {directory}: there is no such directory")
    if out is not None:
        check_writable(out, option="--out")
    require_run_libraries("measuring this machine")
    output = Output(as_json=as_json, quiet=quiet)
    with output.reserved():
        load_torch()
        from headrace.streaming.cuda_device import list_gpus
        from headrace.streaming.devices import open_device
        from headrace.streaming.probe.machine import probe_machine

        opened = open_device(device)
        gpus = list_gpus()
        with _shown(output) as progress:
            machine = probe_machine(directory, device=opened, progress=progress)
        _report(output, machine, gpus, out)


def _report(output: Output, machine: Machine, gpus: Sequence[GpuDescription], out: Path | None) -> None:
    text = machine_to_toml(machine)
    if out is not None:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InvalidRequestError(f"--out {out} cannot be written: {error.strerror}") from error
    measured = {accelerator.device: accelerator for accelerator in machine.accelerators}
    if output.as_json:
        output.json(
            {
                **machine_json(machine),
                "gpus": [
                    {
                        "device": f"cuda:{gpu.number}",
                        "name": gpu.name,
                        "memory_bytes": gpu.memory_bytes,
                        "free_bytes": gpu.free_bytes,
                        "compute_capability": gpu.compute_capability,
                        "multiprocessors": gpu.multiprocessors,
                        "measured": f"cuda:{gpu.number}" in measured,
                    }
                    for gpu in gpus
                ],
                "out": None if out is None else str(out),
                "headrace_version": __version__,
            }
        )
        return
    for gpu in gpus:
        output.note(
            f"cuda:{gpu.number}: {gpu.name}, {format_bytes(gpu.memory_bytes)}, {format_bytes(gpu.free_bytes)} free, "
            f"compute capability {gpu.compute_capability}{'' if f'cuda:{gpu.number}' in measured else ', not measured'}"
        )
    for accelerator in machine.accelerators:
        copies = accelerator.copies
        assert copies is not None
        output.note(
            f"{accelerator.device}: {format_rate(copies.bytes_per_s.expected)} from page-locked memory, "
            f"{format_rate(copies.pageable_bytes_per_s.expected)} from pageable memory; "
            f"{format_rate(accelerator.memory_bytes_per_s.expected)} within it; "
            f"{max(rate.expected for rate in accelerator.flops.values()) / 1e12:.3g} TFLOP/s"
        )
    output.note(*machine.notes)
    if out is None:
        output.text(text)
    else:
        output.note(
            f"{machine.name}: reads {format_rate(machine.require_disk().bytes_per_s.expected)}; written to {out}"
        )


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
