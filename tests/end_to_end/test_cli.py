"""The command line as a user meets it: a process, its exit code, its two output streams."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_checkpoints import CONTEXT_TOKENS, STREAMED_DTYPE, streaming_budget, write_model
from headrace import __version__
from headrace.cli.main import main

COMMAND = [sys.executable, "-m", "headrace"]
RUN_CONTRACT: dict[str, Any] = {
    "text": "",
    "prompt_tokens": 1,
    "generated_tokens": 1,
    "plan": {
        "strategy": "overlap",
        "num_blocks": 1,
        "resident_blocks": 1,
        "streamed_blocks": 1,
        "slots": 1,
        "memory_bytes": 1,
        "streamed_bytes_per_pass": 1,
        "weights_bytes": 1,
        "kv_cache_bytes": 1,
        "compute_dtype": "float32",
    },
    "predicted": {
        "prefill_s": 1.0,
        "decode_s_per_pass": 1.0,
        "tokens_per_s": 1.0,
        "binds": "disk",
        "break_even_tokens_per_pass": 1.0,
    },
    "measured": {
        "load_s": 1.0,
        "prefill_s": 1.0,
        "decode_s_per_pass": 1.0,
        "tokens_per_s": 1.0,
        "passes": 1,
        "bytes_read": 1,
        "read_bytes_per_s": 1.0,
        "stall_s": 1.0,
        "peak_memory_bytes": 1,
        "process_overhead_bytes": 1,
    },
    "possible": {"read_bytes_per_s": 1.0, "decode_s_per_pass": 1.0},
}
STRATEGY_CONTRACT: dict[str, Any] = {
    "name": "overlap",
    "fits": True,
    "prefill_s": 1.0,
    "decode_s_per_pass": 1.0,
    "tokens_per_s": 1.0,
    "memory_bytes": {"device": 1, "host": 1, "disk": 1},
    "binds": "disk",
    "usd_per_750_words": None,
    "usd_per_million_tokens": None,
    "low": {},
    "high": {},
    "why_not": None,
}


def headrace(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **environment},
    )


def here(capsys: pytest.CaptureFixture[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command within this process, which has imported torch already."""
    capsys.readouterr()
    code = main(arguments)
    return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())


def streamed(model: str, *, prompt_tokens: int, new_tokens: int) -> list[str]:
    """Options for so many new tokens in too little memory for all weights, so that the head is streamed."""
    budget_bytes = streaming_budget(Path(model), prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    return ["--memory", f"{budget_bytes}B", "--dtype", STREAMED_DTYPE, "--max-new-tokens", str(new_tokens)]


def assert_shape(contract: Any, found: Any, path: str = "$") -> None:
    """Every key of the contract is there, with a value of its kind."""
    if isinstance(contract, dict):
        assert isinstance(found, dict), path
        for key, value in contract.items():
            assert key in found, f"{path}.{key}"
            assert_shape(value, found[key], f"{path}.{key}")
    elif isinstance(contract, float):
        assert isinstance(found, int | float), path
        assert not isinstance(found, bool), path
    elif contract is not None:
        assert type(found) is type(contract), path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny-chat", chat=True))


# -- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["run"], ["plan"], ["probe"], ["demo"]])
def test_every_help_has_examples_and_json(command: list[str]) -> None:
    done = headrace(*command, "--help")
    assert done.returncode == 0
    assert "Examples:" in done.stdout
    assert f"    headrace {' '.join(command)}" in done.stdout.split("Examples:")[1]
    assert not command or "--json" in done.stdout
    assert done.stderr == ""


@pytest.mark.alone
def test_help_is_fast_and_imports_no_torch() -> None:
    seconds = []
    for _ in range(5):  # others on the machine only add to it: the quickest counts
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "headrace", "--help"], capture_output=True, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "headrace" in imported
    assert not imported & {"torch", "transformers", "numpy", "huggingface_hub"}
    assert min(seconds) < 0.7


def test_version() -> None:
    done = headrace("--version")
    assert (done.returncode, done.stdout.splitlines()[0], done.stderr) == (0, f"headrace {__version__}", "")


# -- run ----------------------------------------------------------------------------------------------------------


