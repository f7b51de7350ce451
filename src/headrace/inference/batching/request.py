"""One line of a batch file: read, checked, and every field either used or refused by name.

Lines are requests of the OpenAI Batch format (`custom_id`, `method`, `url`, `body`) for chat completions and
completions, or plain objects with a `prompt` or `messages` beside the same parameters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from headrace.errors import InvalidRequestError
from headrace.inference.batching.sampling import Decoding

CHAT_URL, COMPLETION_URL = "/v1/chat/completions", "/v1/completions"
_ENVELOPE = {"custom_id", "method", "url", "body"}
_SAMPLING = {
    "model", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "presence_penalty",
    "frequency_penalty", "logit_bias", "logprobs", "min_tokens", "ignore_eos", "stream", "user", "metadata",
}  # fmt: skip
_CHAT = _SAMPLING | {"messages", "max_completion_tokens", "top_logprobs", "response_format"}
_COMPLETION = _SAMPLING | {"prompt", "echo", "suffix", "best_of"}
MOST_CHOICES, MOST_LOGPROBS = 128, 20
INVALID_LINE = "invalid_json_line"


class RequestError(InvalidRequestError):
    """A single request that cannot be answered. `parameter` names the field, `code` is for programs."""

    def __init__(self, message: str, *, parameter: str | None = None, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.parameter = parameter
        self.code = code


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What requests get that say nothing about it."""

    max_tokens: int = 128
    temperature: float = 0.0
    drawing_temperature: float = 1.0
    """of requests that name another way of drawing"""


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """One request, checked as far as that goes without a tokenizer."""

    custom_id: str
    chat: bool
    messages: tuple[Mapping[str, Any], ...] = ()
    prompt: str | tuple[int, ...] = ""
    max_tokens: int
    max_tokens_given: bool
    choices: int
    decoding: Decoding
    stop: tuple[str, ...]
    seed: int
    ignore_eos: bool
    digest: str
    """of everything that decides the answer"""


class ParsedLine(NamedTuple):
    """A line of the input: its id, and a request or what is wrong with it."""

    custom_id: str
    request: BatchRequest | None
    error: RequestError | None
    digest: str


