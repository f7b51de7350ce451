"""`headrace batch` as its users run it: right answers, resumed after kills, refusals; on a tiny model that streams."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cli_checkpoints import write_model, write_tokenizer
from headrace.cli.main import main
from headrace.inference.token_text import TokenTexts
from model_types import save_type

pytestmark = pytest.mark.usefixtures("made_up_speeds")

MEMORY = "40MiB"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("batch") / "model", chat=True)


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" if not isinstance(line, str) else line + "\n" for line in lines))
    return path


def requests(count: int, *, new: int = 6, **more: Any) -> list[dict[str, Any]]:
    draw = random.Random(8)
    found = []
    for number in range(count):
        prompt = [draw.randrange(3, 900) for _ in range(draw.randrange(1, 40))]
        found.append({"custom_id": f"r{number}", "prompt": prompt, "max_tokens": draw.randrange(1, new + 1), **more})
    return found


def arguments(model: Path, source: Path, target: Path, *more: str) -> list[str]:
    return ["batch", str(model), str(source), str(target), "--memory", MEMORY, "--dtype", "float32", "--json", *more]


def answers(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines), "a request was answered twice"
    return found


def texts(path: Path) -> dict[str, list[str]]:
    found = {}
    for name, line in answers(path).items():
        choices = line["response"]["body"].get("choices", [])
        found[name] = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]
    return found


def greedy(reference: Any, prompt: list[int], new: int, **asked: Any) -> str:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        whole = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **asked
        )
    words = [token for token in whole[0, len(prompt) :].tolist() if token > 2]
    return " ".join(f"w{token}" for token in words)


def test_answers_equal_greedy_runs_one_by_one(
    model: Path, reference: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = requests(25)
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert main(arguments(model, source, target, "--in-flight", "7", "--pass-tokens", "16")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["measured"]["answered"] == 25
    assert report["plan"]["streamed_blocks"] > 0
    assert report["measured"]["passes"] <= report["predicted"]["passes"]  # some answers end by themselves
    assert report["measured"]["tokens_per_pass"] > 5
    found = texts(target)
    for line in lines:
        assert found[line["custom_id"]] == [greedy(reference, line["prompt"], line["max_tokens"])]


def test_common_beginning_is_computed_once(
    model: Path, reference: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = list(range(100, 164))
    lines = [{"custom_id": str(n), "prompt": [*system, 200 + n, 300 + n], "max_tokens": 3, "n": 1} for n in range(12)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert main(arguments(model, source, target, "--in-flight", "4")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["measured"]["shared_prompt_tokens"] == 12 * 64
    assert report["measured"]["passes"] * report["measured"]["tokens_per_pass"] == pytest.approx(64 + 12 * 2 + 12 * 2)
    for line in lines:
        assert texts(target)[str(line["custom_id"])] == [greedy(reference, line["prompt"], 3)]  # type: ignore[arg-type]


def test_seeds_give_the_same_texts_whatever_the_batch(model: Path, tmp_path: Path) -> None:
    lines = requests(8, temperature=1.0, n=3, seed=5)
    source = write(tmp_path / "in.jsonl", lines)
    for flight in ("1", "9"):
        assert (
            main(arguments(model, source, tmp_path / f"out{flight}.jsonl", "--in-flight", flight, "--memory", "64MiB"))
            == 0
        )
    alone, together = texts(tmp_path / "out1.jsonl"), texts(tmp_path / "out9.jsonl")
    assert alone == together
    assert len(set(alone["r0"])) > 1


def test_stop_texts_log_probabilities_and_chat(model: Path, reference: Any, tmp_path: Path) -> None:
    prompt = [5, 6, 7]
    whole = greedy(reference, prompt, 6).split()
    lines = [
        {"custom_id": "stop", "prompt": prompt, "max_tokens": 6, "stop": [whole[3]]},
        {"custom_id": "special", "prompt": prompt, "max_tokens": 6, "stop": ["<s>"], "logit_bias": {"1": 100}},
        {"custom_id": "logprobs", "prompt": prompt, "max_tokens": 2, "logprobs": 2},
        {
            "custom_id": "chat",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "m",
                "messages": [{"role": "user", "content": "w5 w6"}],
                "max_completion_tokens": 2,
                "logprobs": True,
                "top_logprobs": 1,
            },
        },
    ]
    target = tmp_path / "out.jsonl"
    assert main(arguments(model, write(tmp_path / "in.jsonl", lines), target)) == 0
    found = {name: line["response"]["body"] for name, line in answers(target).items()}
    stopped = found["stop"]["choices"][0]
    assert (stopped["text"].split(), stopped["finish_reason"]) == (whole[:3], "stop")
    special = found["special"]
    assert (special["choices"][0]["text"], special["choices"][0]["finish_reason"]) == ("", "stop")
    assert special["usage"]["completion_tokens"] == 1
    logprobs = found["logprobs"]["choices"][0]["logprobs"]
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert logprobs["token_logprobs"][0] == pytest.approx(float(expected.max()), abs=1e-4)
    assert len(logprobs["top_logprobs"][0]) == 2
    chat = found["chat"]
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert chat["usage"]["total_tokens"] == chat["usage"]["prompt_tokens"] + chat["usage"]["completion_tokens"]
    assert len(chat["choices"][0]["logprobs"]["content"]) == chat["usage"]["completion_tokens"]


@pytest.fixture
def generation_config(model: Path) -> Iterator[Path]:
    """The model's generation_config.json, to be overwritten by a test."""
    path = model / "generation_config.json"
    former = path.read_text()
    yield path
    path.write_text(former)


