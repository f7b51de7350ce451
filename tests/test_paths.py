"""Paths with and without a home directory."""

from __future__ import annotations

import pwd
from pathlib import Path
from typing import NoReturn

import pytest

from headrace.accuracy.history_file import add_to_history, read_history
from headrace.cli.demo.demo_model import cache_directory
from headrace.cli.main import main
from headrace.errors import InvalidRequestError
from headrace.paths import user_directory, user_path


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id that is not in the list of users, as in many containers."""

    def nobody(_uid: int) -> NoReturn:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "HEADRACE_HISTORY", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_a_home_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert user_path("~/b") == Path("/home/a/b")
    assert user_directory("XDG_STATE_HOME", "~/.local/state") == Path("/home/a/.local/state/headrace")
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert user_directory("XDG_STATE_HOME", "~/.local/state") == Path("/var/state/headrace")


@pytest.mark.usefixtures("homeless")
def test_without_a_home_runs_are_not_kept_and_the_demo_says_what_to_set() -> None:
    assert read_history() == []
    assert "set HOME" in str(add_to_history(None))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="set HOME"):
        cache_directory()


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "~nosuchuser/model", "--prompt", "a"),
        ("plan", "~nosuchuser/model"),
        ("models", "~nosuchuser/model"),
        ("plan", "gpt-3", "--machine", "~nosuchuser/m.toml"),
        ("batch", "m", "~nosuchuser/in.jsonl", "out.jsonl"),
    ],
)
def test_the_home_of_nobody_is_the_users_mistake(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "home directory that is not known" in capsys.readouterr().err
