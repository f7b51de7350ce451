# ruff: noqa: E501
"""Wrong formulas are noticed: each mutant is a line of the planner changed as people get it wrong, and a gate goes red.

A mutant runs in a process of its own whose import of one module rewrites that line; nothing on disk changes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import headrace

FOLDERS = (Path(__file__).parents[1], Path(headrace.__file__).parents[1])
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(map(str, FOLDERS)), "PATH": "/usr/bin:/bin"}
"""the tests' folder, and the source that this process tests"""

RUNNER = """
import importlib.abc, importlib.util, sys
module, old, new = sys.argv[1:4]

class Rewriting(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name != module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        self.origin = spec.origin
        return importlib.util.spec_from_loader(name, self, origin=spec.origin)

    def exec_module(self, made):
        source = open(self.origin, encoding="utf-8").read()
        if source.count(old) < 1:
            sys.exit(3)
        made.__file__ = self.origin
        exec(compile(source.replace(old, new), self.origin, "exec"), made.__dict__)

sys.meta_path.insert(0, Rewriting())
from physics_gates import GATES
for gate in GATES:
    try:
        gate()
    except Exception as error:
        print(gate.__name__, type(error).__name__)
        sys.exit(1 if isinstance(error, AssertionError) else 4)
"""


class Mutant(NamedTuple):
    """A module, a text in it, and what is put in its place."""

    what: str
    module: str
    old: str
    new: str


