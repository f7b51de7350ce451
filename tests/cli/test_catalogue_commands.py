"""The planning commands as a user calls them: catalogue names, files, bad input; JSON and nothing else on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import headrace
from headrace.cli.main import main

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)  # type: ignore[no-any-return]


def test_gpt_3_on_eight_a100(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ("--prompt-tokens", "16", "--generate-tokens", "32")
    made = json_of(capsys, "plan", "gpt-3", "--machine", "8xa100-80", "--batch", "64", *lengths)
    assert made["recommended"] == "tensor"
    assert round(made["model"]["weights_bytes"] / 1e9, -1) == 350
    assert made["model"]["kv_cache_bytes_per_token"] == 4_718_592
    by_name = {item["name"]: item for item in made["strategies"]}
    assert not by_name["resident"]["fits"]
    assert 0.02 < by_name["tensor"]["decode_s_per_pass"] < 0.08
    assert by_name["tensor"]["memory_bytes"]["device"] == pytest.approx(349.2e9 / 8, rel=0.1)
    assert by_name["overlap"]["decode_s_per_pass"] > 10 * by_name["tensor"]["decode_s_per_pass"]
    assert 5_000 < made["break_even"]["tokens_per_pass"] < 15_000
    assert made["break_even"]["reachable_by"] == ["prefill"]


def test_the_text_names_what_binds_and_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plan", "llama-3.1-70b", "--machine", "rtx-4090")
    assert code == 0
    assert "overlap is recommended" in out
    assert "A disk of twice the speed would make a pass" in out
    assert "Break-even when weights come from the disk" in out
    assert "seconds per pass against tokens per pass" in out


def test_fewer_bits_drafts_and_sampling_change_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    ask = ("plan", "llama-3.1-70b", "--machine", "rtx-4090", "--strategy", "overlap")
    plain = json_of(capsys, *ask)["strategies"][0]
    narrow = json_of(capsys, *ask, "--weights", "int4")["strategies"][0]
    drafted = json_of(capsys, *ask, "--draft-tokens", "4", "--acceptance", "0.8")["strategies"][0]
    sampled = json_of(capsys, *ask, "--sampling", "best-of:4")["strategies"][0]
    assert narrow["decode_s_per_pass"] < plain["decode_s_per_pass"] / 3
    assert drafted["tokens_per_s"] == pytest.approx(plain["tokens_per_s"] * (1 - 0.8**5) / 0.2, rel=0.05)
    assert sampled["usd_per_million_tokens"] == pytest.approx(plain["usd_per_million_tokens"], rel=0.1)


def test_a_config_a_gguf_name_and_a_scaled_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    assert json_of(capsys, "plan", str(path), "--machine", "h100")["model"]["parameters"] == 8_030_261_248
    scaled = json_of(capsys, "plan", "gpt-3*1000", "--machine", "16x72xgb300")
    assert scaled["model"]["parameters"] == pytest.approx(174.6e12, rel=0.01)
    assert scaled["model"]["num_layers"] == 960


def test_a_machine_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = call(capsys, "machines", "2xrtx-3090", "--toml")
    assert code == 0
    path = tmp_path / "mine.toml"
    path.write_text(out)
    by_file = json_of(capsys, "plan", "llama-3-8b", "--machine", str(path))
    by_name = json_of(capsys, "plan", "llama-3-8b", "--machine", "2xrtx-3090")
    assert by_file["strategies"] == by_name["strategies"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "gpt-33", "--machine", "h100"), "did you mean gpt-3"),
        (("plan", "gpt-3", "--machine", "h1000"), "did you mean h100"),
        (("plan", "gpt-3", "--machine", "0xh100"), "no number of devices"),
        (("plan", "gpt-3", "--machine", "none.toml"), "no such file"),
        (("plan", "gpt-3", "--machine", "h100", "--strategy", "tensr"), "did you mean tensor"),
        (("plan", "gpt-3", "--machine", "h100", "--weights", "int5"), "did you mean int"),
        (("plan", "gpt-3", "--machine", "h100", "--memory", "-3GiB"), "not a size"),
        (("plan", "gpt-3", "--machine", "h100", "--memory", "3"), "no unit"),
        (("plan", "gpt-3", "--machine", "h100", "--prompt-tokens", "5000"), "context of gpt-3, 2048 tokens"),
        (("plan", "gpt-3", "--machine", "h100", "--sampling", "best-off:4"), "best-of"),
        (("plan", "gpt-3", "--machine", "h100", "--dtype", "float32"), "--dtype applies to"),
        (("models", "gpt-33"), "did you mean gpt-3"),
        (("machines", "h1000"), "did you mean h100"),
        (("plan", "./none.gguf", "--machine", "h100"), "does not exist"),
    ],
)
def test_a_mistake_is_answered_by_one_message(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_the_catalogue_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    models = json_of(capsys, "models")["models"]
    assert len(models) > 100
    assert all(item["source"] for item in models)
    machines = json_of(capsys, "machines")
    assert len(machines["processors"]) >= 70
    assert all(item["source"] for item in machines["processors"])
    code, out, _ = call(capsys, "machines", "dgx-2")
    assert code == 0
    assert "through bridge with the others" in out
    code, out, _ = call(capsys, "models", "deepseek-v3")
    assert "8 of 256" in out


@pytest.mark.alone
def test_importing_headrace_is_quick_and_the_planner_needs_no_torch() -> None:
    """The goal is 0.3 s for the import; three times that is a fault on any machine."""
    code = (
        "import sys, time\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'transformers', 'numpy', 'safetensors', 'gguf', 'accelerate'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "start = time.perf_counter()\nimport headrace\n"
        "sys.stderr.write(str(time.perf_counter() - start))\n"
        "from headrace.cli.main import main\n"
        "for line in (['plan', 'gpt-3', '--machine', '8xa100-80'], ['models'], ['machines'], ['claims'],\n"
        "             ['fleet', 'llama-3.1-70b', '--machine', '8xh100', '--copies', '1e6',\n"
        "              '--tokens-per-second', '10']):\n"
        "    assert main(line) == 0, line\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stderr.split("\n")[0][:8]) < 0.9
    assert time.perf_counter() - start < 60


def test_one_workload_is_planned_for_unless_another_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    """`plan`, Python and `fleet` take the same, and cut it to what a short context leaves."""
    lengths = ("--prompt-tokens", "500", "--generate-tokens", "500")
    plain = json_of(capsys, "plan", "gpt-3", "--machine", "8xh100")
    assert plain == json_of(capsys, "plan", "gpt-3", "--machine", "8xh100", *lengths)
    assert plain["strategies"] == headrace.plan("gpt-3", machine="8xh100")["strategies"]
    fleet = ("fleet", "gpt-3", "--machine", "8xh100", "--copies", "8", "--tokens-per-second", "5", "--slo", "none")
    asked = json_of(capsys, *fleet)["asked"]
    assert (asked["prompt_tokens"], asked["generate_tokens"]) == (500, 500)
    for given, work in (
        ((), "256 + 256"),
        (("--prompt-tokens", "400"), "400 + 112"),
        (("--generate-tokens", "500"), "12 + 500"),
    ):
        code, out, _ = call(capsys, "plan", "gpt-1", "--machine", "h100", *given)
        assert code == 0
        assert f"1 x ({work}) tokens" in out
    code, _, err = call(capsys, "plan", "gpt-1", "--machine", "h100", "--prompt-tokens", "400", *lengths[2:])
    assert code == 2
    assert "reduce --prompt-tokens or --generate-tokens" in err
