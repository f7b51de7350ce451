"""One start of a batch job: read the input, see what is answered already, measure, pack, compute."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from headrace.inference.api import describe_plan
from headrace.inference.assembly import assemble
from headrace.inference.batching.job import BatchJob, DonePass, Tally, error_line
from headrace.inference.batching.job_input import Encoder, Entry, JobInput, LengthSwitch
from headrace.inference.batching.job_request import BatchJobRequest
from headrace.inference.batching.output_file import OutputFile
from headrace.inference.batching.packable import filling_of, shortened
from headrace.inference.batching.pass_timing import time_packing
from headrace.inference.batching.ragged_pass import RaggedRunner
from headrace.inference.batching.rectangular_pass import RectangularRunner
from headrace.inference.batching.request import Defaults
from headrace.inference.generation_defaults import GenerationDefaults, read_generation_defaults
from headrace.inference.handle import Handle
from headrace.inference.loading import Loading
from headrace.inference.remembered import calibrated
from headrace.inference.skeleton import build_skeleton, read_transformers_config
from headrace.inference.transformers_seam import computes_anew, length_switch
from headrace.model.blocks import HEAD_CHUNK_ROWS
from headrace.model.stored_model import StoredModel
from headrace.paths import user_path
from headrace.planning.jobs.forecast import (
    Filling,
    JobForecast,
    Packing,
    PassTimes,
    choose_packing,
    least_memory,
    longest_first,
)
from headrace.planning.jobs.packing import Need
from headrace.planning.plan import Plan
from headrace.streaming.checkpoint import Checkpoint
from headrace.streaming.device import CpuDevice
from headrace.streaming.system_memory import keep_heap_small, peak_resident_bytes
from headrace.streaming.torch_dtypes import TORCH_DTYPES
from headrace.units import format_bytes, format_number, format_seconds

TIMED_PASS_TOKENS = (1, 4, 16, 64, 128, 256)
"""numbers of tokens in a pass at which a layer is timed, as far as timing them fits a part of the budget"""
TIMING_SHARE = 1 / 12


class JobProgress(Protocol):
    """Is told how far a job is."""

    def note(self, text: str) -> None:
        """Something was found or decided."""

    def enter(self, doing: str) -> None:
        """Something begins, before the first pass."""

    def count(self, what: str, number: int) -> None:
        """So many of something were read."""

    def begin(self, *, requests: int, before: int, work_tokens: int, predicted_s: float) -> None:
        """The passes begin: `before` of the requests were answered by earlier starts."""

    def passed(self, done: DonePass, tally: Tally) -> None:
        """A pass is done."""


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """What a start of a job did. The handle is closed and None where nothing was left to do."""

    requests: int
    answered_before: int
    refused: int
    repaired_bytes: int
    handle: Handle | None = None
    packing: Packing | None = None
    forecast: JobForecast | None = None
    tally: Tally | None = None
    load_s: float = 0.0
    peak_memory_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def nothing_answered(self) -> bool:
        """Whether every request of the job has an error."""
        return self.refused + (0 if self.tally is None else self.tally.errors) == self.requests


def start_job(
    request: BatchJobRequest, checkpoint: Checkpoint, tokenizer: Any, on_progress: JobProgress
) -> BatchResult:
    """Run the job, or what earlier starts left of it, on the CPU.

    Raises HeadraceError before any answer where it cannot run.
    """
    model = checkpoint.model
    defaults = read_generation_defaults(
        checkpoint.directory,
        model.vocab_size,
        followed=request.model_defaults,
        trust_remote_code=request.options.trust_remote_code,
    )
    followed = defaults.describe(draws=True)
    for line in (f"decoding: as requests say{followed}" if followed else "", defaults.left_aside):
        if line:
            on_progress.note(line)
    source = JobInput(
        user_path(request.input),
        Encoder(tokenizer, context_tokens=model.context_tokens, vocab_size=model.vocab_size),
        Defaults(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            drawing_temperature=defaults.fields.get("temperature", 1.0),
        ),
        job=_job_digest(checkpoint, request),
        on_progress=lambda number: on_progress.count("reading requests:", number),
    )
    answers = None if request.dry_run else OutputFile(user_path(request.output), source.ids)
    try:
        return _Start(request, checkpoint, tokenizer, source, answers, defaults, on_progress).result()
    finally:
        if answers is not None:
            answers.close()


@dataclass(frozen=True)
class _Start:
    """What one start works with."""

    request: BatchJobRequest
    checkpoint: Checkpoint
    tokenizer: Any
    source: JobInput
    answers: OutputFile | None
    """None for a dry run"""
    defaults: GenerationDefaults
    on_progress: JobProgress

    def result(self) -> BatchResult:
        """Answer what is not answered yet."""
        source, answers = self.source, self.answers
        answered = set() if answers is None else set(answers.answered)
        entries = [entry for entry in source.entries if entry.custom_id not in answered]
        result = BatchResult(
            requests=len(source.entries) + len(source.refused),
            answered_before=len(answered),
            refused=len(source.refused),
            repaired_bytes=0 if answers is None else answers.repaired_bytes,
        )
        if result.repaired_bytes:
            self.on_progress.note(
                f"the output ended in an unfinished line of {result.repaired_bytes} bytes; it was cut off"
            )
        self._write_refused(answered)
        if answered:
            self.on_progress.note(
                f"{len(answered)} of {result.requests} requests were answered before; {len(entries)} are left"
            )
        return self._compute(entries, result) if entries else result

    def _write_refused(self, answered: set[str]) -> None:
        refused = [line for line in self.source.refused if line.custom_id not in answered]
        if refused:
            first = refused[0]
            self.on_progress.note(
                f"{len(refused)} of the requests cannot be answered and get error lines; the first, "
                f"{first.custom_id}: {first.error}"
            )
        if self.answers is not None:
            for line in refused:
                self.answers.write(error_line(line.custom_id, line.line_id, line.error))

    def _compute(self, entries: list[Entry], result: BatchResult) -> BatchResult:
        request, checkpoint, on_progress = self.request, self.checkpoint, self.on_progress
        started = time.perf_counter()
        config = read_transformers_config(checkpoint.directory, trust_remote_code=request.options.trust_remote_code)
        filling, reason = filling_of(config)
        needs, prefixes, examples = self.source.needs(entries, _length_switch(config))
        asked = replace(request.options, batch=min(request.in_flight or 32, len(needs)), prompt_tokens=1, max_tokens=2)
        device = CpuDevice()
        options = asked.checked(checkpoint.model, device)
        on_progress.enter("loading: measuring the disk and one layer, planning, taking the memory")
        keep_heap_small()
        loading = Loading.of(checkpoint, options, device)
        if filling is not Filling.RAGGED:
            on_progress.note(f"passes carry {filling.value} of sequences: {reason}")
            needs = {key: need._replace(prefix=None, prefix_tokens=0) for key, need in needs.items()}
            prefixes, examples = {}, {}
        calibration = calibrated(
            loading,
            pass_tokens=_timed_tokens(checkpoint.model, options.budget_bytes),
            packed=least_memory(needs, request.pass_tokens, filling),
        )
        scenario = calibration.scenario
        costs = time_packing(checkpoint.model, TORCH_DTYPES[scenario.compute_dtype])
        packing, candidate, forecast = choose_packing(
            scenario,
            costs,
            needs,
            prefixes,
            sequences=request.in_flight,
            pass_tokens=request.pass_tokens,
            strategy=options.strategy,
            answer_share=request.answer_share,
            filling=filling,
        )
        times = PassTimes(
            checkpoint.model, candidate.plan, scenario.known_rates, costs, pass_tokens=packing.pass_tokens
        )
        announcement = _announcement(packing, candidate.plan, forecast, times, len(entries), prefixes, needs)
        for line in (*calibration.warnings, *announcement):
            on_progress.note(line)
        with assemble(loading, candidate, calibration, started=started) as model:
            result = replace(
                result,
                handle=model.headrace,
                packing=packing,
                forecast=forecast,
                notes=calibration.notes,
                load_s=model.headrace.load_s,
            )
            if self.answers is None:
                return result
            scheduler = packing.scheduler(prefixes)
            for key in longest_first(needs):
                scheduler.add(key, needs[key])
            job = BatchJob(
                model_name=checkpoint.model.name,
                source=self.source,
                entries=entries,
                examples=examples,
                scheduler=scheduler,
                runner=RaggedRunner(model, positions=packing.positions)
                if filling is Filling.RAGGED
                else RectangularRunner(model, needs),
                output=self.answers,
                tokenizer=self.tokenizer,
                defaults=self.defaults,
                after_pass=on_progress.passed,
            )
            on_progress.begin(
                requests=result.requests,
                before=result.answered_before + result.refused,
                work_tokens=sum(need.prompt_tokens + need.new_tokens - 1 for need in needs.values()),
                predicted_s=forecast.total_s,
            )
            tally = job.run()
            return replace(result, tally=tally, peak_memory_bytes=peak_resident_bytes())


def _length_switch(config: Any) -> LengthSwitch | None:
    tokens = length_switch(config)
    if tokens is None:
        return None
    skeleton = build_skeleton(shortened(config), torch.float32)
    return LengthSwitch(tokens, computes_anew(skeleton, tokens))


def _announcement(
    packing: Packing,
    plan: Plan,
    forecast: JobForecast,
    times: PassTimes,
    requests: int,
    prefixes: dict[Hashable, Need],
    needs: dict[Hashable, Need],
) -> list[str]:
    shared = sum(need.prefix_tokens for need in needs.values())
    lines = [
        f"plan: {describe_plan(plan)}",
        f"packing: up to {packing.sequences} sequences in flight, passes of up to {packing.pass_tokens} tokens, "
        f"{packing.positions} positions of KV cache ({format_bytes(plan.memory.kv_cache_bytes)}); reading a pass takes "
        f"{format_seconds(times.load_s)}",
        f"prediction: {requests} requests in {format_seconds(forecast.total_s)} ({forecast.passes} passes, "
        f"{format_number(forecast.tokens_per_pass)} tokens per pass, "
        f"{format_number(forecast.generated_per_s)} answer tokens/s), if answers "
        "are as long as they may be",
    ]
    if prefixes:
        lines.append(f"{len(prefixes)} common beginnings are computed once each, {shared} prompt tokens are not")
    return lines


def _timed_tokens(model: StoredModel, budget_bytes: int) -> list[int]:
    """Numbers of tokens whose activations and logits take no more than a small part of the budget."""
    token_bytes = 4 * (HEAD_CHUNK_ROWS + 4 * model.hidden_size + 4 * model.intermediate_size)
    return [tokens for tokens in TIMED_PASS_TOKENS if tokens * token_bytes <= budget_bytes * TIMING_SHARE]


def _job_digest(checkpoint: Checkpoint, request: BatchJobRequest) -> str:
    """Of everything beside a request that decides its answer: weights, tokenizer, dtype, defaults."""
    digest = hashlib.sha256()
    settings = {"dtype": request.options.dtype, "max_tokens": request.max_tokens, "temperature": request.temperature}
    settings |= {} if request.model_defaults else {"model_defaults": False}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in names:
        path = checkpoint.directory / name
        digest.update(name.encode() + (path.read_bytes() if path.is_file() else b""))
    for entry in checkpoint.index.entries.values():
        digest.update(f"{entry.name} {entry.dtype} {entry.shape} {entry.offset}".encode())
    for file in checkpoint.index.files:
        size = Path(file.path).stat().st_size
        with open(file.path, "rb") as shard:
            for place in range(8):  # a sample of the weights: the whole would have to be read
                shard.seek(size * place // 8)
                digest.update(shard.read(4096))
    return digest.hexdigest()
