"""Lines of a batch file: every field used or refused by name, nothing raised for a bad line."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.inference.batching.request import BatchRequest, Defaults, parse_line
from headrace.inference.batching.sampling import Decoding

MESSAGES = [{"role": "user", "content": "hello"}]


def parse(value: Any, number: int = 1) -> BatchRequest:
    parsed = parse_line(json.dumps(value).encode(), number, Defaults())
    assert parsed.error is None, parsed.error
    assert parsed.request is not None
    return parsed.request


def refusal(value: Any) -> tuple[str, str | None]:
    parsed = parse_line(value if isinstance(value, bytes) else json.dumps(value).encode(), 7, Defaults())
    assert parsed.error is not None, "it was accepted"
    assert parsed.request is None
    return str(parsed.error), parsed.error.parameter


def test_openai_chat_line() -> None:
    body = {"model": "any", "messages": MESSAGES, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "n": 2}
    found = parse({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body})
    assert (found.custom_id, found.chat, found.max_tokens, found.choices) == ("a", True, 9, 2)
    assert (found.decoding.temperature, found.decoding.top_p) == (0.5, 0.9)


def test_plain_prompt_line_has_the_number_of_its_line_as_id() -> None:
    found = parse({"prompt": "hello"}, number=12)
    assert (found.custom_id, found.chat, found.prompt) == ("line-12", False, "hello")
    assert found.decoding == Decoding()
    assert found.max_tokens == Defaults().max_tokens


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "the \\ud83d river"}', "half of a character"),
        (b'{"messages": [{"role": "user", "content": "\\uDE00"}]}', "half of a character"),
        (b'{"custom_id": "\xed\xa0\xbd", "prompt": "a"}', "half of a character"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no number in JSON"),
        (b'{"prompt": "a", "logit_bias": {"1": 1' + b"0" * 400 + b"}}", "line 7 cannot be taken"),
        (b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}", "line 7"),
    ],
)
def test_no_line_ends_the_job(line: bytes, words: str) -> None:
    assert words in refusal(line)[0]


def test_whole_characters_beyond_the_first_plane_are_taken() -> None:
    assert parse({"prompt": "\N{GRINNING FACE}"}).prompt == "\N{GRINNING FACE}"


def test_names_go_with_their_messages() -> None:
    found = parse({"messages": [{**MESSAGES[0], "name": "ann"}]})
    assert found.messages == ({"role": "user", "content": "hello", "name": "ann"},)


def test_content_in_parts_and_token_prompts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "ab"
    assert parse({"prompt": [3, 4]}).prompt == (3, 4)
    assert parse({"prompt": ["one"]}).prompt == "one"


def test_naming_a_way_of_drawing_means_to_draw() -> None:
    assert parse({"prompt": "a", "top_p": 0.5}).decoding.temperature == 1.0
    assert parse({"prompt": "a", "top_p": 0.5, "temperature": 0}).decoding.temperature == 0.0
    own = parse_line(b'{"prompt": "a", "top_p": 0.5}', 1, Defaults(drawing_temperature=0.6)).request
    assert own is not None
    assert own.decoding.temperature == 0.6


def test_seed_is_the_same_in_every_start_and_another_for_every_request() -> None:
    one, again, other = (parse({"custom_id": name, "prompt": "x"}) for name in ("a", "a", "b"))
    assert one.seed == again.seed != other.seed
    assert parse({"prompt": "x", "seed": 5}).seed == 5


def test_log_probabilities_of_both_kinds() -> None:
    assert parse({"prompt": "x", "logprobs": 3}).decoding.logprobs == 3
    assert parse({"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}).decoding.logprobs == 2
    assert parse({"messages": MESSAGES, "logprobs": True}).decoding.logprobs == 0
    assert parse({"messages": MESSAGES}).decoding.logprobs is None


@pytest.mark.parametrize(
    ("line", "parameter", "words"),
    [
        ({"prompt": "x", "tools": []}, "tools", "not supported"),
        ({"prompt": "x", "temprature": 1}, "temprature", "not supported"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "from 1"),
        ({"prompt": "x", "max_tokens": 2.5}, "max_tokens", "whole number"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens", "whole number"),
        ({"prompt": "x", "temperature": 3}, "temperature", "from 0 to 2"),
        ({"prompt": "x", "temperature": "hot"}, "temperature", "number"),
        ({"prompt": "x", "top_p": 0}, "top_p", "above 0"),
        ({"prompt": "x", "n": 1000}, "n", "from 1"),
        ({"prompt": "x", "stop": [""]}, "stop", "empty"),
        ({"prompt": "x", "seed": "s"}, "seed", "whole number"),
        ({"prompt": "x", "stream": True}, "stream", "not supported"),
        ({"prompt": "x", "echo": True}, "echo", "not supported"),
        ({"prompt": "x", "best_of": 3}, "best_of", "not supported"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"prompt": "x", "ignore_eos": 1}, "ignore_eos", "true or false"),
        ({"prompt": ""}, "prompt", "not empty"),
        ({"prompt": [1, -2]}, "prompt", "token ids"),
        ({"prompt": "x", "messages": MESSAGES}, "prompt", "both"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "null"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "type text"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"body": {"prompt": "x"}, "url": "/v1/embeddings"}, "url", "not supported"),
        ({"body": {"prompt": "x"}, "method": "GET"}, "method", "POST"),
        ({"body": {"prompt": "x"}, "max_tokens": 3}, "max_tokens", "outside body"),
        ({"body": 3}, "body", "a number"),
        ({"custom_id": 3, "prompt": "x"}, "custom_id", "must be a text"),
        ({}, "prompt", "neither"),
        ([1], None, "a list"),
        (b"{", None, "line 7 is not JSON"),
        (b'{"prompt": "\xff"}', None, "not UTF-8"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(line: Any, parameter: str | None, words: str) -> None:
    message, found = refusal(line)
    assert found == parameter
    assert words in message


@settings(max_examples=300, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["custom_id", "body", "prompt", "messages", "max_tokens", "role", "content", "n", "stop", "seed",
                     "logit_bias", "logprobs", "temperature", "url", "x"]), x)))  # fmt: skip
def test_no_line_makes_the_job_fail(value: Any) -> None:
    parsed = parse_line(json.dumps(value).encode(), 1, Defaults())
    assert (parsed.request is None) != (parsed.error is None)
