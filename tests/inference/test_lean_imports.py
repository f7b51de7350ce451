"""A command's process holds no compiler and no sympy until something is compiled, and then compiling works."""

from __future__ import annotations

import subprocess
import sys

import torch
import transformers  # noqa: F401 - what the second test is about

from headrace.inference.lean_imports import leave_out_compiler_and_groups

SCRIPT = """
import gc
import sys
from headrace.cli.command import load_run_libraries

load_run_libraries()
assert gc.isenabled() and gc.get_freeze_count() > 100_000, "what was imported is no garbage, and not looked at again"
import torch
from transformers import LlamaConfig
from headrace.inference.skeleton import build_skeleton

sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
model = build_skeleton(LlamaConfig(**sizes), torch.bfloat16)
assert model.dtype is torch.bfloat16
left_out = ["sympy", "torch._dynamo.convert_frame", "torch.distributed.tensor", "torch._inductor"]
assert [name for name in left_out if name in sys.modules] == [], "loaded although nothing compiles"
assert torch.distributed.is_available.__module__ == "torch.distributed", "torch itself is as it was"
compiled = torch.compile(lambda x: x + 1, backend="eager")
assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]
assert "torch._dynamo.convert_frame" in sys.modules
assert torch._dynamo.disable.__module__.startswith("torch."), "its own marks again"
"""


def test_what_only_compiling_needs_is_loaded_when_something_is_compiled() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_process_that_has_either_already_is_left_as_it_is() -> None:
    compiler, is_available = sys.modules.get("torch._dynamo"), torch.distributed.is_available
    assert "transformers" in sys.modules
    leave_out_compiler_and_groups()
    assert sys.modules.get("torch._dynamo") is compiler
    assert torch.distributed.is_available is is_available
