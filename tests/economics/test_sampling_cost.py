"""Best of n, beams and revisions: the workload that stands for each, and the tokens computed for what is kept."""

from __future__ import annotations

import pytest

from headrace.economics.sampling_cost import SAMPLING, sampled_work
from headrace.errors import InvalidRequestError
from headrace.planning.workload import Workload

WORK = Workload(sequences=1, prompt_tokens=512, generate_tokens=128)


@pytest.mark.parametrize(
    ("text", "work", "multiplier"),
    [
        ("greedy", WORK, 1.0),
        ("best-of:8", Workload(sequences=8, prompt_tokens=512, generate_tokens=128), 8.0),
        ("samples:16", Workload(sequences=16, prompt_tokens=512, generate_tokens=128), 1.0),
        ("revise:2", Workload(sequences=1, prompt_tokens=512, generate_tokens=5 * 128), 5.0),
        ("think:9", Workload(sequences=1, prompt_tokens=512, generate_tokens=10 * 128), 10.0),
    ],
)
def test_texts_are_decoded_side_by_side_or_one_after_another(text: str, work: Workload, multiplier: float) -> None:
    assert sampled_work(WORK, text)[:2] == (work, multiplier)


@pytest.mark.parametrize("name", list(SAMPLING))
def test_every_method_with_its_least_number_is_greedy_or_dearer_and_explains_itself(name: str) -> None:
    work, multiplier, why = sampled_work(WORK, f"{name}:1")
    assert work.sequences * work.generate_tokens >= WORK.sequences * WORK.generate_tokens
    assert multiplier >= 1
    assert "{" not in why
    assert len(why) > 80


@pytest.mark.parametrize("name", list(SAMPLING))
def test_the_tokens_handed_over_are_what_was_asked_for(name: str) -> None:
    work, multiplier, _ = sampled_work(WORK, f"{name}:3")
    wanted = WORK.sequences * WORK.generate_tokens * (3 if name == "samples" else 1)
    assert work.sequences * work.generate_tokens / multiplier == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("bestof:4", "did you mean best-of"),
        ("best-of", "whole number"),
        ("best-of:0", "between 1"),
        ("best-of:-3", "whole number"),
        ("best-of:2.5", "whole number"),
        ("best-of:99999999", "between 1"),
        ("revise:2:3", "whole number"),
        ("speculative:4", "--draft-tokens 4"),
        ("speculative:x", "whole number"),
        ("", "known: greedy"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        sampled_work(WORK, text)
