"""`headrace fleet` and `headrace claims` as commands: text, JSON, numbers as people write them, mistakes."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from headrace.cli.claims_command import CLAIMS
from headrace.cli.fleet_command import FLEET as FLEET_COMMAND
from headrace.cli.main import main
from headrace.cli.options import parse_count
from headrace.errors import InvalidRequestError

FLEET = ["fleet", "gpt-3", "--machine", "8xh100", "--copies", "1e6", "--tokens-per-second", "10"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    made: dict[str, Any] = json.loads(out)
    return made


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8e9", 8e9),
        ("8 billion", 8e9),
        ("8bn", 8e9),
        ("8,000,000,000", 8e9),
        ("0.5", 0.5),
        (".02", 0.02),
        ("250000", 250_000),
        ("2.5 Million", 2.5e6),
        ("3 trillion", 3e12),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, number: float) -> None:
    assert parse_count(text, option="--copies") == pytest.approx(number)


@pytest.mark.parametrize(
    "text", ["", "nan", "inf", "-1", "0", "many", "8 zillion", "1e400", "8,00", "e9", "1e9e9", "."]
)
def test_other_texts_are_refused_with_the_option_s_name(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="--copies"):
        parse_count(text, option="--copies")


def test_a_fleet_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *FLEET)
    assert code == 0, err
    for expected in (
        "1 million copies of gpt-3",
        "per 750 words",
        "times the installed stock",
        "Epoch",
        "human writer",
    ):
        assert expected in out
    assert err == ""


def test_a_fleet_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    made = run_json(capsys, *FLEET, "--training-tokens", "300 billion")
    rate = made["service"]["tokens_per_s_per_device"]["expected"]
    assert made["devices"]["expected"] == pytest.approx(1e7 / rate, rel=1e-3)
    assert made["devices"]["low"] < made["devices"]["expected"] < made["devices"]["high"]
    assert made["service"]["reader_tokens_per_s"]["expected"] >= 10
    assert made["crossover"]["tokens"] == 900e9
    assert made["stock"]["date"]
    assert "Epoch" in made["stock"]["source"]
    assert made["stock"]["share"]["expected"] == pytest.approx(
        made["h100_equivalents"]["expected"] / made["stock"]["h100_equivalents"]
    )
    assert made["rented"]["usd_per_750_words"]["expected"] > 0
    assert made["owned"]["usd_per_year"]["expected"] > 0
    assert made["human_usd_per_750_words"]["expected"] > 1000 * made["rented"]["usd_per_750_words"]["expected"]


@pytest.mark.parametrize("example", [*FLEET_COMMAND.examples, *CLAIMS.examples])
def test_the_examples_of_the_help_work(capsys: pytest.CaptureFixture[str], example: str) -> None:
    code, out, err = run(capsys, *shlex.split(example)[1:])
    assert code == 0, err
    assert out


def test_terms_of_owning_can_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    cheap = run_json(capsys, *FLEET, "--set", "usd_per_kwh=0.01", "--set", "years=6")
    dear = run_json(capsys, *FLEET, "--set", "usd_per_kwh=1", "--set", "years=2")
    assert cheap["owned"]["usd_per_year"]["expected"] < dear["owned"]["usd_per_year"]["expected"]
    assert cheap["rented"] == dear["rented"]
    assert dear["terms"]["years"] == {"expected": 2.0, "low": 2.0, "high": 2.0, "source": "set by you"}


def test_a_promise_of_nothing_needs_the_fewest_devices(capsys: pytest.CaptureFixture[str]) -> None:
    offline = run_json(capsys, *FLEET, "--slo", "none")
    fast = run_json(capsys, *FLEET, "--slo", "30")
    assert offline["devices"]["expected"] < fast["devices"]["expected"]
    assert fast["service"]["reader_tokens_per_s"]["expected"] >= 30


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["--copies", "-5"], "--copies"),
        (["--copies", "nan"], "--copies"),
        (["--copies", "8 zillion"], "zillion"),
        (["--tokens-per-second", "0"], "--tokens-per-second"),
        (["--slo", "quick"], "--slo"),
        (["--slo", "1e9"], "is the most"),
        (["--max-first-token", "0"], "--max-first-token"),
        (["--training-tokens", "-3e9"], "--training-tokens"),
        (["--batch", "0"], "--batch"),
        (["--machine", "8xh10"], "did you mean"),
        (["--set", "pu=1"], "did you mean pue"),
        (["--set", "pue=0.5"], "PUE"),
        (["--set", "utilisation=2"], "utilisation"),
        (["--set", "years"], "NAME=VALUE"),
        (["--prompt-tokens", "5000"], "2048"),
        (["--weights", "int44"], "int4"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], changed: list[str], says: str
) -> None:
    code, out, err = run(capsys, *FLEET, *changed)
    assert code == 2
    assert out == ""
    assert says in err
    assert "Traceback" not in err


def test_an_unknown_model_is_offered_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "fleet", "gtp-3", *FLEET[2:])
    assert code == 2
    assert "did you mean" in err


def test_what_does_not_fit_names_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "fleet", "gpt-3", "--machine", "h100", "--copies", "1", "--tokens-per-second", "10")
    assert code == 2
    assert "8 of these devices instead of 1" in err


def test_all_claims_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "claims")
    assert code == 0, err
    for expected in ("page-price:", "copies-1000x:", "rests on", "half right", "10,417 tokens per pass"):
        assert expected in out


def test_one_claim_shows_the_sources(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "claims", "page-price")
    assert code == 0
    assert "OpenAI's own rule" in out
    assert "writer-price" not in out


def test_claims_as_json_follow_what_is_set(capsys: pytest.CaptureFixture[str]) -> None:
    made = run_json(capsys, "claims", "--set", "api_usd_per_1k=0.02")
    rows = {row["name"]: row for row in made["claims"]}
    assert len(rows) > 20
    page = rows["page-price"]
    assert set(page) == {"name", "claim", "verdict", "arithmetic", "values", "assumptions"}
    assert page["verdict"].startswith("false")
    assert page["values"]["usd_per_750_words"] == 0.02
    assert page["assumptions"]["api_usd_per_1k"] == {"value": 0.02, "source": "set by you"}
    assert rows["growth"]["verdict"] == "holds"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["page-prise"], "did you mean page-price"),
        (["--set", "api_usd=3"], "did you mean api_usd_per_1k"),
        (["--set", "api_usd_per_1k=-3"], "--set api_usd_per_1k"),
        (["--set", "api_usd_per_1k=nan"], "--set api_usd_per_1k"),
        (["--set", "api_usd_per_1k"], "NAME=VALUE"),
        (["page-price", "--set", "readers=3"], "does not use readers"),
    ],
)
def test_mistaken_claims_are_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    code, out, err = run(capsys, "claims", *arguments)
    assert code == 2
    assert out == ""
    assert says in err
