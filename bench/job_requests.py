"""Requests for batch benchmarks: chat and plain prompts and answers of mixed lengths, some text shared."""

from __future__ import annotations

import random
from typing import Any

SYSTEM = (
    "You are a careful assistant of a public library. Answer in plain words, keep to what was asked, and say so when "
    "you do not know. Do not invent titles, authors or dates. When a reader asks for a summary, give three sentences."
)
SUBJECTS = (
    "rivers", "mills", "clouds", "bridges", "bees", "glass", "maps", "tides", "bread", "clocks", "salt", "letters",
    "trains", "forests", "paper", "stars", "harbours", "music", "ice", "gardens",
)  # fmt: skip
ASKED = (
    "Name three facts about {0}.",
    "Explain {0} to a child.",
    "What do {0} and {1} have in common?",
    "Write a title for a story about {0}.",
    "Translate into French: the {0} and the {1}.",
)
SENTENCES = (
    "The {0} were first described in an old book that nobody had opened for a century. ",
    "People in the valley used {0} long before they knew anything about {1}. ",
    "In spring the {0} looked different, and those who cared for {1} wrote it down. ",
    "A traveller once paid for a night's rest with a drawing of {0}. ",
)
CODE = "def count_{0}(items):\n    total = 0\n    for item in items:\n        total = total + 1\n    return total\n"


def make_requests(count: int, *, seed: int = 1, answer_tokens: tuple[int, int] = (4, 24)) -> list[dict[str, Any]]:
    """`count` requests: questions, summaries, code edits and plain prompts, a quarter each; greedy."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        one, two = draw.sample(SUBJECTS, 2)
        line: dict[str, Any] = {"custom_id": f"request-{number}", "max_tokens": draw.randint(*answer_tokens)}
        kind = number % 4
        if kind == 0:
            line["messages"] = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": draw.choice(ASKED).format(one, two)},
            ]
        elif kind == 1:
            text = "".join(draw.choice(SENTENCES).format(one, two) for _ in range(draw.randint(2, 10)))
            line["messages"] = [{"role": "user", "content": f"Summarise this text in one sentence.\n\n{text}"}]
        elif kind == 2:
            code = CODE.format(one)
            line["messages"] = [{"role": "user", "content": f"Rename the variable total to {two}:\n\n{code}"}]
        else:
            line["prompt"] = f"A short note of the {number}th day about {one} and {two}:"
        found.append(line)
    return found
