"""What is typed reaches the model, whatever form of contents a template wants; else it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cli_checkpoints import write_tokenizer
from headrace.cli.prompt import load_tokenizer
from headrace.errors import InvalidRequestError
from headrace.inference.chat_template import ChatTemplate

EACH = "{% for m in messages %}"
END = "{% endfor %}"
PARTS = "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
TEXT = "{{ m['content'] }} "
ASKS = "{% if m['content'] is string %}{{ raise_exception('parts, please') }}{% endif %}"
USER = "{% if m['role'] == 'user' %}"
ONE = [{"role": "user", "content": "w5 w6"}]
TWO = [{"role": "system", "content": "w7"}, *ONE]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("chatting")
    write_tokenizer(directory, chat=True)
    (directory / "chat_template.jinja").write_text(EACH + TEXT + END, encoding="utf-8-sig")
    return load_tokenizer(directory, trust_remote_code=False)


def tokens(tokenizer: Any, template: str, messages: list[dict[str, str]]) -> list[int]:
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer).tokens(messages)


def test_a_byte_order_mark_is_no_part_of_a_template(tokenizer: Any) -> None:
    assert ChatTemplate(tokenizer).tokens(ONE) == [5, 6]


@pytest.mark.parametrize(
    "template",
    [
        EACH + TEXT + END,
        EACH + PARTS + END,
        EACH + ASKS + PARTS + END,
        EACH + "{{ m['content'][0]['text'] }} " + END,
        EACH + USER + PARTS + "{% else %}" + TEXT + "{% endif %}" + END,  # one role in parts, the other as text
        EACH + "{{ m['content'] | trim | upper | lower }} " + END,
    ],
)
def test_contents_are_given_in_the_form_that_the_template_wants(tokenizer: Any, template: str) -> None:
    assert tokens(tokenizer, template, TWO) == [7, 5, 6]
    assert tokens(tokenizer, template, ONE) == [5, 6]


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        ("", ONE, "leaves out the content of the user's message"),
        ("w3", ONE, "leaves out the content of the user's message"),
        (EACH + USER + TEXT + "{% endif %}" + END, TWO, "leaves out the content of the system's message"),
        (EACH + TEXT + END, [{**ONE[0], "name": "w8"}], "leaves out the name of the user's message"),
        (EACH + "{{ m['content'][:4] }} " + END, ONE, "leaves out the content of the user's message"),
        ("{{ raise_exception('roles') }}", ONE, "refuses the messages: roles"),
        (
            EACH + "{{ m['content'] | replace('w', ' ') | replace('5', ' ') | replace('6', ' ') }}" + END,
            ONE,
            "no tokens",
        ),
    ],
)
def test_what_would_not_reach_the_model_is_refused(
    tokenizer: Any, template: str, messages: list[dict[str, str]], what: str
) -> None:
    with pytest.raises(InvalidRequestError, match=what):
        tokens(tokenizer, template or " ", messages)
