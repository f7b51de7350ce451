"""The number of drafts follows what pays: many where passes wait for the disk, none where they are wrong."""

from __future__ import annotations

import random

import pytest

from headrace.planning.jobs.draft_length import DraftLength


def disk_bound(tokens: int) -> float:
    return max(1.0, 0.05 * tokens)


def compute_bound(tokens: int) -> float:
    return 0.2 + 0.8 * tokens


def play(length: DraftLength, acceptance: float, passes: int, pass_s: float | None = None) -> tuple[float, float]:
    """Tokens per second with drafting, and without."""
    draw = random.Random(4)
    seconds = tokens = 0.0
    for _ in range(passes):
        wanted = length.next_length()
        right = 0
        while right < wanted and draw.random() < acceptance:
            right += 1
        took = (pass_s or length.pass_s(1 + wanted)) + wanted * length.draft_s
        length.record(wanted, right, took)
        seconds, tokens = seconds + took, tokens + 1 + right
    return tokens / seconds, 1 / length.pass_s(1)


@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("pass_s", [disk_bound, compute_bound])
@pytest.mark.parametrize("draft_s", [0.0, 0.05, 2.0])
def test_never_slower_than_plain_by_more_than_five_per_cent(acceptance: float, pass_s: object, draft_s: float) -> None:
    length = DraftLength(pass_s=pass_s, most=16, draft_s=draft_s)  # type: ignore[arg-type]
    drafting, plain = play(length, acceptance, 400)
    assert drafting >= 0.95 * plain


def test_free_tokens_are_used() -> None:
    length = DraftLength(pass_s=disk_bound, most=16)
    drafting, plain = play(length, 0.8, 300)
    assert drafting > 4 * plain
    assert length.drafted.longest > 8
    assert length.drafted.tokens_per_pass == pytest.approx(drafting / plain, rel=0.05)


def test_wrong_drafts_are_given_up() -> None:
    length = DraftLength(pass_s=compute_bound, most=16)
    play(length, 0.0, 400)
    assert length.drafted.drafted < 40
    assert length.believed < 0.2


def test_a_wrong_prediction_is_corrected_by_what_is_measured() -> None:
    """Drafts were thought to be free, and cost three times a plain pass."""
    length = DraftLength(pass_s=lambda tokens: 1.0, most=4)
    for _ in range(200):
        wanted = length.next_length()
        length.record(wanted, wanted // 2, 3.0 if wanted else 1.0)
    assert sum(length.next_length() > 0 for _ in range(64)) <= 4


def test_after_a_change_of_the_text_drafts_come_back() -> None:
    length = DraftLength(pass_s=lambda tokens: 1.0 + 0.15 * tokens, most=8)
    play(length, 0.0, 200)
    before = length.drafted.accepted
    play(length, 0.95, 600)
    assert length.drafted.accepted - before > 600