def test_run_and_batch_follow_the_model_as_generate_does(
    model: Path, reference: Any, generation_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = " ".join(f"w{number}" for number in (5, 6, 7, 5))
    plain = greedy(reference, [5, 6, 7, 5], 8).split()
    asked = {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": [int(plain[0][1:])],
        "begin_suppress_tokens": [int(plain[1][1:])],
        "min_new_tokens": 8,
        "eos_token_id": int(plain[1][1:]),
    }
    expected = greedy(reference, [5, 6, 7, 5], 8, **asked)
    assert expected.split() != plain
    stop = expected.split()[5]
    aside = {"do_sample": True, "temperature": 0.6, "return_dict_in_generate": True, "num_return_sequences": 3}
    generation_config.write_text(json.dumps({**asked, **aside, "stop_strings": [stop], "bos_token_id": 1}))
    run = ["run", str(model), "--prompt", prompt, "--no-chat", "--max-new-tokens", "8", "--dtype", "float32"]
    assert main([*run, "--memory", MEMORY, "--json"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert (report["text"].split(), report["generated_tokens"]) == (expected.split()[:5], 6)
    assert "num_return_sequences 3, which headrace leaves aside" in shown.err
    line = {"custom_id": "a", "prompt": prompt, "max_tokens": 8}
    source = write(tmp_path / "in.jsonl", [line, {**line, "custom_id": "b", "ignore_eos": True}])
    target = tmp_path / "out.jsonl"
    assert main(arguments(model, source, target)) == 0
    found = texts(target)
    assert found["a"] == [report["text"]]
    assert found["b"][0].split()[:6] == expected.split()[:6]  # past the stop text as well
    capsys.readouterr()
    assert main([*run, "--memory", MEMORY, "--json", "--no-model-defaults"]) == 0
    own = json.loads(capsys.readouterr().out)["text"]
    assert own.split() == plain[:2]  # but for the token that ends a text
    target.unlink()
    assert main(arguments(model, source, target, "--no-model-defaults")) == 0
    assert texts(target)["a"] == [own]


def test_bad_requests_get_error_lines_and_the_job_goes_on(model: Path, tmp_path: Path) -> None:
    lines = [
        *requests(2),
        "no JSON",
        {"custom_id": "unknown", "prompt": "w5", "tool_choice": "auto"},
        {"custom_id": "long", "prompt": "w5", "max_tokens": 100_000},
        {"custom_id": "no words", "prompt": "   "},
        {"custom_id": "token", "prompt": [10_000_000]},
        {"custom_id": "half", "prompt": "w5 \ud83d"},
        {"custom_id": "half\ud83d", "prompt": "w5"},
        {"custom_id": "bias", "prompt": "w5", "logit_bias": {"5": 10**400}},
    ]
    target = tmp_path / "out.jsonl"
    assert main(arguments(model, write(tmp_path / "in.jsonl", lines), target)) == 0
    found = answers(target)
    assert {name for name, line in found.items() if line["error"] is None} == {"r0", "r1"}
    codes = {name: line["error"]["code"] for name, line in found.items() if line["error"]}
    assert codes == {
        "line-3": "invalid_json_line",
        "unknown": "unsupported_parameter",
        "long": "context_length_exceeded",
        "no words": "invalid_request",
        "token": "invalid_request",
        "half": "invalid_request",
        "half\ud83d": "invalid_request",
        "bias": "invalid_request",
    }
    assert "tool_choice" in found["unknown"]["error"]["message"]
    assert main(arguments(model, tmp_path / "in.jsonl", target)) == 0  # the next start knows every line again
    assert answers(target) == found


def test_a_tokenizer_that_fails_on_an_answer_fails_that_request_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = TokenTexts.of

    def failing(self: TokenTexts, token: int) -> Any:
        raise KeyError(token)

    monkeypatch.setattr(TokenTexts, "of", failing)
    lines = [{"custom_id": "a", "prompt": [5], "max_tokens": 2, "logprobs": 1}, *requests(2)]
    target = tmp_path / "out.jsonl"
    assert main(arguments(model, write(tmp_path / "in.jsonl", lines), target)) == 0
    monkeypatch.setattr(TokenTexts, "of", of)
    found = answers(target)
    assert found["a"]["error"]["code"] == "internal_error"
    assert found["r0"]["error"] is None


def test_a_job_without_any_answer_has_failed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"custom_id": "a", "prompt": [10_000_000]}, {"custom_id": "b", "prompt": "w5", "echo": True}]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    for _start in range(2):
        assert main(arguments(model, source, target)) == 2
        errors = capsys.readouterr().err
        assert "none of the 2 requests could be answered" in errors
        assert "of 2 requests 0 have an answer and 2 an error" in errors
    assert all(line["error"] for line in answers(target).values())


def test_what_is_no_jsonl_is_refused_and_nothing_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps(requests(2), indent=1))
    assert main(arguments(model, source, target)) == 2
    assert "is not JSONL" in capsys.readouterr().err
    assert not target.exists()


