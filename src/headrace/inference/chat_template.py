"""Messages put into a model's chat template, so that each of them reaches the model.

A template is a program of the model's authors. Some want contents as text, some as lists of parts, some know only
certain roles; what such a program is not made for it mostly passes over in silence. So it is tried first on marked
messages of the same roles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.errors import InvalidRequestError

_PARTS_AS_THEY_STAND = ("'type': 'text'", '"type": "text"')
"""what is seen of a list of parts where a template writes it as if it were a text"""


class ChatTemplate:
    """The template of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._forms: dict[tuple[Any, ...], tuple[bool, ...]] = {}

    @property
    def is_there(self) -> bool:
        """Whether the tokenizer has a template."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of messages, each with a role and a content, and of the beginning of an answer.

        Raises InvalidRequestError where the template refuses a message or leaves it out.
        """
        shape = tuple((message["role"], "name" in message) for message in messages)
        if shape not in self._forms:
            self._forms[shape] = self._find_forms(messages)
        try:
            text = self._render(messages, self._forms[shape])
        except Exception as error:
            raise _refused(error) from error
        tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise InvalidRequestError("this model's chat template makes no tokens of the messages")
        return list(tokens)

    def _find_forms(self, messages: Sequence[Mapping[str, str]]) -> tuple[bool, ...]:
        """For each message, whether its content has to be a list of parts."""
        marked = [
            {name: text if name == "role" else f"{name}mark{number}end" for name, text in message.items()}
            for number, message in enumerate(messages)
        ]
        in_parts = (False,) * len(messages)
        refusal: Exception | None = None
        left_out: list[str] = []
        for _ in range(2):
            try:
                text = self._render(marked, in_parts).casefold()
            except Exception as error:  # a template may raise anything
                refusal = refusal or error
                in_parts = (True,) * len(messages)
                continue
            missing = [
                f"the {name} of the {message['role']}'s message"
                for message in marked
                for name, mark in message.items()
                if name != "role" and mark not in text
            ]
            if not missing and not (any(in_parts) and any(parts in text for parts in _PARTS_AS_THEY_STAND)):
                return in_parts
            left_out = missing or left_out
            in_parts = tuple(message["content"] not in text for message in marked)
        if refusal is not None:
            raise _refused(refusal) from refusal
        raise InvalidRequestError(f"this model's chat template leaves out {left_out[0]}")

    def _render(self, messages: Sequence[Mapping[str, str]], in_parts: Sequence[bool]) -> str:
        formed = [
            {**message, "content": [{"type": "text", "text": message["content"]}]} if parts else dict(message)
            for message, parts in zip(messages, in_parts, strict=True)
        ]
        return str(self._tokenizer.apply_chat_template(formed, tokenize=False, add_generation_prompt=True))


def _refused(error: Exception) -> InvalidRequestError:
    return InvalidRequestError(f"this model's chat template refuses the messages: {error}")
