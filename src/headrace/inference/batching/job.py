"""A batch job from its first pass to its last: packs passes, computes them, chooses tokens, writes answers."""

from __future__ import annotations

import codecs
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from headrace.inference.batching.job_input import Encoded, Entry, JobInput
from headrace.inference.batching.output_file import OutputFile
from headrace.inference.batching.ragged_pass import RaggedRunner
from headrace.inference.batching.rectangular_pass import RectangularRunner
from headrace.inference.batching.request import BatchRequest, RequestError
from headrace.inference.batching.sampling import Chosen, NotFiniteError, Sampler, sample_all
from headrace.inference.generation_defaults import GenerationDefaults
from headrace.inference.token_text import TokenTexts
from headrace.planning.jobs.forecast import PassLoad
from headrace.planning.jobs.groups import GroupScheduler
from headrace.planning.jobs.packing import PassScheduler

RECENT_PASSES = 1024
LEAST_LOGPROB = -9999.0


class DonePass(NamedTuple):
    """One pass of a job: what it carried, and its seconds on the host's clock."""

    load: PassLoad
    seconds: float


@dataclass(kw_only=True)
class Tally:
    """What a job has done so far, in this start."""

    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    """prompt tokens that were copied instead of computed"""
    generated_tokens: int = 0
    unused_tokens: int = 0
    """tokens that answers could have had and did not use"""
    passes: int = 0
    pass_tokens: int = 0
    seconds: float = 0.0
    recent: deque[DonePass] = field(default_factory=lambda: deque(maxlen=RECENT_PASSES))

    @property
    def full_pass_s(self) -> float:
        """Median seconds of the passes that carried one token of each of as many sequences as any pass did."""
        most = max((done.load.samples for done in self.recent), default=0)
        full = [done.seconds for done in self.recent if done.load.samples == done.load.tokens == most]
        return statistics.median(full[1:] or full) if full else 0.0

    def add(self, done: DonePass) -> None:
        """Count a pass."""
        self.passes += 1
        self.pass_tokens += done.load.tokens
        self.generated_tokens += done.load.samples
        self.seconds += done.seconds
        self.recent.append(done)


@dataclass(eq=False)
class _Sequence:
    """One choice of one request, as far as it is."""

    encoded: Encoded
    tokens: list[int]
    chooser: Sampler
    stops: tuple[str, ...]
    chosen: list[Chosen] = field(default_factory=list)


class _Choice(NamedTuple):
    """A finished choice."""

    text: str
    finish_reason: str
    generated: int
    chosen: list[Chosen]


