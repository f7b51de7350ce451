"""One run of a model, from its checked request to its measurements: resolve, tokenize, load, generate."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.command import load_run_libraries, require_run_libraries
from headrace.cli.output import Output
from headrace.cli.prompt import PromptBatch, encode_prompts, load_tokenizer
from headrace.cli.run_progress import Display, RunProgress, displayed
from headrace.cli.sampling import GREEDY, Sampling
from headrace.errors import InvalidRequestError
from headrace.inference.load_options import LoadOptions, Options
from headrace.inference.sources.model_source import resolve_model
from headrace.model.stored_model import StoredModel
from headrace.planning.budgets import DEVICE_RESERVE_MIN_BYTES, RESERVE_MIN_BYTES, RESERVE_SHARE
from headrace.planning.jobs.draft_length import Drafted, DraftLength
from headrace.planning.strategies import Strategy
from headrace.units import format_bytes, format_number

if TYPE_CHECKING:
    from headrace.inference.generation_defaults import GenerationDefaults
    from headrace.inference.handle import Handle, Measured
    from headrace.streaming.device import Device

DEFAULT_NEW_TOKENS = 128
DEFAULT_DRAFT_TOKENS = 8
LOOKUP = "lookup"
LOOKUP_NGRAM = 3


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What `headrace run` is asked for; sizes and rates still as text, prompts as text."""

    model: str
    prompts: tuple[str, ...]
    options: LoadOptions = field(default_factory=LoadOptions)
    """`batch` and the numbers of tokens follow from the prompts"""
    max_new_tokens: int | None = None
    """None: DEFAULT_NEW_TOKENS, or as many as the model's context still holds"""
    min_new_tokens: int | None = None
    sampling: Sampling = GREEDY
    chat: bool | None = None
    system: str | None = None
    ignore_eos: bool = False
    model_defaults: bool = True
    """whether what the model's generation_config.json asks for is followed"""
    draft: str | None = None
    """LOOKUP, or the model that drafts"""

    def __post_init__(self) -> None:
        drafts = self.options.draft_tokens
        if self.draft is not None and drafts < 1:
            raise InvalidRequestError(f"--draft-tokens must be at least 1, not {drafts}")
        if self.draft is None and drafts:
            raise InvalidRequestError("--draft-tokens has no effect where nothing drafts; give --draft lookup as well")
        if self.draft is not None and (len(self.prompts) > 1 or self.sampling.num_beams > 1):
            raise InvalidRequestError("--draft serves one prompt without beams; headrace batch fills passes otherwise")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InvalidRequestError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}")
        most = self.max_new_tokens or DEFAULT_NEW_TOKENS
        if self.min_new_tokens is not None and not 1 <= self.min_new_tokens <= most:
            raise InvalidRequestError(
                f"--min-new-tokens must lie between 1 and --max-new-tokens ({most}), not {self.min_new_tokens}"
            )


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run gave. The handle is closed; its plan, its prediction and its timeline stay."""

    texts: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    generated_tokens: tuple[int, ...]
    handle: Handle
    measured: Measured
    notes: tuple[str, ...]
    drafted: DraftReport | None = None
    warnings: tuple[str, ...] = ()
    """what made the run differ from what was predicted"""


@dataclass(frozen=True, kw_only=True)
class DraftReport:
    """What drafting did: predicted (from the acceptance that was measured) next to measured; tokens per second."""

    kind: str
    drafted: Drafted
    plain_tokens_per_s: float
    predicted_tokens_per_s: float
    measured_tokens_per_s: float


def perform(request: RunRequest, output: Output, *, stream_text: bool) -> RunResult:
    """Load the model, generate, and close it again, showing progress on standard error.

    With `stream_text`, a single prompt's text is written to standard output as it comes. Raises HeadraceError for
    everything that is wrong with the request, before any weight is read.
    """
    require_run_libraries("running a model")
    directory = resolve_model(request.model)
    progress = RunProgress(f"loading {request.model}: reading its index and its tokenizer")
    with displayed(progress, output) as display:
        load_run_libraries(compiles=request.options.compile_layers)
        from headrace.inference.api import load_checkpoint
        from headrace.inference.generation_defaults import read_generation_defaults
        from headrace.streaming.checkpoint import Checkpoint
        from headrace.streaming.devices import open_device
        from headrace.streaming.pressure import NOTED_SHARE, Moment

        started = time.perf_counter()
        device = open_device(request.options.device)
        checkpoint = Checkpoint(directory, cut_head=device.uses_host_memory)
        tokenizer = load_tokenizer(checkpoint.directory, trust_remote_code=request.options.trust_remote_code)
        prompts = encode_prompts(
            tokenizer,
            request.prompts,
            chat=request.chat,
            system=request.system,
            vocab_size=checkpoint.model.vocab_size,
        )
        new_tokens = _new_tokens(request, prompts, checkpoint.model)
        _refuse_mixed_lengths(checkpoint.directory, prompts, new_tokens, request)
        defaults = read_generation_defaults(
            checkpoint.directory,
            checkpoint.model.vocab_size,
            followed=request.model_defaults,
            trust_remote_code=request.options.trust_remote_code,
        )
        asked = replace(
            request.options,
            batch=len(prompts.lengths) * request.sampling.num_beams,
            prompt_tokens=prompts.longest,
            max_tokens=prompts.longest + new_tokens,
        )
        options = asked.checked(checkpoint.model, device)
        draft = None
        if request.draft not in (None, LOOKUP):
            draft = load_draft(str(request.draft), tokenizer, options, device)
            held_bytes = draft.headrace.plan.memory.total_bytes
            options = options._replace(budget_bytes=options.budget_bytes - held_bytes)
            output.note(f"draft: {draft.headrace.checkpoint.model.name}, {format_bytes(held_bytes)} of the budget")
        output.note(_announcement(checkpoint.model, options, device))
        progress.doing = "loading: measuring the disk and one layer, planning, taking the memory"
        progress.tell()
        with contextlib.ExitStack() as open_models:
            if draft is not None:
                open_models.enter_context(draft)
            model = open_models.enter_context(load_checkpoint(checkpoint, options, device, started=started))
            if draft is not None:
                model.headrace.draft_length.draft_s = draft.headrace.prediction.decode_s_per_pass
            decoding = f"decoding: {request.sampling.describe()}{defaults.describe(draws=request.sampling.draws)}"
            left_aside = (defaults.left_aside,) if defaults.left_aside else ()
            notes = (*model.headrace.notes, decoding, *left_aside)
            output.note(*model.headrace.warnings, *left_aside, _describe(model.headrace))
            if model.headrace.draft_length is not None:
                output.note(_announce_drafts(model.headrace.draft_length))
            progress.follow(model, tokens_each=new_tokens, sequences=len(prompts.lengths))
            before = Moment.read()
            generated = _generate(
                model, tokenizer, prompts, request, defaults, new_tokens, display if stream_text else None, draft
            )
            share = before.cpu_share(Moment.read())
            measured = model.headrace.measured()
            drafted = _draft_report(request, model.headrace, generated[0][1])
            if drafted is not None:
                measured = measured._replace(tokens_per_s=drafted.measured_tokens_per_s)
        return RunResult(
            texts=tuple(text for text, _ in generated),
            prompt_tokens=prompts.lengths,
            generated_tokens=tuple(count for _, count in generated),
            handle=model.headrace,
            measured=measured,
            notes=notes,
            drafted=drafted,
            warnings=_slowed_by_others(share) if share >= NOTED_SHARE else (),
        )


def load_draft(name: str, tokenizer: Any, options: Options, device: Device) -> Any:
    """Load a small model, all of it resident, that drafts for another one; its tokenizer must be the same."""
    from headrace.inference.api import load

    directory = resolve_model(name)
    trusted = options.asked.trust_remote_code
    own = load_tokenizer(directory, trust_remote_code=trusted)
    if own.get_vocab() != tokenizer.get_vocab():
        raise InvalidRequestError(
            f"--draft {name}: its tokenizer is not the model's, so its tokens mean something else; take a small model "
            "of the same family, or --draft lookup"
        )
    return load(
        directory,
        memory=options.budget_bytes,
        device=device,
        strategy=Strategy.RESIDENT,
        prompt_tokens=options.asked.prompt_tokens,
        max_tokens=options.asked.max_tokens,
        trust_remote_code=trusted,
    )


def _slowed_by_others(share: float) -> tuple[str, ...]:
    return (f"the CPU was busy with other work for {share:.0%} of this run, which slows it: close other programs",)


def _announce_drafts(length: DraftLength) -> str:
    """Predicted speed with drafts, as far as it can be known before a text was seen."""
    best = max(range(length.most + 1), key=length.tokens_per_s)
    if not best:
        return "drafts: a pass waits for the CPU, so none would pay if 2 of 5 were right; tried now and then"
    return (
        f"drafts: {best} in each pass would give {format_number(length.tokens_per_s(best))} tokens/s if 2 of 5 were "
        f"right, {format_number(length.tokens_per_s(best, 0.8))} if 4 of 5 were, where a pass without drafts gives "
        f"{format_number(length.tokens_per_s(0))}; the number follows what is right"
    )


def _draft_report(request: RunRequest, handle: Handle, generated: int) -> DraftReport | None:
    length = handle.draft_length
    if request.draft is None or length is None:
        return None
    drafted, passes = length.drafted, handle.passes
    seconds = passes[-1].end_s - passes[0].end_s
    mean = round(drafted.drafted / drafted.passes) if drafted.passes else 0
    return DraftReport(
        kind=LOOKUP if request.draft == LOOKUP else "model",
        drafted=drafted,
        plain_tokens_per_s=1 / length.pass_s(1),
        predicted_tokens_per_s=drafted.tokens_per_pass / (length.pass_s(1 + mean) + mean * length.draft_s),
        measured_tokens_per_s=(generated - 1) / seconds if seconds > 0 else 0.0,
    )


def _new_tokens(request: RunRequest, prompts: PromptBatch, model: StoredModel) -> int:
    """Tokens to generate; raises InvalidRequestError, with the numbers, where the context does not hold them."""
    longest, context = prompts.longest, model.context_tokens
    if longest >= context:
        raise InvalidRequestError(
            f"the prompt has {longest} tokens, but {model.name} takes at most {context} tokens, "
            f"prompt and answer together; shorten the prompt to at most {context - 1} tokens"
        )
    if request.max_new_tokens is None:
        return max(request.min_new_tokens or 1, min(DEFAULT_NEW_TOKENS, context - longest))
    if longest + request.max_new_tokens > context:
        raise InvalidRequestError(
            f"a prompt of {longest} tokens and {request.max_new_tokens} new ones come to "
            f"{longest + request.max_new_tokens}, but {model.name} takes at most {context} tokens; "
            f"give --max-new-tokens {context - longest} or less, or shorten the prompt"
        )
    return request.max_new_tokens


def _refuse_mixed_lengths(directory: Path, prompts: PromptBatch, new_tokens: int, request: RunRequest) -> None:
    """Raise InvalidRequestError for prompts that would change one another's texts."""
    shortest, longest = min(prompts.lengths), prompts.longest
    if shortest == longest:
        return
    from headrace.inference.batching.packable import padding_changes
    from headrace.inference.skeleton import read_transformers_config
    from headrace.inference.transformers_seam import length_switch

    config = read_transformers_config(directory, trust_remote_code=request.options.trust_remote_code)
    switch = length_switch(config)
    if switch is not None and longest + new_tokens - 1 > switch:
        why = f"beyond {switch} tokens this model's positions depend on the longest text of a pass"
    elif padding_changes(config):
        why = "this model takes the padding of shorter prompts for text"
    else:
        return
    raise InvalidRequestError(
        f"{why}, so prompts of {shortest} to {longest} tokens would change one another's texts; give one --prompt at a "
        "time, or use headrace batch"
    )


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: PromptBatch,
    request: RunRequest,
    defaults: GenerationDefaults,
    new_tokens: int,
    display: Display | None,
    draft: Any = None,
) -> list[tuple[str, int]]:
    """Text and number of new tokens for each prompt."""
    import torch

    from headrace.cli.text_stream import Answers, TextStream

    sampling = request.sampling
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    options = sampling.generate_options()
    model.generation_config = defaults.config(do_sample=sampling.draws)
    stops = () if request.ignore_eos else defaults.stops
    answers = Answers(tokenizer, stops, prompt_tokens=prompts.longest)
    if request.ignore_eos:
        model.generation_config.eos_token_id = None
    if stops:
        options["stopping_criteria"] = [answers]
    if request.min_new_tokens is not None:
        options["min_new_tokens"] = request.min_new_tokens
    if draft is not None:
        options["assistant_model"] = draft
    elif request.draft == LOOKUP:
        options |= {"prompt_lookup_num_tokens": request.options.draft_tokens, "max_matching_ngram_size": LOOKUP_NGRAM}
    if display is not None and len(prompts.lengths) == 1 and sampling.num_beams == 1:
        options["streamer"] = TextStream(answers, display.write)
    sequences = model.generate(
        input_ids=prompts.input_ids.to(model.device),
        attention_mask=prompts.attention_mask.to(model.device),
        max_new_tokens=new_tokens,
        pad_token_id=prompts.pad_token_id,
        **options,
    )
    generated = []
    for row in sequences[:, prompts.longest :].tolist():
        tokens = _until_end(row, model.generation_config.eos_token_id)
        generated.append(answers.text_and_length(tokens))
    return generated


def _until_end(tokens: list[int], eos_token_id: int | list[int] | None) -> list[int]:
    """Return the tokens of one sequence without the padding behind its end-of-text token."""
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    for number, token in enumerate(tokens, start=1):
        if token in ends:
            return tokens[:number]
    return tokens


def _announcement(model: StoredModel, options: Options, device: Device) -> str:
    """Weights next to the memory that they may take."""
    least_bytes = RESERVE_MIN_BYTES if device.uses_host_memory else DEVICE_RESERVE_MIN_BYTES
    reserve = f"{RESERVE_SHARE:.0%}, at least {format_bytes(least_bytes)}"
    given = options.asked.memory is not None
    origin = "" if given else f" (what is free now, less a reserve of {reserve})"
    where = (
        ""
        if device.uses_host_memory
        else f" of {device.name}, and {format_bytes(options.host_budget_bytes)} of the host"
    )
    return (
        f"{model.name}: {format_bytes(model.weights_bytes)} of weights; headrace may hold "
        f"{format_bytes(options.budget_bytes)}{origin}{where}"
    )


def _describe(handle: Handle) -> str:
    from headrace.inference.api import describe_plan

    return f"plan: {describe_plan(handle.plan)}"
