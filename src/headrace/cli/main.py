"""The `headrace` command: one app, and the one place where an error becomes a message and an exit code.

0    done
2    a user's mistake: one message, no traceback (HeadraceError, or a wrong option)
130  Ctrl-C: the stream is closed, its threads have ended
1    an unexpected fault (traceback with --debug or HEADRACE_DEBUG=1); or, quietly, a pipe that nobody reads any more
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Annotated

import typer

from headrace import __version__
from headrace.cli.accuracy_command import ACCURACY
from headrace.cli.batch_command import BATCH
from headrace.cli.claims_command import CLAIMS
from headrace.cli.command import INTERRUPTED, epilog
from headrace.cli.demo.demo_command import DEMO
from headrace.cli.fleet_command import FLEET
from headrace.cli.machines_command import MACHINES
from headrace.cli.models_command import MODELS
from headrace.cli.output import OutputLostError, text_width
from headrace.cli.plan_command import PLAN
from headrace.cli.probe_command import PROBE
from headrace.cli.pull_command import PULL
from headrace.cli.run_command import RUN
from headrace.cli.settings import preset_options
from headrace.cli.table import wrapped
from headrace.errors import HeadraceError

DEBUG_VARIABLE = "HEADRACE_DEBUG"
LIBRARIES = ("torch", "transformers", "safetensors", "gguf")
EXAMPLES = (
    "headrace demo",
    "headrace plan ./my-model --memory 8GiB",
    "headrace plan gpt-3 --machine 8xa100-80 --batch 64",
    "headrace run ./my-model --memory 8GiB --prompt 'Name three rivers.'",
)

app = typer.Typer(
    name="headrace",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

for command in (DEMO, PROBE, PLAN, PULL, RUN, BATCH, MODELS, MACHINES, FLEET, CLAIMS, ACCURACY):
    app.command(command.name, epilog=command.epilog)(command.function)


def _print_version(*, wanted: bool) -> None:
    if wanted:
        found = [f"python {platform.python_version()}", *map(_installed, LIBRARIES)]
        sys.stdout.write(f"headrace {__version__}\n{', '.join(found)}\n")
        raise typer.Exit


def _installed(library: str) -> str:
    """Its version, read from its metadata: importing torch takes seconds."""
    try:
        return f"{library} {metadata.version(library)}"
    except metadata.PackageNotFoundError:
        return f"{library} not installed"


@app.callback(epilog=epilog(EXAMPLES))
def _headrace(
    context: typer.Context,
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version, and the versions that it runs on, and exit.",
            callback=lambda wanted: _print_version(wanted=wanted),
            is_eager=True,
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show the traceback of an unexpected fault ({DEBUG_VARIABLE}=1 does too).")
    ] = False,
) -> None:
    """Run transformer models bigger than the memory they may use, and know beforehand how fast that will be.

    An option that is always wanted can be set beforehand: --memory of headrace run as HEADRACE_RUN_MEMORY in the
    environment, or as memory in the table [run] of ~/.config/headrace/config.toml.
    """
    del version
    context.default_map = preset_options(context.command.commands)  # type: ignore[attr-defined]
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # generated text may hold what the terminal's encoding does not
    try:
        with _quiet_libraries():
            app(args=arguments, prog_name="headrace")
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return 1
    except HeadraceError as error:
        if isinstance(error, OutputLostError):
            _discard_output()
        _complain(wrapped(f"headrace: {error}", text_width(), hanging=2))
        if _debugging():
            traceback.print_exc()
        return 2
    except Exception as error:
        _complain(f"headrace: unexpected fault: {type(error).__name__}: {error}")
        if _debugging():
            traceback.print_exc()
        else:
            _complain(f"(set {DEBUG_VARIABLE}=1 to see where)")
        return 1
    else:
        code = 0
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process whatever it is doing
        _complain("headrace: interrupted")
    return code


def _complain(text: str) -> None:
    with suppress(OSError):  # the exit code says it where standard error takes no more
        sys.stderr.write(text + "\n")


def _open_standard_streams() -> None:
    """Let a standard stream that is closed be the null device; else the next file that is opened takes its number."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the process ends


def _discard_output() -> None:
    """Forget what standard output could not take: the interpreter flushes it once more when it ends."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the libraries' remarks, which are addressed to programmers, off the user's terminal; errors stay."""
    if _debugging() or sys.warnoptions:
        yield
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
