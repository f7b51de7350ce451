"""The `headrace` command: one app, and the one place where an error becomes a message and an exit code.

0    done
2    a user's mistake: one message, no traceback (HeadraceError, or a wrong option)
130  Ctrl-C: the stream is closed, its threads have ended
1    an unexpected fault (traceback with --debug or HEADRACE_DEBUG=1); or, quietly, a pipe that nobody reads any more
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from headrace import __version__
from headrace.cli.accuracy_command import ACCURACY
from headrace.cli.batch_command import BATCH
from headrace.cli.claims_command import CLAIMS
from headrace.cli.command import epilog
from headrace.cli.demo_command import DEMO
from headrace.cli.fleet_command import FLEET
from headrace.cli.machines_command import MACHINES
from headrace.cli.models_command import MODELS
from headrace.cli.output import text_width
from headrace.cli.plan_command import PLAN
from headrace.cli.probe_command import PROBE
from headrace.cli.run_command import RUN
from headrace.cli.table import wrapped
from headrace.errors import HeadraceError

DEBUG_VARIABLE = "HEADRACE_DEBUG"
INTERRUPTED = 130
EXAMPLES = (
    "headrace demo",
    "headrace plan ./my-model --memory 8GiB",
    "headrace plan gpt-3 --machine 8xa100-80 --batch 64",
    "headrace run ./my-model --memory 8GiB --prompt 'Name three rivers of Europe.'",
)

app = typer.Typer(
    name="headrace",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

for command in (DEMO, PROBE, PLAN, RUN, BATCH, MODELS, MACHINES, FLEET, CLAIMS, ACCURACY):
    app.command(command.name, epilog=command.epilog)(command.function)


def _print_version(*, wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"headrace {__version__}\n")
        raise typer.Exit


@app.callback(epilog=epilog(EXAMPLES))
def _headrace(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=lambda wanted: _print_version(wanted=wanted),
            is_eager=True,
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show the traceback of an unexpected fault ({DEBUG_VARIABLE}=1 does too).")
    ] = False,
) -> None:
    """Run transformer models bigger than the memory they may use, and know beforehand how fast that will be."""
    del version
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
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
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it once more when it ends
        return 1
    except HeadraceError as error:
        sys.stderr.write(wrapped(f"headrace: {error}", text_width(), hanging=2) + "\n")
        if _debugging():
            traceback.print_exc()
        return 2
    except Exception as error:
        sys.stderr.write(f"headrace: unexpected fault: {type(error).__name__}: {error}\n")
        if _debugging():
            traceback.print_exc()
        else:
            sys.stderr.write(f"(set {DEBUG_VARIABLE}=1 to see where)\n")
        return 1
    else:
        code = 0
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process whatever it is doing
        sys.stderr.write("headrace: interrupted\n")
    return code


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