COST, SHAPE = "headrace.planning.closed_form", "headrace.model.model"
CONFIG, RATES = "headrace.model.from_config", "headrace.planning.described_rates"
COLLECTIVES, MEMORY = "headrace.planning.collectives", "headrace.planning.memory"
PLANNER = "headrace.planning.planner"
MUTANTS = (
    Mutant("GiB for GB", "headrace.units", '"GB": 10**9', '"GB": 2**30'),
    Mutant("GB for GiB", "headrace.units", '"G": 2**30', '"G": 10**9'),
    Mutant("GiB for GB in machines", "headrace.machine.unit_text", '"G": 1e9', '"G": 2.0**30'),
    Mutant("bits for bytes in machines", "headrace.machine.unit_text", 'f"{name}/s": factor', 'f"{name}/s": factor / 8'),
    Mutant("bytes for bits in formats", "headrace.model.formats", "byte = chosen.bits / 8", "byte = chosen.bits"),
    Mutant("no exchange between devices", COST, "        if width > 1:\n            communication_s = 2.0", "        if False:\n            communication_s = 2.0"),
    Mutant("one exchange per layer", COST, "communication_s = 2.0 * self.exchange_s", "communication_s = 1.0 * self.exchange_s"),
    Mutant("key-value heads taken as attention heads", CONFIG, "kv_elements=2 * kv_heads * head_dim", "kv_elements=2 * heads * head_dim"),
    Mutant("keys without values", CONFIG, "kv_elements=2 * kv_heads * head_dim", "kv_elements=kv_heads * head_dim"),
    Mutant("latent cache of every head", CONFIG, "kv_elements=latent + rope", "kv_elements=heads * (nope + rope + value)"),
    Mutant("one operation per weight", COST, "arithmetic_s = 2.0 * layer", "arithmetic_s = 1.0 * layer"),
    Mutant("all experts read by every token", SHAPE, "        touched = self.experts_touched(tokens)\n", "        touched = self.num_experts\n"),
    Mutant("experts of one token only", SHAPE, "self.experts_touched(tokens)\n", "self.experts_touched(1)\n"),
    Mutant("every expert active", SHAPE, "self.experts_per_token * self.expert_parameters", "self.num_experts * self.expert_parameters"),
    Mutant("overlap as a sum", COST, "total_s = max(busy_s, load_s)", "total_s = busy_s + load_s"),
    Mutant("the first layer's loading hidden", COST, "return max(device_s + waiting_s,", "return max(device_s,"),
    Mutant("the last layer's computing hidden", COST, "+ other_hop_s + per_layer_s + ends_s)", ")"),
    Mutant("sequence as a maximum", COST, "total_s = busy_s + link_s + disk_s", "total_s = max(busy_s, link_s, disk_s)"),
    Mutant("disk forgotten", COST, "load_s = max(link_s, disk_s)\n", "load_s = link_s\n"),
    Mutant("uplinks not shared", "headrace.machine.machine", "link.bytes_per_s.times(1 / sharers)", "link.bytes_per_s.times(1.0)"),
    Mutant("hand-overs of stages forgotten", COST, "communication_s += divided.pipeline * self.hop_s", "communication_s += 0 * self.hop_s"),
    Mutant("stages work on one token together", COST, "prefill_s, decode_s = prefill.total_s, decode.total_s\n", "prefill_s, decode_s = (cost.total_s / self.arrangement.parallelism.pipeline for cost in (prefill, decode))\n"),
    Mutant("micro-batches free", COST, "prefill_s += (batches - 1) *", "prefill_s += 0 *"),
    Mutant("cache split beyond its heads", MEMORY, "return max(1, min(width, layer.kv_heads or 1))", "return width"),
    Mutant("cache not read", COST, "max(scores_s, cache_s)", "scores_s"),
    Mutant("window ignored", SHAPE, "return min(context_tokens, self.window_tokens) if self.window_tokens else context_tokens", "return context_tokens"),
    Mutant("weights not split", COST, "layer.bytes_read(carried.tokens) / width", "layer.bytes_read(carried.tokens)"),
    Mutant("arithmetic not split", COST, "carried.tokens / width / rates.peaks.flops", "carried.tokens / rates.peaks.flops"),
    Mutant("bandwidth efficiency inverted", RATES, 'memory * values["engine.memory_share"]', 'memory / values["engine.memory_share"]'),
    Mutant("arithmetic at twice the peak", RATES, 'values["processor.flops"] *', '2.5 * values["processor.flops"] *'),
    Mutant("residents not held", MEMORY, "held_bytes = layers_bytes * resident_share", "held_bytes = 0.0"),
    Mutant("slots without memory", MEMORY, "arrangement.slots * largest_bytes / width if", "0.0 * largest_bytes / width if"),
    Mutant("cache counted once for all sequences", MEMORY, "        * sequences\n", "        * 1\n"),
    Mutant("rent per second", "headrace.planning.price", 'v["usd_per_h"] / 3600 / v', 'v["usd_per_h"] / v'),
    Mutant("prefill not paid", COST, "total_s=prefill_s + passes * decode_s", "total_s=passes * decode_s"),
    Mutant("a gathered part instead of all others'", COLLECTIVES, "(devices - 1) / devices * size_bytes / wire.bytes_per_s\n\n\ndef ring_all_reduce", "1 / devices * size_bytes / wire.bytes_per_s\n\n\ndef ring_all_reduce"),
    Mutant("all-reduce without its second half", COLLECTIVES, "return 2.0 * ring_all_gather", "return 1.0 * ring_all_gather"),
    Mutant("exchange only hands out", COLLECTIVES, "return 2.0 * wire.latency_s + 2.0 * (devices - 1)", "return 2.0 * wire.latency_s + 1.0 * (devices - 1)"),
    Mutant("messages weigh nothing", COLLECTIVES, "return self.latency_s + size_bytes / self.bytes_per_s", "return self.latency_s"),
    Mutant("sharded devices gather nothing", COST, "if divided.sharded and parts > 1:", "if False:"),
    Mutant("sharded devices pull everything", COST, "divided.replicas if divided.sharded else divided.tensor\n", "divided.tensor\n"),
    Mutant("missed experts are free", COST, "layer.expert_bytes * missed", "layer.expert_bytes * 0"),
    Mutant("hits counted as misses", COST, "missed = 1.0 - arrangement.expert_hit_rate", "missed = 1.0"),
    Mutant("a cache on the host is free", COST, "        if arrangement.cache_on_host:", "        if False:"),
    Mutant("a cache on the host is not read", COST, "cache_s = self._cache_bytes(layer, carried) /", "cache_s = (not self.arrangement.cache_on_host) * self._cache_bytes(layer, carried) /"),
    Mutant("more moving parts need not pay", PLANNER, "MARGIN = 0.02", "MARGIN = 0.0"),
    Mutant("a split in two directions counts as one", PLANNER, "            divided.two_dimensional,\n", ""),
    Mutant("disk counted twice", COST, "link_bytes / rates.read_bytes_per_s if", "2 * link_bytes / rates.read_bytes_per_s if"),
    Mutant("link efficiency forgotten", RATES, 'get("engine.link_share", 1.0)', "1.0"),
    Mutant("tied head counted twice", SHAPE, "(0 if self.tied else self.head_bytes)", "self.head_bytes"),
    Mutant("embedding forgotten", SHAPE, "layers + self.embedding_parameters + head", "layers + head"),
)  # fmt: skip


ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'src'}", "PATH": "/usr/bin:/bin"}
"""the source beside these tests, whichever checkout is installed"""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_a_gate_goes_red(mutant: Mutant) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, mutant.module, mutant.old, mutant.new],
        capture_output=True,
        text=True,
        timeout=240,
        env=ENVIRONMENT,
    )
    assert done.returncode != 3, f"{mutant.module} no longer holds {mutant.old!r}: change the mutant with it"
    assert done.returncode != 4, f"the mutant breaks the code instead of a formula: {done.stdout}"
    assert done.returncode == 1, f"no gate noticed: {mutant.what}"
    assert done.stdout.strip(), done.stderr


def test_the_gates_are_green_without_a_mutant() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, "headrace.units", '"GB": 10**9', '"GB": 10**9'],
        capture_output=True,
        text=True,
        timeout=240,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
