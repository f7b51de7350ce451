"""Create one virtual environment per group of rivals, and one for bench/clients, with pinned versions.

    python bench/rivals/environments.py [NAME ...] [--directory DIR]

An environment that cannot be installed is reported as skipped, with the reason and the log's name, and does not stop
the others. Those already installed from the same requirements are left as they are. Where packages come from is pip's
own setting (its configuration file or variables). On an index whose plain `torch` brings the CUDA libraries, point pip
at one that has CPU builds.

Compiling needs a C++ compiler and cmake for llama.cpp, and the libaio headers for DeepSpeed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
DEFAULT_DIRECTORY = Path.home() / ".cache" / "headrace" / "bench-envs"


class InstallError(Exception):
    """An environment cannot be had here; the text says why."""


@dataclass(frozen=True)
class Stage:
    """One `pip install` and the variables that steer its builds."""

    requirements: str
    variables: dict[str, str] = field(default_factory=dict)
    isolated: bool = True


@dataclass(frozen=True)
class Environment:
    """What one environment consists of, what it needs of the machine and how to see that it works."""

    name: str
    stages: tuple[Stage, ...]
    check: str
    commands: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    check_variables: dict[str, str] = field(default_factory=dict)


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment(
            name="huggingface",
            stages=(Stage("huggingface.txt"),),
            check="import torch, transformers, accelerate",
        ),
        Environment(
            name="llama_cpp",
            # GGML_NATIVE compiles for this machine's own processor: without it bfloat16 has no fast kernels.
            stages=(Stage("llama_cpp.txt", {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}),),
            check="import gguf, llama_cpp; print(llama_cpp.llama_print_system_info().decode())",
            commands=("c++",),
        ),
        Environment(
            name="deepspeed",
            stages=(
                Stage("deepspeed-base.txt"),
                Stage(
                    "deepspeed.txt",
                    {
                        "DS_ACCELERATOR": "cpu",
                        "DS_BUILD_OPS": "0",
                        "DS_BUILD_AIO": "1",
                        "DS_BUILD_PIN_MEMORY": "1",
                        "DS_BUILD_SHM_COMM": "1",
                        # Its build for the CPU accelerator forgets to link libaio.
                        "LDFLAGS": "-Wl,--no-as-needed -laio",
                    },
                    isolated=False,
                ),
            ),
            check=(
                "from deepspeed.ops.op_builder import AsyncIOBuilder\n"
                "AsyncIOBuilder().load(verbose=False).aio_handle\n"
                "from deepspeed.accelerator import get_accelerator\n"
                "get_accelerator().create_op_builder('ShareMemCommBuilder').load(verbose=False)\n"
                "import transformers, accelerate"
            ),
            commands=("c++",),
            headers=("libaio.h",),
            check_variables={"DS_ACCELERATOR": "cpu"},
        ),
        Environment(
            name="airllm",
            stages=(Stage("airllm.txt"),),
            check="import airllm",
        ),
        Environment(
            name="clients",
            stages=(Stage("clients.txt"),),
            check="import lm_eval, outlines, peft, langchain_huggingface",
        ),
    )
}


def fingerprint(environment: Environment) -> str:
    """Return a text that changes whenever what would be installed does."""
    digest = hashlib.sha256(sys.version.encode())
    for stage in environment.stages:
        digest.update((REQUIREMENTS / stage.requirements).read_bytes())
        digest.update(json.dumps([stage.variables, stage.isolated]).encode())
    return digest.hexdigest()


def missing_tools(environment: Environment) -> list[str]:
    """List the commands and headers that the builds need and this machine lacks."""
    missing = [command for command in environment.commands if not shutil.which(command)]
    compiler = shutil.which("c++")
    for header in environment.headers if compiler else ():
        command = [str(compiler), "-E", "-x", "c++", "-"]
        if subprocess.run(command, input=f"#include <{header}>\n".encode(), capture_output=True).returncode:
            missing.append(header)
    return missing


def python_of(directory: Path, name: str) -> Path:
    """Return the interpreter of an environment."""
    return directory / name / "bin" / "python"


def run_logged(command: list[str], log_path: Path, variables: dict[str, str]) -> None:
    """Run a command with its output appended to the log; InstallError with the log's last lines if it fails."""
    with open(log_path, "a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | variables).returncode
    if status:
        lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
        raise InstallError(f"exit status {status}: {' | '.join(lines[-3:])[-600:]} (log: {log_path})")


def install(environment: Environment, directory: Path, *, jobs: int) -> None:
    """Create the environment, or leave it if it is there and up to date."""
    target = directory / environment.name
    stamp = target / "headrace-bench.json"
    wanted = fingerprint(environment)
    if stamp.is_file() and json.loads(stamp.read_text()).get("fingerprint") == wanted:
        return
    missing = missing_tools(environment)
    if missing:
        raise InstallError(f"this machine lacks {', '.join(missing)}")
    log_path = directory / f"{environment.name}.log"
    log_path.unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    venv.create(target, with_pip=True)
    python = str(python_of(directory, environment.name))
    # ninja and cmake that pip installed into the environment are found by builds without isolation only on the path.
    common = {
        "PATH": f"{target / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        "MAX_JOBS": str(jobs),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
    }
    for stage in environment.stages:
        command = [python, "-m", "pip", "install", "--disable-pip-version-check"]
        if not stage.isolated:
            command.append("--no-build-isolation")
        if stage.variables:
            command.append("--no-cache-dir")  # a wheel built earlier with other variables must not be taken
        command += ["-r", str(REQUIREMENTS / stage.requirements)]
        run_logged(command, log_path, common | stage.variables)
    run_logged([python, "-c", environment.check], log_path, common | environment.check_variables)
    frozen = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    stamp.write_text(json.dumps({"fingerprint": wanted, "packages": frozen.split("\n")[:-1]}, indent=1))


def main() -> None:
    """Install what was asked for and say what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)} (default: all)")
    parser.add_argument("--directory", type=Path, default=DEFAULT_DIRECTORY, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(ENVIRONMENTS))
    if unknown:
        parser.error(f"no such environment: {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}")
    directory = options.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    status_path = directory / "environments.json"
    status = json.loads(status_path.read_text()) if status_path.is_file() else {}
    skipped = False
    for name in options.names or ENVIRONMENTS:
        try:
            install(ENVIRONMENTS[name], directory, jobs=options.jobs)
            status[name] = {"installed": True}
            print(f"{name}: installed", flush=True)
        except (InstallError, OSError, subprocess.SubprocessError) as error:
            status[name] = {"installed": False, "reason": str(error)}
            skipped = True
            print(f"{name}: skipped: {error}", flush=True)
        status_path.write_text(json.dumps(status, indent=1))
    sys.exit(1 if skipped else 0)


if __name__ == "__main__":
    main()