def test_run_json_and_trace_keep_the_contract(model: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    wanted = [*streamed(model, prompt_tokens=3, new_tokens=6), "--strategy", "overlap"]
    done = headrace("run", model, "--prompt", "w5 w6 w7", *wanted, "--trace", str(trace), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # fails where anything else is on standard output
    assert_shape(RUN_CONTRACT, report)
    assert (report["prompt_tokens"], report["generated_tokens"]) == (3, 6)
    assert len(report["text"].split()) == 6
    plan, measured = report["plan"], report["measured"]
    assert plan["strategy"] == "overlap"
    assert plan["streamed_blocks"] > 0
    assert plan["resident_blocks"] + plan["streamed_blocks"] == plan["num_blocks"]
    assert plan["memory_bytes"] <= plan["budget_bytes"] == streaming_budget(Path(model), prompt_tokens=3, new_tokens=6)
    assert measured["passes"] == 6
    assert measured["bytes_read"] >= plan["streamed_bytes_per_pass"] * 6
    assert measured["peak_memory_bytes"] > measured["process_overhead_bytes"] > 0
    assert "predicted" in done.stderr
    assert "Traceback" not in done.stderr

    events = json.loads(trace.read_text())["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert sorted(processes.values()) == ["measured", "predicted"]
    for pid in processes:
        lanes = {e["args"]["name"] for e in events if e["pid"] == pid and e["name"] == "thread_name"}
        assert lanes == {"read", "copy", "compute", "stall"}
        assert {e["cat"] for e in events if e["pid"] == pid and e["ph"] == "X"} >= {"read", "compute"}


def test_text_alone_goes_to_standard_output_and_equals_the_json_text(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", model, "--max-new-tokens", "5", "--dtype", "float32"]
    shown = headrace(*arguments, "--prompt-file", "-", stdin="w5 w6 w7\n")
    assert shown.returncode == 0, shown.stderr
    assert len(shown.stdout.split()) == 5
    report = json.loads(here(capsys, *arguments, "--prompt", "w5 w6 w7", "--json").stdout)
    assert report["text"] + "\n" == shown.stdout


@pytest.mark.versions
def test_only_headrace_speaks_at_the_terminal(model: str) -> None:
    done = headrace("run", model, "--prompt", "w5 w6 w5 w6", "--draft", "lookup", "--max-new-tokens", "6")
    assert done.returncode == 0, done.stderr
    assert re.search("warning|deprecated", done.stderr, re.IGNORECASE) is None, done.stderr


@contextlib.contextmanager
def slow_run(model: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a run of minutes: megabytes of the head pass at 1 MB/s for every token."""
    wanted = [*streamed(model, prompt_tokens=2, new_tokens=500), "--read-limit", "1MB/s", "--ignore-eos"]
    command = [*COMMAND, "run", model, "--prompt", "w5 w6", *wanted]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.alone
def test_ctrl_c_ends_a_run_within_seconds(model: str) -> None:
    with slow_run(model) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"w"  # text comes while it is generated, not at the end
        pressed = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert time.monotonic() - pressed < 5
        stderr = process.stderr.read()
    assert b"Traceback" not in stderr
    assert b"interrupted" in stderr


def test_a_closed_pipe_ends_a_run_quietly(model: str) -> None:
    with slow_run(model) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"w"
        process.stdout.close()
        stderr = process.stderr.read().decode()
        assert process.wait(timeout=60) == 1
    assert "Traceback" not in stderr
    assert "rror" not in stderr


def test_on_a_terminal_a_bar_shows_progress_and_the_text_stays(model: str) -> None:
    terminal, other_end = pty.openpty()
    wanted = [*streamed(model, prompt_tokens=2, new_tokens=6), "--read-limit", "20MB/s"]
    process = subprocess.Popen(
        [*COMMAND, "run", model, "--prompt", "w5 w6", *wanted],
        stdin=subprocess.DEVNULL,
        stdout=other_end,
        stderr=other_end,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
    )
    os.close(other_end)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "of 9 blocks, first token in" in text
    assert "of 6 tokens" in text
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in text
    after_bar = text.rsplit("\x1b[2K", 1)[1]  # what is left once the bar has been wiped away
    assert after_bar.startswith("w")
    assert len(after_bar.split("\r\n")[0].split()) == 6


def test_several_prompts_are_a_batch(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", model, "--prompt", "w9", "--max-new-tokens", "4", "--dtype", "float32"]
    together = here(capsys, *arguments[:2], "--prompt", "w5 w6 w7", *arguments[2:])
    assert together.returncode == 0, together.stderr
    first, second = together.stdout.split("--- ")[1:]
    assert first.startswith("w5 w6 w7\n")
    assert second.startswith("w9\n")
    alone = here(capsys, *arguments)
    assert second.removeprefix("w9\n") == alone.stdout


# -- what is refused ----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], str]] = {
    "no model": (["run"], "MODEL"),
    "no such command": (["runn"], "runn"),
    "no prompt": (["run", "MODEL"], "--prompt-file FILE"),
    "empty prompt": (["run", "MODEL", "--prompt", " \n"], "prompt is empty"),
    "empty standard input": (["run", "MODEL", "--prompt-file", "-"], "prompt is empty"),
    "two sources": (["run", "MODEL", "--prompt", "w5", "--prompt-file", "x"], "both --prompt and --prompt-file"),
    "missing prompt file": (["run", "MODEL", "--prompt-file", "/nowhere/x"], "/nowhere/x cannot be read"),
    "no new tokens": (["run", "MODEL", "--prompt", "w5", "--max-new-tokens", "0"], "at least 1, not 0"),
    "missing model": (["run", "/nowhere/m", "--prompt", "w5"], "no directory /nowhere/m"),
    "no unit": (["run", "MODEL", "--prompt", "w5", "--memory", "12"], "12GiB"),
    "bad rate": (["run", "MODEL", "--prompt", "w5", "--read-limit", "fast"], "'fast'"),
    "bad strategy": (["run", "MODEL", "--prompt", "w5", "--strategy", "magic"], "sequential"),
    "bad trace": (["run", "MODEL", "--prompt", "w5", "--trace", "/nowhere/t.json"], "--trace /nowhere/t.json"),
    "seed without draws": (["run", "MODEL", "--prompt", "w5", "--seed", "1"], "--temperature"),
    "greedy and temperature": (["run", "MODEL", "--prompt", "w5", "--greedy", "--temperature", "1"], "--greedy"),
    "top-p": (["run", "MODEL", "--prompt", "w5", "--top-p", "1.5"], "not 1.5"),
    "missing machine": (["run", "MODEL", "--prompt", "w5", "--machine", "/nowhere/m.toml"], "no such file"),
    "no sequences": (["plan", "MODEL", "--batch", "0"], "--batch"),
    "not a machine": (["plan", "MODEL", "--machine", "MODEL/config.json"], "not a machine description"),
    "no such directory": (["probe", "--dir", "/nowhere"], "/nowhere"),
    "bad out": (["probe", "--out", "/nowhere/m.toml"], "--out /nowhere/m.toml"),
    "demo memory": (["demo", "--memory", "lots"], "'lots'"),
    "demo in a full directory": (["demo", "--dir", "MODEL/.."], "give another --dir"),
}
REFUSED_BY_THE_MODEL: dict[str, tuple[list[str], str]] = {
    "too little memory": (["run", "MODEL", "--prompt", "w5", "--memory", "2MB"], "needs at least"),
    "no template": (["run", "MODEL", "--prompt", "w5", "--chat"], "no chat template"),
    "system without template": (["run", "MODEL", "--prompt", "w5", "--system", "w6"], "no chat template"),
    "beyond the context": (
        ["run", "MODEL", "--prompt", "w5", "--max-new-tokens", "9000"],
        f"{CONTEXT_TOKENS} tokens; give --max-new-tokens {CONTEXT_TOKENS - 1}",
    ),
    "plan beyond the context": (["plan", "MODEL", "--prompt-tokens", "9000"], str(CONTEXT_TOKENS)),
}


PROCESSES = {"no model", "empty standard input", "bad rate", "too little memory"}
"""mistakes that are made in a process of their own, as users make them; the others in this one"""


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_BY_THE_MODEL])
def test_mistakes_get_one_message_and_exit_code_2(name: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = {**REFUSED, **REFUSED_BY_THE_MODEL}[name]
    arguments = [argument.replace("MODEL", model) for argument in arguments]
    done = headrace(*arguments) if name in PROCESSES else here(capsys, *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if name in REFUSED and "Usage" not in done.stderr:
        assert done.stderr.startswith("headrace: ")
        assert done.stderr.count("\n") == 1


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "long.txt"
    prompt.write_text("w5 " * (CONTEXT_TOKENS + 7))
    done = here(capsys, "run", model, "--prompt-file", str(prompt))
    assert done.returncode == 2
    assert f"{CONTEXT_TOKENS + 7} tokens" in done.stderr
    assert f"at most {CONTEXT_TOKENS - 1} tokens" in done.stderr


def test_an_unexpected_fault_exits_1_and_shows_its_traceback_on_request(model: str) -> None:
    code = (
        "import headrace.cli.run_command as command; command.read_prompts = None\n"
        "from headrace.cli.main import main\n"
        "raise SystemExit(main({!r}))"
    )
    for options, expected in (([], False), (["--debug"], True)):
        arguments = [*options, "run", model, "--prompt", "w5"]
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "unexpected fault: TypeError" in done.stderr
        assert ("Traceback" in done.stderr) is expected


# -- without the `run` extra --------------------------------------------------------------------------------------


def without_run_extra(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'accelerate', 'safetensors', 'numpy'): sys.modules[name] = None\n"
        "from headrace.cli.main import main\n"
        f"sys.exit(main({list(arguments)!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["run", "plan", "probe", "demo"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(command: str, model: str) -> None:
    arguments = {"run": [model, "--prompt", "w5"], "plan": [model]}.get(command, [])
    done = without_run_extra(command, *arguments)
    assert done.returncode == 2
    assert "pip install 'headrace[run]'" in done.stderr
    assert "torch" in done.stderr
    assert "Traceback" not in done.stderr


# -- plan and demo ------------------------------------------------------------------------------------------------


def assert_plan_contract(report: dict[str, Any]) -> None:
    assert isinstance(report["model"], dict)
    assert isinstance(report["machine"], dict)
    assert [item["name"] for item in report["strategies"]] == ["resident", "sequential", "overlap"]
    for item in report["strategies"]:
        assert set(STRATEGY_CONTRACT) <= set(item)
        if item["fits"]:
            assert_shape(STRATEGY_CONTRACT, item)
        else:
            assert item["decode_s_per_pass"] is None
            assert "needs at least" in item["why_not"]
    assert_shape({"tokens_per_pass": 1.0, "kv_cache_bytes": 1, "reachable_by": []}, report["break_even"])
    fitting = {item["name"]: item["total_s"] for item in report["strategies"] if item["fits"]}
    assert report["recommended"] == min(fitting, key=lambda name: fitting[name])


def test_plan_json_keeps_the_contract(model: str) -> None:
    budget = streaming_budget(Path(model), prompt_tokens=16, new_tokens=32)
    wanted = ["--memory", f"{budget}B", "--dtype", STREAMED_DTYPE, "--read-limit", "20MB/s"]
    done = headrace("plan", model, *wanted, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert_plan_contract(report)
    by_name = {item["name"]: item for item in report["strategies"]}
    assert not by_name["resident"]["fits"]
    assert by_name["overlap"]["binds"] == "disk"
    assert report["machine"]["read_bytes_per_s"] == 20e6
    assert by_name["overlap"]["decode_s_per_pass"] >= by_name["overlap"]["streamed_bytes_per_pass"] / 20e6 * 0.999


MACHINE = """
name = "a laptop"
[processor]
name = "a laptop"
kind = "cpu"
memory = "1GB"
memory_rate = "20GB/s"
source = "a test"
[processor.flops]
bf16 = "20GFLOPS"
[processor.arithmetic]
block_overhead = "300us"
pass_overhead = "2ms"
[[processor.arithmetic.curves]]
compute_dtype = "bfloat16"
stored_dtype = "BF16"
tokens = [1, 1000]
time_per_weight = ["100ps", "100ps"]
[[processor.arithmetic.curves]]
compute_dtype = "float32"
stored_dtype = "BF16"
tokens = [1, 1000]
time_per_weight = ["1ns", "1ns"]
[disk]
rate = "1GB/s"
chunk = "8388608B"
threads = 2
"""


def test_plan_for_a_machine_file_needs_no_torch(model: str, tmp_path: Path) -> None:
    machine = tmp_path / "machine.toml"
    machine.write_text(MACHINE)
    budget = streaming_budget(Path(model), prompt_tokens=16, new_tokens=32)
    wanted = ["plan", model, "--machine", str(machine), "--memory", f"{budget}B"]
    done = without_run_extra(*wanted, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert_plan_contract(report)
    assert report["machine"]["name"] == "a laptop"
    assert report["machine"]["compute_dtype"] == "bfloat16"  # ten times as fast, by the file
    shown = without_run_extra(*wanted)
    assert shown.returncode == 0, shown.stderr
    for part in ("overlap *", "waits for", "compute |", "Break-even"):
        assert part in shown.stdout


def test_one_strategy_that_does_not_fit_is_answered_not_recommended(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = tmp_path / "machine.toml"
    machine.write_text(MACHINE)
    budget = streaming_budget(Path(model), prompt_tokens=16, new_tokens=32)
    wanted = ["--machine", str(machine), "--memory", f"{budget}B", "--strategy", "resident", "--json"]
    report = json.loads(here(capsys, "plan", model, *wanted).stdout)
    assert [item["name"] for item in report["strategies"]] == ["resident"]
    assert report["recommended"] is None


def test_demo_runs_a_model_that_is_there(chat_model: str) -> None:
    done = headrace("demo", "--dir", chat_model, "--memory", "40MB", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert_shape(RUN_CONTRACT, report)
    assert report["plan"]["budget_bytes"] == 40_000_000
    assert "12.8 MB of weights; headrace may hold 40.0 MB" in done.stderr


def test_demo_without_network_says_what_to_do(tmp_path: Path) -> None:
    target = tmp_path / "models" / "demo"
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    done = headrace("demo", "--dir", str(target), **nowhere)
    assert done.returncode == 2
    assert "pip could not download" in done.stderr
    assert "headrace run DIRECTORY" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(target.parent.iterdir()) == []  # nothing half done is left behind
