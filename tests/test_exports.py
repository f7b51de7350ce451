"""What `import headrace` promises: the exceptions by name, three verbs, and no library that a plan does without."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import Any

import pytest

import headrace
from headrace import errors
from headrace.cli.main import main

BLOCK = (
    "import sys\n"
    "class Refuse:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.split('.')[0] in {'torch', 'transformers', 'numpy', 'safetensors', 'accelerate'}:\n"
    "            raise ImportError(name)\n"
    "sys.meta_path.insert(0, Refuse())\n"
)


def output_of(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_kind_of_error_is_importable_from_the_package() -> None:
    kinds = {
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.HeadraceError) and not name.startswith("_")
    }
    assert len(kinds) > 5
    for name in kinds:
        assert getattr(headrace, name) is getattr(errors, name)
        assert name in headrace.__all__
    with pytest.raises(headrace.HeadraceError):
        headrace.plan("gpt-33", machine="h100")


def test_every_name_that_is_promised_is_there() -> None:
    for name in headrace.__all__:
        assert getattr(headrace, name) is not None
    assert {"load", "plan", "probe"} <= set(headrace.__all__)


def test_an_unknown_attribute_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'headrace' has no attribute 'plann'"):
        _ = headrace.plann


def test_import_headrace_imports_no_heavy_library() -> None:
    code = (
        "import sys, headrace\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'typer', 'rich') if name in sys.modules])\n"
    )
    assert output_of(code) == "[]\n"


def test_a_plan_in_python_without_torch_is_the_one_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    code = BLOCK + "import json, headrace\nprint(json.dumps(headrace.plan('gpt-3', machine='8xa100-80')))\n"
    in_python: dict[str, Any] = json.loads(output_of(code))
    assert main(["plan", "gpt-3", "--machine", "8xa100-80", "--json"]) == 0
    assert in_python == json.loads(capsys.readouterr().out)
