"""The input of a batch job: what each line asks for in tokens, where it lies, and what is wrong with some.

The file is read twice: once before the job, for ids and lengths (which plan and prediction need), and line by line
again when a request's turn comes, so that a long job holds a few numbers per request and no texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from headrace.errors import InvalidRequestError
from headrace.inference.batching.common_prefixes import CommonPrefixes
from headrace.inference.batching.output_file import line_id
from headrace.inference.batching.request import INVALID_LINE, BatchRequest, Defaults, RequestError, parse_line
from headrace.inference.chat_template import ChatTemplate
from headrace.planning.jobs.packing import Need

SHARED_MIN_TOKENS = 32
_WHOLE_FILE_BYTES = 64 << 20


class Entry(NamedTuple):
    """A request as the job keeps it."""

    custom_id: str
    line_id: str
    line_number: int
    offset: int
    length: int
    prompt_tokens: int
    new_tokens: int
    choices: int


class Refused(NamedTuple):
    """A line that is answered with an error."""

    custom_id: str
    line_id: str
    error: RequestError


class Encoded(NamedTuple):
    """A request with its prompt in tokens and the most tokens it may get."""

    request: BatchRequest
    prompt: list[int]
    new_tokens: int


class LengthSwitch(NamedTuple):
    """The length beyond which a model's positions are others, for the whole of a sequence."""

    tokens: int
    computes_anew: bool
    """whether a sequence that grows beyond it is then computed anew"""

    def anew_at(self, prompt_tokens: int, new_tokens: int) -> int:
        """The tokens at which such a sequence is computed anew; 0: never."""
        grows_beyond = prompt_tokens <= self.tokens < prompt_tokens + new_tokens - 1
        return self.tokens + 1 if self.computes_anew and grows_beyond else 0


