"""Measure headrace on a GPU: exactness, link, overlap, break-even, residency, memory, rivals. One command, no network.

    python bench/gpu.py [--quick] [--seconds 480] [--parts link,overlap] [--out DIR] [--dir DIR] [--keep]
    python bench/gpu.py --device fake     the same parts on a made-up accelerator, whose figures mean nothing

Needs a checkout, and torch, transformers, accelerate and psutil: with PYTHONPATH=src nothing has to be installed. The
checkpoints (random weights in the shapes of Llama models of 1B, 8B and 70B) are written first, to a temporary folder
or to --dir. Parts run in the order of their importance; one that would not end in time is skipped, and says so. After
each part the report is written anew. Exits with 1 where a part failed or logits were not exact.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.models.llama import modeling_llama  # noqa: F401  # now, not within a measurement
from transformers.utils import logging as transformers_logging

import bench_report
from gpu_parts.case import FAKE, FULL, QUICK, Case
from gpu_parts.checkpoint_rack import CheckpointRack
from gpu_parts.deadline import Deadline
from gpu_parts.described_gpu import describe
from gpu_parts.made_up_machine import made_up_machine
from gpu_parts.outcome import Outcome, SkippedError, State
from gpu_parts.parts import PARTS, Part
from gpu_parts.report import exit_code, goals_of, record_of, report_text
from gpu_parts.stage import Stage
from headrace.errors import HeadraceError, InvalidRequestError
from headrace.streaming.devices import open_device
from headrace.streaming.fakes.accelerator import FakeAccelerator
from headrace.streaming.system_memory import free_bytes

NAMES = ", ".join(part.name for part in PARTS)


class Run(NamedTuple):
    """What one run is, and where its report goes."""

    stage: Stage
    name: str
    header: str
    facts: dict[str, object]
    host_free_bytes: int
    """when it began"""
    out: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write gpu-NAME.{json,md}; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or fake (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="for everything (default: 480; 115 with --quick)")
    parser.add_argument("--quick", action="store_true", help="the 1B shape only, few repetitions")
    parser.add_argument("--parts", help=f"some of: {NAMES}, separated by commas")
    parser.add_argument("--out", type=Path, help="of the report (default: bench/results; a scratch folder for others)")
    parser.add_argument("--dir", type=Path, help="for the checkpoints (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints where they are")
    parser.add_argument("--commit", help="of this checkout, where it does not say itself")
    options = parser.parse_args(arguments)
    wanted = [part.name for part in PARTS] if options.parts is None else options.parts.split(",")
    unknown = sorted(set(wanted) - {part.name for part in PARTS})
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {NAMES}")
    transformers_logging.disable_progress_bar()
    with ExitStack() as undo:
        # What was imported stays: looking through it again and again would take a quarter of a second each time.
        gc.freeze()
        undo.callback(gc.unfreeze)
        if options.device == "fake":
            undo.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)  # the tiny products of several threads wait for one another
        if options.dir is None:
            folder = Path(tempfile.mkdtemp(prefix="headrace-gpu-"))
            undo.callback(lambda: None if options.keep else shutil.rmtree(folder, ignore_errors=True))
        else:
            folder = options.dir
        try:
            run = _prepare(options, folder)
        except HeadraceError as error:
            parser.error(str(error))
        if not options.keep:
            undo.callback(run.stage.rack.clear)
        return _measure(run, [part for part in PARTS if part.name in wanted])


def _prepare(options: argparse.Namespace, folder: Path) -> Run:
    fake = options.device == "fake"
    case: Case = FAKE if fake else QUICK if options.quick else FULL
    device = FakeAccelerator() if fake else open_device(options.device)
    if device.uses_host_memory:
        raise InvalidRequestError(f"{device.name} is no accelerator; choose cuda, cuda:N or fake")
    gpu = describe(device)
    rack = CheckpointRack(folder, case.shapes)
    machine = made_up_machine(device) if fake else None
    seconds = case.seconds if options.seconds is None else options.seconds
    stage = Stage(device, case, rack, Deadline(seconds), machine)
    commit = options.commit or bench_report.provenance()["commit"] or "unknown"
    header = f"{gpu.name}, driver {gpu.driver}, {gpu.link}, torch {torch.__version__}, commit {commit}"
    free = free_bytes()
    facts = {"gpu": gpu._asdict(), "case": case.name, "seconds": seconds, "commit": commit, "host_free_bytes": free}
    out = options.out
    if out is None and case is not FULL:
        out = Path(tempfile.gettempdir()) / "headrace-gpu-results"
    suffix = "-quick" if case is QUICK else ""
    return Run(stage, f"gpu-{gpu.slug}{suffix}", header, facts, free, out)


def _measure(run: Run, parts: Sequence[Part]) -> int:
    outcomes: list[Outcome] = []
    for part in parts:
        print(f"{part.name} ({run.stage.deadline.left_s:.0f} s left) ...", file=sys.stderr, flush=True)
        outcomes.append(run_part(part, run.stage))
        print(f"{part.name}: {outcomes[-1].state.value} {outcomes[-1].reason}", file=sys.stderr, flush=True)
        _write(run, outcomes, show=part is parts[-1])
    return exit_code(outcomes, goals_of(outcomes, run.stage.promises))


def run_part(part: Part, stage: Stage) -> Outcome:
    """Measure one part, or say why not; what goes wrong in it is its own loss only."""
    began = time.perf_counter()

    def ended(state: State, reason: str) -> Outcome:
        seconds = time.perf_counter() - began
        return Outcome(name=part.name, title=part.title, state=state, seconds=seconds, reason=reason)

    try:
        needed_s, left_s = part.needs_s(stage), stage.deadline.left_s
        if needed_s > left_s:
            raise SkippedError(f"it takes about {needed_s:.0f} s, and {max(0.0, left_s):.0f} s are left")
        measured = part.run(stage)
    except SkippedError as skipped:
        return ended(State.SKIPPED, str(skipped))
    except Exception as error:
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return ended(State.FAILED, f"{type(error).__name__} at {place}: {error}")
    finally:
        with contextlib.suppress(RuntimeError):  # a device that failed fails at everything
            stage.settle()
    seconds = time.perf_counter() - began
    return Outcome(name=part.name, title=part.title, state=State.MEASURED, seconds=seconds, measured=measured)


def _write(run: Run, outcomes: Sequence[Outcome], *, show: bool) -> None:
    stage = run.stage
    text = report_text(
        run.header,
        made_up=not stage.on_gpu,
        outcomes=outcomes,
        promises=stage.promises,
        notes=[
            f"Weights are random (`make_checkpoint.py --fast`). The disk took them at "
            f"{stage.rack.write_bytes_per_s / 1e9:.2g} GB/s and gave the first ones back at "
            f"{stage.rack.read_bytes_per_s / 1e9:.2g} GB/s. Host memory free at the start: "
            f"{run.host_free_bytes / 1e9:.3g} GB. {stage.deadline.seconds - stage.deadline.left_s:.0f} of "
            f"{stage.deadline.seconds:.0f} s used."
        ],
    )
    record = {**run.facts, **record_of(outcomes, stage.promises)}
    bench_report.write(run.name, record, text, out=run.out, show=show)


if __name__ == "__main__":
    sys.exit(main())
