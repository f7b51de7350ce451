"""One start of a batch job: read the input, see what is answered already, measure, pack, compute, report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.batch_progress import BatchProgress
from headrace.cli.dependencies import require_run_libraries
from headrace.cli.output import Output
from headrace.cli.prompt import load_tokenizer
from headrace.cli.run_progress import displayed
from headrace.errors import InvalidRequestError
from headrace.inference.model_source import resolve_model
from headrace.machine.machine import Machine
from headrace.model.blocks import HEAD_CHUNK_ROWS
from headrace.model.stored_model import StoredModel
from headrace.planning.jobs.forecast import JobForecast, Packing, PassTimes, choose_packing, longest_first
from headrace.planning.jobs.packing import Need, PassScheduler, PositionPool
from headrace.planning.load_options import make_options
from headrace.planning.workload import Packed
from headrace.units import format_bytes, format_seconds, parse_rate, parse_size

if TYPE_CHECKING:
    from headrace.inference.batching.job import Tally
    from headrace.inference.batching.job_input import Entry
    from headrace.inference.handle import Handle
    from headrace.streaming.checkpoint import Checkpoint

TIMED_PASS_TOKENS = (1, 4, 16, 64, 128, 256)
"""numbers of tokens in a pass at which a layer is timed, as far as timing them fits a part of the budget"""
TIMING_SHARE = 1 / 12


@dataclass(frozen=True, kw_only=True)
class BatchJobRequest:
    """What `headrace batch` is asked for; sizes and rates still as text."""

    model: str
    input: Path
    output: Path
    memory: str | None = None
    strategy: str = "auto"
    dtype: str = "auto"
    read_limit: str | None = None
    machine: Machine | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    in_flight: int | None = None
    pass_tokens: int | None = None
    answer_share: float = 1.0
    dry_run: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.memory is not None:
            parse_size(self.memory)
        if self.read_limit is not None:
            parse_rate(self.read_limit)
        if self.max_tokens < 1:
            raise InvalidRequestError(f"--max-tokens must be at least 1, not {self.max_tokens}")
        if not 0 <= self.temperature <= 2:
            raise InvalidRequestError(f"--temperature must lie between 0 (greedy) and 2, not {self.temperature}")
        if self.in_flight is not None and self.in_flight < 1:
            raise InvalidRequestError(f"--in-flight must be at least 1, not {self.in_flight}")
        if self.pass_tokens is not None and self.pass_tokens < 1:
            raise InvalidRequestError(f"--pass-tokens must be at least 1, not {self.pass_tokens}")
        if not 0 < self.answer_share <= 1:
            raise InvalidRequestError(f"--answer-share must be above 0 and at most 1, not {self.answer_share}")
        if not self.input.expanduser().is_file():
            raise InvalidRequestError(f"there is no file {self.input}")
        if self.output.exists() and self.output.samefile(self.input):
            raise InvalidRequestError("input and output are the same file; give another output")


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


def perform_batch(request: BatchJobRequest, output: Output) -> BatchResult:
    """Run the job, or what earlier starts left of it. Raises HeadraceError before any answer where it cannot run."""
    require_run_libraries("running a model")
    directory = resolve_model(request.model)
    progress = BatchProgress(f"loading {request.model}: reading its index and its tokenizer")
    with displayed(progress, output):
        from headrace.inference.batching.job_input import Encoder, JobInput
        from headrace.inference.batching.output_file import OutputFile
        from headrace.inference.batching.request import Defaults
        from headrace.streaming.checkpoint import Checkpoint

        checkpoint = Checkpoint(directory)
        try:
            tokenizer = load_tokenizer(checkpoint.directory, trust_remote_code=request.trust_remote_code)
            model = checkpoint.model
            source = JobInput(
                request.input.expanduser(),
                Encoder(tokenizer, context_tokens=model.context_tokens, vocab_size=model.vocab_size),
                Defaults(max_tokens=request.max_tokens, temperature=request.temperature),
                job=_job_digest(checkpoint, request),
                on_progress=lambda number: progress.count("reading requests:", number),
            )
            if request.dry_run:
                return _Start(request, output, progress, checkpoint, tokenizer, source, set(), None).result(0)
            answers = OutputFile(request.output.expanduser(), source.ids)
            try:
                start = _Start(request, output, progress, checkpoint, tokenizer, source, set(answers.answered), answers)
                return start.result(answers.repaired_bytes)
            finally:
                answers.close()
        finally:
            checkpoint.close()


class _Start:
    """What one start works with."""

    def __init__(
        self,
        request: BatchJobRequest,
        output: Output,
        progress: BatchProgress,
        checkpoint: Checkpoint,
        tokenizer: Any,
        source: Any,
        answered: set[str],
        answers: Any,
    ) -> None:
        self._request, self._output, self._progress = request, output, progress
        self._checkpoint, self._tokenizer, self._source = checkpoint, tokenizer, source
        self._answered, self._answers = answered, answers

    def result(self, repaired_bytes: int) -> BatchResult:
        """Answer what is not answered yet."""
        source, answered = self._source, self._answered
        if repaired_bytes:
            self._output.note(f"the output ended in an unfinished line of {repaired_bytes} bytes; it was cut off")
        self._write_refused()
        entries = [entry for entry in source.entries if entry.custom_id not in answered]
        total = len(source.entries) + len(source.refused)
        if answered:
            self._output.note(f"{len(answered)} of {total} requests were answered before; {len(entries)} are left")
        if not entries:
            return BatchResult(
                requests=total,
                answered_before=len(answered),
                refused=len(source.refused),
                repaired_bytes=repaired_bytes,
            )
        return self._compute(entries, total, repaired_bytes)

    def _write_refused(self) -> None:
        from headrace.inference.batching.job import error_line

        refused = [line for line in self._source.refused if line.custom_id not in self._answered]
        if refused:
            first = refused[0]
            self._output.note(
                f"{len(refused)} of the requests cannot be answered and get error lines; the first, "
                f"{first.custom_id}: {first.error}"
            )
        if self._answers is not None:
            for line in refused:
                self._answers.write(error_line(line.custom_id, line.line_id, line.error))

    def _compute(self, entries: list[Entry], total: int, repaired_bytes: int) -> BatchResult:
        from headrace.inference.assembly import assemble
        from headrace.inference.batching.job import BatchJob
        from headrace.inference.batching.pass_timing import time_packing
        from headrace.inference.batching.ragged_pass import RaggedRunner
        from headrace.inference.calibration import calibrate
        from headrace.inference.skeleton import read_transformers_config
        from headrace.streaming.system_memory import default_budget_bytes, keep_heap_small, peak_resident_bytes
        from headrace.streaming.torch_dtypes import TORCH_DTYPES

        request, checkpoint, progress = self._request, self._checkpoint, self._progress
        started = time.perf_counter()
        needs, prefixes, examples = self._source.needs(entries)
        options = make_options(
            checkpoint.model,
            memory=request.memory,
            default_budget_bytes=default_budget_bytes,
            strategy=request.strategy,
            dtype=request.dtype,
            batch=min(request.in_flight or 32, len(needs)),
            prompt_tokens=1,
            max_tokens=2,
            read_limit=request.read_limit,
            machine=request.machine,
            trust_remote_code=request.trust_remote_code,
        )
        progress.enter("loading: measuring the disk and one layer, planning, taking the memory")
        keep_heap_small()
        config = read_transformers_config(checkpoint.directory, trust_remote_code=options.trust_remote_code)
        longest = max(need.positions for need in needs.values())
        least = Packed(positions=longest, pass_tokens=min(16, request.pass_tokens or 16), samples=1, longest=longest)
        calibration = calibrate(
            checkpoint, options, config, pass_tokens=_timed_tokens(checkpoint.model, options.budget_bytes), packed=least
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
        )
        times = PassTimes(
            checkpoint.model, candidate.plan, scenario.known_rates, costs, pass_tokens=packing.pass_tokens
        )
        self._output.note(
            *calibration.warnings,
            *_announcement(packing, candidate.plan, forecast, times, len(entries), prefixes, needs),
        )
        model = assemble(checkpoint, config, candidate, calibration, options, started=started)
        with model:
            known = {
                "requests": total,
                "answered_before": len(self._answered),
                "refused": len(self._source.refused),
                "repaired_bytes": repaired_bytes,
                "handle": model.headrace,
                "packing": packing,
                "forecast": forecast,
                "notes": calibration.notes,
                "load_s": model.headrace.load_s,
            }
            if self._answers is None:
                return BatchResult(**known)
            scheduler = PassScheduler(
                most_sequences=packing.sequences,
                pass_tokens=packing.pass_tokens,
                pool=PositionPool(packing.positions),
                prefixes=prefixes,
            )
            for key in longest_first(needs):
                scheduler.add(key, needs[key])
            job = BatchJob(
                model_name=checkpoint.model.name,
                source=self._source,
                entries=entries,
                examples=examples,
                scheduler=scheduler,
                runner=RaggedRunner(model, positions=packing.positions),
                output=self._answers,
                tokenizer=self._tokenizer,
                ends=_end_tokens(model.generation_config.eos_token_id),
                after_pass=progress.passed,
            )
            progress.begin(
                requests=total,
                before=len(self._answered) + len(self._source.refused),
                work_tokens=sum(need.prompt_tokens + need.new_tokens - 1 for need in needs.values()),
                predicted_s=forecast.total_s,
            )
            tally = job.run()
            return BatchResult(**known, tally=tally, peak_memory_bytes=peak_resident_bytes())


def _announcement(
    packing: Packing,
    plan: Any,
    forecast: JobForecast,
    times: PassTimes,
    requests: int,
    prefixes: dict[Hashable, Need],
    needs: dict[Hashable, Need],
) -> list[str]:
    from headrace.inference.api import describe_plan

    shared = sum(need.prefix_tokens for need in needs.values())
    lines = [
        f"plan: {describe_plan(plan)}",
        f"packing: up to {packing.sequences} sequences in flight, passes of up to {packing.pass_tokens} tokens, "
        f"{packing.positions} positions of KV cache ({format_bytes(plan.memory.kv_cache_bytes)}); reading a pass takes "
        f"{format_seconds(times.load_s)}",
        f"prediction: {requests} requests in {format_seconds(forecast.total_s)} ({forecast.passes} passes, "
        f"{forecast.tokens_per_pass:.0f} tokens per pass, {forecast.generated_per_s:.3g} answer tokens/s), if answers "
        "are as long as they may be",
    ]
    if prefixes:
        lines.append(f"{len(prefixes)} common beginnings are computed once each, {shared} prompt tokens are not")
    return lines


def _timed_tokens(model: StoredModel, budget_bytes: int) -> list[int]:
    """Numbers of tokens whose activations and logits take no more than a small part of the budget."""
    token_bytes = 4 * (HEAD_CHUNK_ROWS + 4 * model.hidden_size + 4 * model.intermediate_size)
    return [tokens for tokens in TIMED_PASS_TOKENS if tokens * token_bytes <= budget_bytes * TIMING_SHARE]


def _end_tokens(eos_token_id: int | list[int] | None) -> frozenset[int]:
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or ())


def _job_digest(checkpoint: Checkpoint, request: BatchJobRequest) -> str:
    """Of everything beside a request that decides its answer: weights, tokenizer, dtype, defaults."""
    digest = hashlib.sha256()
    settings = {"dtype": request.dtype, "max_tokens": request.max_tokens, "temperature": request.temperature}
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
