"""Options that are set beforehand: which goes before which, for every option of every command, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from headrace.cli.main import app, main
from headrace.cli.settings import options_of, preset_options
from headrace.errors import InvalidRequestError

COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
EVERY = [(command, option) for command in COMMANDS for option in options_of(COMMANDS[command])]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("HEADRACE_CONFIG", str(path))
    path.write_text("")
    return path


def taken(parameter: Any) -> Any:
    """A value that the option takes."""
    for value in ("0.5", "2", "overlap", "float32"):
        try:
            parameter.process_value(None, [value] if parameter.multiple else value)
        except Exception:
            continue
        return value
    return "true"


@pytest.mark.parametrize(("command", "option"), EVERY)
def test_every_option_may_be_set_in_the_environment_and_in_the_file(
    command: str, option: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter = options_of(COMMANDS[command])[option]
    value = taken(parameter)
    wanted = {parameter.name: [value] if parameter.multiple else value}
    written = "true" if parameter.is_flag else json.dumps(value)
    config.write_text(f"[{command}]\n{option} = {written}\n", encoding="utf-8-sig")  # some editors put a mark first
    in_file = preset_options(COMMANDS)
    assert in_file[command] == ({parameter.name: True} if parameter.is_flag else wanted)
    config.write_text("")
    monkeypatch.setenv(f"HEADRACE_{command.upper()}_{option.upper().replace('-', '_')}", value)
    assert preset_options(COMMANDS)[command] == wanted
    assert not any(values for name, values in preset_options(COMMANDS).items() if name != command)


def batch_of(capsys: pytest.CaptureFixture[str], *options: str) -> int:
    assert main(["plan", "llama-3-8b", "--machine", "h100", *options]) == 0
    return int(json.loads(capsys.readouterr().out)["workload"]["sequences"])


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text("[plan]\nbatch = 2\njson = true\n")
    assert batch_of(capsys) == 2
    monkeypatch.setenv("HEADRACE_PLAN_BATCH", "3")
    assert batch_of(capsys) == 3
    assert batch_of(capsys, "--batch", "4") == 4
    monkeypatch.setenv("HEADRACE_PLAN_BATCH", "")
    assert batch_of(capsys) == 2, "an empty variable sets nothing"


def test_a_text_in_the_environment_is_one_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_RUN_PROMPT", "Name three rivers.")
    assert preset_options(COMMANDS)["run"] == {"prompt": ["Name three rivers."]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[run]\nmemroy = '1GiB'", r"config.toml: \[run\] memroy: headrace run has no option --memroy; did you mean m"),
        ("[run]\nmodel = 'x'", "headrace run has no option --model"),
        ("[rnu]\nmemory = '1GiB'", r"rnu is no table of a command; did you mean run"),
        ("memory = '1GiB'", "memory is no table of a command"),
        ("[plan]\nbatch = 'two'", r"\[plan\] batch is 'two'; "),
        ("[plan]\nbatch = 0", r"\[plan\] batch is 0; "),
        ("[plan]\nbatch = true", "batch is True; a text or a number is expected"),
        ("[plan]\nbatch = [1, 2]", "batch is .1, 2.; a text or a number is expected, and a single one"),
        ("[plan]\nbatch = { a = 1 }", "a single one"),
        ("[run]\ngreedy = 1", "greedy is 1; true or false is expected"),
        ("[run]\nstrategy = 'fast'", "strategy is 'fast'; "),
        ("[run", "is no TOML"),
    ],
)
def test_what_the_file_may_not_hold(text: str, told: str, config: Path) -> None:
    config.write_text(text)
    with pytest.raises(InvalidRequestError, match=told):
        preset_options(COMMANDS)


def test_an_unknown_variable_of_a_command_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_RUN_TEMPRATURE", "1")
    with pytest.raises(InvalidRequestError, match=r"HEADRACE_RUN_TEMPRATURE: .* did you mean temperature"):
        preset_options(COMMANDS)


def test_a_file_that_is_named_must_be_there_and_one_that_is_not_need_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(InvalidRequestError, match=r"none.toml cannot be read"):
        preset_options(COMMANDS)
    monkeypatch.delenv("HEADRACE_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert not any(preset_options(COMMANDS).values())
    (tmp_path / "headrace").mkdir()
    (tmp_path / "headrace" / "config.toml").write_text("[run]\nmemory = '1GiB'")
    assert preset_options(COMMANDS)["run"] == {"memory": "1GiB"}
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home")))
    assert not any(preset_options(COMMANDS).values())


def test_a_mistake_in_the_file_is_a_message_and_help_shows_what_is_set(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text("[models]\njsn = true")
    assert main(["models", "gpt-3"]) == 2
    assert "[models] jsn: headrace models has no option --jsn; did you mean json" in capsys.readouterr().err
    assert main(["--version"]) == 0
    config.write_text("[plan]\nstrategy = 'tensor'")
    assert main(["plan", "--help"]) == 0
    assert "[default: tensor]" in capsys.readouterr().out