class BatchJob:
    """Runs the sequences that were added to `scheduler` and appends each request's answer to `output`.

    `entries` are the requests; a key of the scheduler is (place in `entries`, number of the choice), or that of a
    prefix, for which `examples` names an entry that begins with it.
    """

    def __init__(
        self,
        *,
        model_name: str,
        source: JobInput,
        entries: Sequence[Entry],
        examples: dict[Hashable, int],
        scheduler: PassScheduler | GroupScheduler,
        runner: RaggedRunner | RectangularRunner,
        output: OutputFile,
        tokenizer: Any,
        defaults: GenerationDefaults,
        after_pass: Callable[[DonePass, Tally], None] = lambda _pass, _tally: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.tally = Tally()
        self._model_name = model_name
        self._source = source
        self._entries = entries
        self._examples = examples
        self._scheduler = scheduler
        self._runner = runner
        self._output = output
        self._texts = TokenTexts(tokenizer)
        self._defaults = defaults
        self._after_pass = after_pass
        self._clock = clock
        self._sequences: dict[Hashable, _Sequence] = {}
        self._prefixes: dict[Hashable, list[int]] = {}
        self._read: dict[int, Encoded] = {}
        self._choices: dict[int, dict[int, _Choice | RequestError]] = {}

    def run(self) -> Tally:
        """Compute pass after pass until every sequence has its tokens."""
        start = self._clock()
        while (packed := self._scheduler.pack()) is not None:
            logits = self._runner.run(packed.copies, packed.turns, [self._tokens(turn) for turn in packed.turns])
            self._scheduler.advance()
            self.tally.shared_tokens += sum(copy.tokens for copy in packed.copies)
            sampling = [turn.key for turn in packed.turns if turn.samples]
            choosers = [self._sequences[key].chooser for key in sampling]
            for key, chosen in zip(sampling, sample_all(choosers, logits), strict=True):
                self._take(key, chosen)
            end = self._clock()
            done = DonePass(PassLoad.of(packed), end - start)
            start = end
            self.tally.add(done)
            self._after_pass(done, self.tally)
        return self.tally

    def _tokens(self, turn: Any) -> list[int]:
        known = self._prefixes.get(turn.key)
        if known is None:
            sequence = self._sequences.get(turn.key)
            if sequence is None and turn.key in self._examples:
                known = self._encoded(self._examples[turn.key]).prompt
                self._prefixes[turn.key] = known
            else:
                known = (sequence or self._begin(turn.key)).tokens
        return known[turn.first : turn.first + turn.tokens]

    def _begin(self, key: Any) -> _Sequence:
        place, choice = key
        encoded = self._encoded(place)
        request = encoded.request
        seed = (request.seed + choice * 0x9E3779B97F4A7C15) % 2**64
        chooser = Sampler(
            request.decoding,
            seed,
            frozenset() if request.ignore_eos else self._defaults.ends,
            defaults=self._defaults,
            prompt=encoded.prompt,
            most_tokens=len(encoded.prompt) + encoded.new_tokens,
        )
        stops = (*request.stop, *(() if request.ignore_eos else self._defaults.stops))
        sequence = _Sequence(encoded, list(encoded.prompt), chooser, stops)
        self._sequences[key] = sequence
        self.tally.prompt_tokens += len(encoded.prompt) if choice == 0 else 0
        return sequence

    def _encoded(self, place: int) -> Encoded:
        found = self._read.get(place)
        if found is None:
            found = self._read[place] = self._source.read(self._entries[place])
        return found

    def _take(self, key: Any, chosen: Chosen | NotFiniteError) -> None:
        """Add a token to its sequence; end the sequence where that was the last."""
        sequence = self._sequences[key]
        if isinstance(chosen, NotFiniteError):
            self._end(key, RequestError(str(chosen), code="not_finite"))
            return
        sequence.tokens.append(chosen.token)
        sequence.chosen.append(chosen)
        try:
            choice = self._choice(sequence)
        except Exception as error:  # a tokenizer may fail on tokens of its model
            self._end(key, _fault(error))
            return
        if choice is not None:
            self._end(key, choice)

    def _choice(self, sequence: _Sequence) -> _Choice | None:
        """What a sequence has become if the last token was its last."""
        encoded = sequence.encoded
        generated = sequence.tokens[len(encoded.prompt) :]
        if generated[-1] in sequence.chooser.ends:
            return _Choice(self._texts.text(generated), "stop", len(generated), sequence.chosen)
        cut = self._texts.before_stop(generated, sequence.stops)
        if cut is not None:
            return _Choice(cut, "stop", len(generated), sequence.chosen)
        if len(generated) >= encoded.new_tokens:
            return _Choice(self._texts.text(generated), "length", len(generated), sequence.chosen)
        return None

    def _end(self, key: Any, choice: _Choice | RequestError) -> None:
        self._scheduler.finish(key)
        sequence = self._sequences.pop(key)
        place, number = key
        entry = self._entries[place]
        self.tally.unused_tokens += entry.new_tokens - len(sequence.chosen)
        choices = self._choices.setdefault(place, {})
        choices[number] = choice
        if len(choices) < entry.choices:
            return
        del self._choices[place]
        self._prefixes.pop(("prompt", place), None)
        line = self._line(entry, self._read.pop(place), choices)
        self.tally.errors += line["error"] is not None
        self.tally.requests += line["error"] is None
        self._output.write(line)

    def _line(self, entry: Entry, encoded: Encoded, choices: dict[int, _Choice | RequestError]) -> dict[str, Any]:
        """A request's answer, or what is wrong with one of its choices."""
        done = []
        for _number, choice in sorted(choices.items()):
            if isinstance(choice, RequestError):
                return error_line(entry.custom_id, entry.line_id, choice)
            done.append(choice)
        try:
            return self._answer(entry, encoded, done)
        except Exception as error:
            return error_line(entry.custom_id, entry.line_id, _fault(error))

    def _answer(self, entry: Entry, encoded: Encoded, choices: list[_Choice]) -> dict[str, Any]:
        request = encoded.request
        generated = sum(choice.generated for choice in choices)
        body = {
            "id": ("chatcmpl-" if request.chat else "cmpl-") + entry.line_id.removeprefix("batch_req_"),
            "object": "chat.completion" if request.chat else "text_completion",
            "created": int(time.time()),
            "model": self._model_name,
            "choices": [self._choice_json(number, choice, request) for number, choice in enumerate(choices)],
            "usage": {
                "prompt_tokens": len(encoded.prompt),
                "completion_tokens": generated,
                "total_tokens": len(encoded.prompt) + generated,
            },
        }
        return {
            "id": entry.line_id,
            "custom_id": entry.custom_id,
            "response": {"status_code": 200, "request_id": entry.line_id, "body": body},
            "error": None,
        }

    def _choice_json(self, number: int, choice: _Choice, request: BatchRequest) -> dict[str, Any]:
        found: dict[str, Any] = {"index": number}
        if request.chat:
            found["message"] = {"role": "assistant", "content": choice.text}
        else:
            found["text"] = choice.text
        found["logprobs"] = None if request.decoding.logprobs is None else self._logprobs(choice, chat=request.chat)
        found["finish_reason"] = choice.finish_reason
        return found

    def _logprobs(self, choice: _Choice, *, chat: bool) -> dict[str, Any]:
        def named(token: int, logprob: float) -> dict[str, Any]:
            found = self._texts.of(token)
            return {"token": found.text, "logprob": _finite(logprob), "bytes": list(found.data)}

        if chat:
            content = [
                named(item.token, item.logprob or 0.0) | {"top_logprobs": [named(*pair) for pair in item.likeliest]}
                for item in choice.chosen
            ]
            return {"content": content}
        characters = codecs.getincrementaldecoder("utf-8")("ignore")
        ends = [0]
        for item in choice.chosen:
            ends.append(ends[-1] + len(characters.decode(self._texts.of(item.token).data)))
        return {
            "tokens": [self._texts.of(item.token).text for item in choice.chosen],
            "token_logprobs": [_finite(item.logprob or 0.0) for item in choice.chosen],
            "top_logprobs": [self._likeliest(item) for item in choice.chosen],
            "text_offset": ends[:-1],
        }

    def _likeliest(self, item: Chosen) -> dict[str, float]:
        """Log-probabilities by text; of two tokens with the same text the likelier one's."""
        found: dict[str, float] = {}
        for token, logprob in item.likeliest:
            found.setdefault(self._texts.of(token).text, _finite(logprob))
        return found


def _finite(logprob: float) -> float:
    """JSON has no infinities; OpenAI writes a token without any probability like this."""
    return max(logprob, LEAST_LOGPROB)


def _fault(error: Exception) -> RequestError:
    """What went wrong with one request alone."""
    return RequestError(f"the answer could not be written: {type(error).__name__}: {error}", code="internal_error")


def error_line(custom_id: str, own_id: str, error: RequestError) -> dict[str, Any]:
    """The answer to a request that cannot be answered."""
    detail = {"code": error.code, "message": str(error), "param": error.parameter, "type": "invalid_request_error"}
    return {
        "id": own_id,
        "custom_id": custom_id,
        "response": {"status_code": 400, "request_id": own_id, "body": {"error": detail}},
        "error": {"code": error.code, "message": str(error)},
    }
