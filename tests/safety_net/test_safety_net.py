"""Planning commands answer what they answered when this was recorded (README.md here says how to record anew)."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from safety_net.answers import RECORDED, answer, comparable, differences, recorded, write_checkpoints
from safety_net.cases import CASES

MOST_SHOWN = 20


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(directory)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_a_command_answers_what_it_answered(
    case: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    moved = list(islice(differences(recorded(case), answer(case, checkpoints)), MOST_SHOWN))
    assert not moved, f"headrace {CASES[case]} --json\n" + "\n".join(moved)


def test_every_record_has_its_case() -> None:
    assert {path.stem for path in RECORDED.glob("*.json")} == set(CASES)


def test_differences_name_the_place_and_both_values() -> None:
    row = {"name": "overlap", "s": 1.0, "fits": True, "why_not": None}
    before = comparable({"rows": [row], "binds": "host link"})
    now = comparable({"rows": [row | {"s": 1.0 + 1e-8, "fits": 1, "why_not": "a b"}], "binds": "host", "n": 1})
    assert list(differences(before, now)) == [
        "$.rows[0:overlap].s: was 1.0, is 1.00000001",
        "$.rows[0:overlap].fits: was true, is 1",
        '$.rows[0:overlap].why_not: was null, is "..."',
        '$.binds: was "host link", is "host"',
        "$.n: is new, 1",
    ]
    assert not list(differences({"s": 1.0, "why_not": "..."}, comparable({"s": 1 + 1e-10, "why_not": "no room"})))
    assert list(differences([1, 2], [1])) == ["$: had 2 entries, has 1"]