class Encoder:
    """Turns requests into tokens; raises RequestError for what this model cannot take."""

    def __init__(self, tokenizer: Any, *, context_tokens: int, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._context = context_tokens
        self._vocabulary = vocab_size

    def encode(self, request: BatchRequest) -> Encoded:
        """Tokenize; the answer is cut to the context where the request does not say how long it may be."""
        field = "messages" if request.chat else "prompt"
        try:
            prompt = self._chat(request) if request.chat else self._plain(request)
        except RequestError:
            raise
        except InvalidRequestError as error:
            raise RequestError(str(error), parameter=field) from error
        except Exception as error:  # whatever a tokenizer cannot take is this request's own
            raise RequestError(f"the tokenizer fails: {type(error).__name__}: {error}", parameter=field) from error
        if not prompt:
            raise RequestError("the prompt has no tokens in this model's vocabulary", parameter=field)
        if max(prompt) >= self._vocabulary:
            raise RequestError(f"token {max(prompt)} is not in the vocabulary of {self._vocabulary}", parameter=field)
        if any(token >= self._vocabulary for token, _ in request.decoding.logit_bias):
            raise RequestError("logit_bias names a token that is not in the vocabulary", parameter="logit_bias")
        left = self._context - len(prompt)
        if left < 1 or (request.max_tokens_given and request.max_tokens > left):
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and the answer may have {request.max_tokens}, but the model "
                f"takes at most {self._context} tokens, prompt and answer together",
                parameter=field if left < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        return Encoded(request, prompt, min(request.max_tokens, left))

    def _chat(self, request: BatchRequest) -> list[int]:
        if not self._template.is_there:
            raise RequestError(
                "this model's tokenizer has no chat template; give a prompt instead", parameter="messages"
            )
        return self._template.tokens(request.messages)

    def _plain(self, request: BatchRequest) -> list[int]:
        if isinstance(request.prompt, tuple):
            return list(request.prompt)
        return list(self._tokenizer(request.prompt)["input_ids"])


class JobInput:
    """All requests of a file, in its order. `job` is a digest of model and settings.

    Raises InvalidRequestError for a file that cannot be read, is empty, or uses a custom_id twice.
    """

    def __init__(
        self,
        path: Path,
        encoder: Encoder,
        defaults: Defaults,
        *,
        job: str,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self.refused: list[Refused] = []
        self._encoder, self._defaults, self._on_progress = encoder, defaults, on_progress
        self._lines: dict[str, int] = {}
        self._digests: dict[int, bytes] = {}
        self._common = CommonPrefixes()
        offset = 0
        for number, line in enumerate(_lines(path), start=1):
            self._take(line, number, offset, job)
            offset += len(line)
            on_progress(number)
        if not self._lines:
            raise InvalidRequestError(f"{path} holds no requests; one JSON object to a line is expected")
        self._refuse_other_formats()

    @property
    def ids(self) -> dict[str, str]:
        """The custom_id of every line -> the id of its answer."""
        found = {entry.custom_id: entry.line_id for entry in self.entries}
        return found | {line.custom_id: line.line_id for line in self.refused}

    def _take(self, line: bytes, number: int, offset: int, job: str) -> None:
        if not line.strip():
            return
        parsed = parse_line(line, number, self._defaults)
        if parsed.custom_id in self._lines:
            raise InvalidRequestError(
                f"{self.path}: lines {self._lines[parsed.custom_id]} and {number} have the same custom_id "
                f"{parsed.custom_id!r}; answers could not be told apart. Give each request an id of its own"
            )
        self._lines[parsed.custom_id] = number
        own_id = line_id(parsed.custom_id, parsed.digest, job)
        error = parsed.error
        if parsed.request is not None:
            try:
                encoded = self._encoder.encode(parsed.request)
            except RequestError as refused:
                error = refused
            else:
                choices = parsed.request.choices
                self._digests[number] = hashlib.blake2b(line, digest_size=8).digest()
                self._common.see(encoded.prompt)
                self.entries.append(
                    Entry(
                        parsed.custom_id, own_id, number, offset, len(line), len(encoded.prompt), encoded.new_tokens,
                        choices,
                    )
                )  # fmt: skip
        if error is not None:
            self.refused.append(Refused(parsed.custom_id, own_id, error))

    def _refuse_other_formats(self) -> None:
        """Raise where lines are no JSON because the file is not made of lines."""
        broken = [line for line in self.refused if line.error.code == INVALID_LINE]
        if not broken:
            return
        begins_broken = self._lines[broken[0].custom_id] == min(self._lines.values())
        if len(broken) == len(self._lines) or (begins_broken and _is_one_value(self.path)):
            raise InvalidRequestError(
                f"{self.path} is not JSONL: {broken[0].error}. Write one JSON object to a line (jq -c . FILE does it, "
                "jq -c '.[]' FILE for a list)"
            )

    def read(self, entry: Entry) -> Encoded:
        """Read and encode a request again; raises InvalidRequestError where the file changed meanwhile."""
        try:
            with open(self.path, "rb") as file:
                file.seek(entry.offset)
                line = file.read(entry.length)
        except OSError as error:
            raise InvalidRequestError(f"{self.path} cannot be read any more: {error.strerror}") from error
        if hashlib.blake2b(line, digest_size=8).digest() != self._digests[entry.line_number]:
            raise InvalidRequestError(
                f"line {entry.line_number} of {self.path} changed while the job ran; start again when it is settled"
            )
        request = parse_line(line, entry.line_number, self._defaults).request
        assert request is not None, "a line that could be read cannot be read again"
        return self._encoder.encode(request)

    def needs(
        self, entries: list[Entry], switch: LengthSwitch | None = None
    ) -> tuple[dict[Hashable, Need], dict[Hashable, Need], dict[Hashable, int]]:
        """What the sequences of these entries need, which prefixes they share, and an entry that begins with each.

        Sequences are keyed by the entry's place in the list and the number of the choice. Nothing is shared where a
        beginning's keys depend on what follows it, beyond `switch`.
        """
        needs: dict[Hashable, Need] = {}
        prefixes: dict[Hashable, Need] = {}
        examples: dict[Hashable, int] = {}
        shares = switch is None or all(entry.prompt_tokens + entry.new_tokens - 1 <= switch.tokens for entry in entries)
        any_shared = shares and self._common.any_shared
        for place, entry in enumerate(entries):
            prefix: Hashable | None = None
            shared = 0
            if any_shared and entry.prompt_tokens > SHARED_MIN_TOKENS:
                best = self._common.best(self.read(entry).prompt)
                if best is not None and best[0] >= SHARED_MIN_TOKENS:
                    shared, prefix = best[0], ("common", best[1])
                    prefixes.setdefault(prefix, Need(shared, 0))
                    examples.setdefault(prefix, place)
            if shares and entry.choices > 1 and entry.prompt_tokens > 1:
                own = ("prompt", place)
                prefixes[own] = Need(entry.prompt_tokens - 1, 0, prefix, shared)
                examples[own] = place
                prefix, shared = own, entry.prompt_tokens - 1
            anew_at = 0 if switch is None else switch.anew_at(entry.prompt_tokens, entry.new_tokens)
            for choice in range(entry.choices):
                needs[place, choice] = Need(entry.prompt_tokens, entry.new_tokens, prefix, shared, anew_at)
            if place % 64 == 0:
                self._on_progress(place)
        return needs, prefixes, examples


def _is_one_value(path: Path) -> bool:
    """Whether a file is JSON as a whole."""
    try:
        with open(path, "rb") as file:
            text = file.read(_WHOLE_FILE_BYTES)
        json.loads(text)
    except (OSError, ValueError, RecursionError):
        return False
    return True


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except OSError as error:
        raise InvalidRequestError(f"the input {path} cannot be read: {error.strerror}") from error
