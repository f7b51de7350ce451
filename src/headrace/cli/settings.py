"""Options that are set beforehand: in environment variables and in a configuration file.

    HEADRACE_RUN_MEMORY=8GiB            an option of a command, in capitals; lists and texts are one value

    [run]                               ~/.config/headrace/config.toml, or the file that HEADRACE_CONFIG names
    memory = "8GiB"                     (empty: none): a table for each command, keys as its options are called
    max-new-tokens = 200

The command line goes before the environment, and that before the file. What is set for an option that is not there,
or to a value that it does not take, is refused by name.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import typer

from headrace.errors import InvalidRequestError, near_names
from headrace.paths import chosen_path

VARIABLE = "HEADRACE_CONFIG"


class Setting(NamedTuple):
    """A value that is given for an option, and by what."""

    origin: str
    command: str
    option: str
    value: Any


def config_path() -> Path | None:
    """Return the configuration file; None where there is no home to look in, or HEADRACE_CONFIG is set to nothing."""
    return chosen_path(VARIABLE, "XDG_CONFIG_HOME", "~/.config", "config.toml")


def preset_options(commands: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, for each of Typer's commands, the values that its parameters have unless the command line says otherwise.

    Raises InvalidRequestError, naming file and key or the variable, for what no command takes.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in commands}
    for setting in (*_in_file(commands), *_in_environment(commands)):
        command = commands[setting.command]
        options = options_of(command)
        if setting.option not in options:
            raise InvalidRequestError(
                f"{setting.origin}: headrace {setting.command} has no option --{setting.option}; "
                f"{near_names(setting.option, options)}its options: {', '.join(sorted(options))}"
            )
        parameter = options[setting.option]
        found[setting.command][parameter.name] = _checked(setting, command, parameter)
    return found


def options_of(command: Any) -> dict[str, Any]:
    """The options of one of Typer's commands, by their long names without dashes."""
    return {
        max(parameter.opts, key=len).removeprefix("--"): parameter
        for parameter in command.params
        if parameter.param_type_name == "option" and not parameter.is_eager
    }


def _in_file(commands: Mapping[str, Any]) -> Iterator[Setting]:
    path = config_path()
    if path is None or (VARIABLE not in os.environ and not path.exists()):
        return
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InvalidRequestError(f"the configuration file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidRequestError(f"the configuration file {path} is no TOML: {error}") from error
    for command, table in tables.items():
        if command not in commands or not isinstance(table, dict):
            raise InvalidRequestError(
                f"{path}: {command} is no table of a command; {near_names(command, commands)}tables: "
                + ", ".join(f"[{name}]" for name in commands)
            )
        for key, value in table.items():
            yield Setting(f"{path}: [{command}] {key}", command, key.replace("_", "-"), value)


def _in_environment(commands: Mapping[str, Any]) -> Iterator[Setting]:
    for variable, value in os.environ.items():
        for command in commands:
            prefix = f"HEADRACE_{command.upper()}_"
            if variable.startswith(prefix) and value:
                yield Setting(variable, command, variable.removeprefix(prefix).lower().replace("_", "-"), value)


def _checked(setting: Setting, command: Any, parameter: Any) -> Any:
    """The value, if the option takes it. A file's true and false are for switches alone."""
    value = [setting.value] if parameter.multiple and not isinstance(setting.value, list) else setting.value
    told = f"{setting.origin} is {setting.value!r}"
    kind = "true or false" if parameter.is_flag else "a text or a number"
    if not isinstance(value, str) and isinstance(value, bool) != parameter.is_flag:
        raise InvalidRequestError(f"{told}; {kind} is expected")
    if isinstance(value, dict) or isinstance(value, list) != parameter.multiple:
        raise InvalidRequestError(f"{told}; {kind} is expected, and a single one")
    try:
        parameter.process_value(typer.Context(command), value)
    except typer.BadParameter as error:
        raise InvalidRequestError(f"{told}; {error.message}") from error
    return value