def parse_line(line: bytes, number: int, defaults: Defaults) -> ParsedLine:
    """Read line `number` (from 1). Never raises: whatever is wrong comes back as an error with the line's id."""
    fallback = f"line-{number}"
    digest = hashlib.sha256(line.strip()).hexdigest()
    try:
        raw = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        problem = RequestError(f"line {number} is not JSON: {reason}", code=INVALID_LINE)
        return ParsedLine(fallback, None, problem, digest)
    custom_id = fallback
    try:
        if not isinstance(raw, dict):
            raise RequestError(f"line {number} holds {_kind(raw)} where a JSON object is expected", code=INVALID_LINE)
        if "custom_id" in raw:
            custom_id = _text(raw, "custom_id")
        text = json.dumps(raw, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        _refuse_half_characters(raw, text)
        return ParsedLine(custom_id, _request(raw, custom_id, digest, defaults), None, digest)
    except RequestError as error:
        return ParsedLine(custom_id, None, error, digest)
    except Exception as error:  # numbers beyond all bounds, lists within lists: no line ends the job
        problem = RequestError(f"line {number} cannot be taken: {type(error).__name__}: {error}")
        return ParsedLine(custom_id, None, problem, digest)


def _request(raw: dict[str, Any], custom_id: str, digest: str, defaults: Defaults) -> BatchRequest:
    body, chat = _body(raw)
    unknown = sorted(set(body) - (_CHAT if chat else _COMPLETION))
    if unknown:
        raise RequestError(
            f"parameter {unknown[0]!r} is not supported in {'chat completions' if chat else 'completions'}; nothing "
            "is ignored silently, so leave it out",
            parameter=unknown[0],
            code="unsupported_parameter",
        )
    _refuse_unless(body, "stream", (False,))
    if chat:
        _refuse_unless(body, "response_format", ({"type": "text"},))
    else:
        _refuse_unless(body, "echo", (False,))
        _refuse_unless(body, "suffix", ("",))
        _refuse_unless(body, "best_of", (body.get("n") or 1,))
    asked = _most_tokens(body, chat)
    temperature = _number(body, "temperature", 0.0, 2.0)
    top_p = _number(body, "top_p", 0.0, 1.0)
    top_k = _count(body, "top_k", 1, 1 << 30)
    if top_p == 0:
        raise RequestError("top_p must be above 0 and at most 1, not 0", parameter="top_p")
    if temperature is None:
        # A request that names a way of drawing wants to draw.
        draws = top_p is not None or top_k is not None
        temperature = defaults.drawing_temperature if draws else defaults.temperature
    seed = body.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64):
        raise RequestError(f"seed must be a whole number of 64 bits, not {seed!r}", parameter="seed")
    if seed is None:  # a seed of its own, the same in every start
        seed = int(hashlib.sha256(f"{custom_id}\n{digest}".encode()).hexdigest()[:15], 16)
    return BatchRequest(
        custom_id=custom_id,
        chat=chat,
        messages=_messages(body) if chat else (),
        prompt="" if chat else _prompt(body),
        max_tokens=asked if asked is not None else defaults.max_tokens,
        max_tokens_given=asked is not None,
        choices=_count(body, "n", 1, MOST_CHOICES) or 1,
        decoding=Decoding(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            presence_penalty=_number(body, "presence_penalty", -2.0, 2.0) or 0.0,
            frequency_penalty=_number(body, "frequency_penalty", -2.0, 2.0) or 0.0,
            logit_bias=_logit_bias(body),
            logprobs=_logprobs(body, chat),
            min_tokens=_count(body, "min_tokens", 0, 1 << 30) or 0,
        ),
        stop=_stop(body),
        seed=seed % 2**64,
        ignore_eos=_flag(body, "ignore_eos"),
        digest=digest,
    )


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _refuse_half_characters(raw: object, text: str) -> None:
    r"""Raise RequestError for a \ud83d without its other half, which UTF-8 has no bytes for. `text`: `raw` in JSON."""
    if "\\ud" in text:
        try:
            json.dumps(raw, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = str(error.object)[error.start]
            raise RequestError(f"the line holds {half!r}, half of a character; complete it or leave it out") from error


def _body(raw: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The parameters, and whether they are of a chat completion."""
    if "body" in raw:
        extra = sorted(set(raw) - _ENVELOPE)
        if extra:
            raise RequestError(f"{extra[0]!r} is outside body; put parameters into body", parameter=extra[0])
        if raw.get("method", "POST") != "POST":
            raise RequestError(f"method must be POST, not {raw['method']!r}", parameter="method")
        if not isinstance(raw["body"], dict):
            raise RequestError(f"body is {_kind(raw['body'])} where an object is expected", parameter="body")
        body = raw["body"]
        url = raw.get("url", CHAT_URL if "messages" in body else COMPLETION_URL)
        if url not in (CHAT_URL, COMPLETION_URL):
            raise RequestError(f"url {url!r} is not supported; choose {CHAT_URL} or {COMPLETION_URL}", parameter="url")
        return body, url == CHAT_URL
    body = {name: value for name, value in raw.items() if name != "custom_id"}
    if "prompt" not in body and "messages" not in body:
        raise RequestError("the line has neither a body nor a prompt nor messages", parameter="prompt")
    if "prompt" in body and "messages" in body:
        raise RequestError("the line has both a prompt and messages; give one of them", parameter="prompt")
    return body, "messages" in body


def _messages(body: dict[str, Any]) -> tuple[Mapping[str, Any], ...]:
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise RequestError("messages must be a list with at least one message", parameter="messages")
    messages = []
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"{where} must be an object with a role and a content", parameter=where)
        extra = sorted(set(message) - {"role", "content", "name"})
        if extra:
            raise RequestError(f"{where}: {extra[0]!r} is not supported", parameter=f"{where}.{extra[0]}")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_text_part(part, f"{where}.content") for part in content)
        if not isinstance(content, str):
            raise RequestError(f"{where}.content must be text, not {_kind(content)}", parameter=f"{where}.content")
        messages.append({"role": message["role"], "content": content})
        if message.get("name") is not None:
            messages[-1]["name"] = _text(message, "name")
    return tuple(messages)


def _text_part(part: object, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise RequestError(f"{where}: only parts of type text are supported", parameter=where)
    return str(part["text"])


def _prompt(body: dict[str, Any]) -> str | tuple[int, ...]:
    given = body.get("prompt")
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], (str, list)):
        given = given[0]
    if isinstance(given, str) and given:
        return given
    if isinstance(given, list) and given and all(type(token) is int and token >= 0 for token in given):
        return tuple(given)
    raise RequestError("prompt must be a text or a list of token ids, not empty", parameter="prompt")


def _most_tokens(body: dict[str, Any], chat: bool) -> int | None:  # noqa: FBT001 - one flag, private
    found = _count(body, "max_tokens", 1, 1 << 30)
    if chat and body.get("max_completion_tokens") is not None:
        other = _count(body, "max_completion_tokens", 1, 1 << 30)
        if found is not None and found != other:
            raise RequestError("max_tokens and max_completion_tokens differ", parameter="max_tokens")
        return other
    return found


def _logprobs(body: dict[str, Any], chat: bool) -> int | None:  # noqa: FBT001
    if not chat:
        return _count(body, "logprobs", 0, MOST_LOGPROBS)
    top = _count(body, "top_logprobs", 0, MOST_LOGPROBS)
    if not _flag(body, "logprobs"):
        if top:
            raise RequestError("top_logprobs needs logprobs to be true", parameter="top_logprobs")
        return None
    return top or 0


def _logit_bias(body: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    given = body.get("logit_bias")
    if given is None:
        return ()
    try:
        found = tuple((int(token), float(bias)) for token, bias in given.items())
    except (AttributeError, TypeError, ValueError):
        found = ((-1, 0.0),)
    if any(token < 0 or not -100 <= bias <= 100 for token, bias in found):
        raise RequestError("logit_bias must map token ids to numbers from -100 to 100", parameter="logit_bias")
    return found


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    given = body.get("stop")
    texts = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise RequestError("stop must be a text or a list of texts, none of them empty", parameter="stop")
    return tuple(texts)


def _refuse_unless(body: dict[str, Any], name: str, allowed: tuple[Any, ...]) -> None:
    if body.get(name) is not None and body[name] not in allowed:
        raise RequestError(
            f"{name} {body[name]!r} is not supported; leave it out", parameter=name, code="unsupported_parameter"
        )


def _number(body: dict[str, Any], name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}", parameter=name)
    return float(value)


def _count(body: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, not {value!r}", parameter=name)
    return value


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, not {value!r}", parameter=name)
    return bool(value)


def _text(raw: dict[str, Any], name: str) -> str:
    value = raw[name]
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} must be a text, not {value!r}", parameter=name)
    return value


def _kind(value: object) -> str:
    names: dict[type, Callable[[], str] | str] = {list: "a list", str: "a text", bool: "true or false"}
    return str(names.get(type(value), "null" if value is None else "a number"))