def test_pipes_are_written_to_and_not_read_from(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", requests(2))
    assert main(arguments(model, source, Path("/dev/stdout"))) == 2
    assert "--json needs standard output for itself" in capfd.readouterr().err
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert main(arguments(model, pipe, tmp_path / "out.jsonl")) == 2
    assert "requests are read twice" in capfd.readouterr().err
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert main(arguments(model, source, pipe)) == 0
    lines = [json.loads(line) for line in os.read(reader, 1 << 16).splitlines()]
    os.close(reader)
    assert {line["custom_id"] for line in lines if line["error"] is None} == {"r0", "r1"}


def test_second_start_does_nothing_twice(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = requests(10)
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert main(arguments(model, source, target)) == 0
    whole = target.read_bytes()
    kept = whole.splitlines(keepends=True)
    target.write_bytes(b"".join(kept[:4]) + kept[4][:30])
    capsys.readouterr()
    assert main(arguments(model, source, target)) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["answered_before"], report["measured"]["answered"], report["repaired_bytes"]) == (4, 6, 30)
    again = texts(target)
    target.write_bytes(whole)
    assert again == texts(target)
    assert main(arguments(model, source, target)) == 0
    assert "measured" not in json.loads(capsys.readouterr().out)
    assert target.read_bytes() == whole


def test_changes_between_starts_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = requests(3)
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert main(arguments(model, source, target)) == 0
    before = target.read_bytes()
    assert main(arguments(model, source, target, "--temperature", "0.5")) == 2
    write(source, [*lines[:2], {**lines[2], "max_tokens": 1000}])
    assert main(arguments(model, source, target)) == 2
    write(source, lines[:2])
    assert main(arguments(model, source, target)) == 2
    errors = capsys.readouterr().err
    assert errors.count("has changed since") == 2
    assert errors.count("belongs to another job") == 1
    assert target.read_bytes() == before
    write(source, [*lines, {"custom_id": "more", "prompt": [5], "max_tokens": 2}])  # longer is all right
    assert main(arguments(model, source, target)) == 0
    assert set(answers(target)) == {"r0", "r1", "r2", "more"}


@pytest.mark.parametrize(
    ("lines", "more", "words"),
    [
        ([{"custom_id": "a", "prompt": "w5"}] * 2, [], "lines 1 and 2 have the same custom_id"),
        ([], [], "holds no requests"),
        ([{"prompt": "w5", "max_tokens": 8000}], ["--memory", "30MiB"], "too small"),
        ([{"prompt": "w5"}], ["--in-flight", "0"], "--in-flight must be at least 1"),
        ([{"prompt": "w5"}], ["--answer-share", "2"], "--answer-share"),
    ],
)
def test_jobs_that_cannot_be_meant(
    lines: list[Any],
    more: list[str],
    words: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write(tmp_path / "in.jsonl", lines)
    assert main(arguments(model, source, tmp_path / "out.jsonl", *more)) == 2
    assert words in capsys.readouterr().err


def test_missing_input_and_same_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(model, tmp_path / "none.jsonl", tmp_path / "out.jsonl")) == 2
    source = write(tmp_path / "in.jsonl", requests(1))
    before = source.read_bytes()
    assert main(arguments(model, source, source)) == 2
    assert source.read_bytes() == before
    assert "same file" in capsys.readouterr().err


def test_dry_run_predicts_and_writes_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write(tmp_path / "in.jsonl", requests(30)), tmp_path / "out.jsonl"
    assert main(arguments(model, source, target, "--dry-run")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["predicted"]["total_s"] > 0
    assert not target.exists()


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model that keeps states beside keys and values, and as transformers loads it."""
    directory = tmp_path_factory.mktemp("recurrent") / "model"
    reference = save_type("bamba", directory, vocab_size=1024)
    write_tokenizer(directory, chat=False)
    return directory, reference


def test_models_with_states_are_answered_in_groups_and_resumed(
    recurrent: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, reference = recurrent
    lines = requests(12, ignore_eos=True)
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = arguments(directory, source, target, "--in-flight", "4", "--memory", "100MiB", "--strategy", "overlap")
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["measured"]["passes"] == report["predicted"]["passes"]
    assert report["measured"]["passes"] < sum(line["max_tokens"] for line in lines)
    for line in lines:
        own = greedy(reference, line["prompt"], line["max_tokens"], eos_token_id=None)
        assert texts(target)[line["custom_id"]] == [own]
    whole, kept = texts(target), target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(kept[:5]) + b'{"id')
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["answered_before"] == 5
    assert texts(target) == whole


def test_kills_lose_nothing(model: Path, tmp_path: Path) -> None:
    """Killed twice in the middle of writing answers, then left to end: every request is answered once, and right."""
    lines = requests(60, new=12)
    source, target, whole = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    command = [sys.executable, "-m", "headrace", *arguments(model, source, target, "--in-flight", "4")]
    command += ["--read-limit", "150MB/s"]
    environment = {**os.environ, "HEADRACE_HISTORY": ""}
    for least in (5, 25):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if target.exists() and target.read_bytes().count(b"\n") >= least:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the job ended before it was killed"
        assert least <= target.read_bytes().count(b"\n") < 60
    assert main(arguments(model, source, target, "--in-flight", "4")) == 0
    assert main(arguments(model, source, whole, "--in-flight", "16", "--memory", "64MiB")) == 0
    assert texts(target) == texts(whole)
    assert len(texts(target)) == 60
