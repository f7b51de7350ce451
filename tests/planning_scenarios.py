"""Made-up models, machines and questions to the planner, for a CPU and for an accelerator."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from headrace.dtypes import STORED_BYTES
from headrace.errors import BudgetError
from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.model.layout import PAGE_BYTES
from headrace.model.safetensors_index import ShardFile, TensorEntry, TensorIndex
from headrace.model.stored_model import StoredModel, build_stored_model
from headrace.planning.infeasible import minimum_bytes
from headrace.planning.memory import MemoryAccount
from headrace.planning.plan import Arrangement, Placement, Plan, TierMemory
from headrace.planning.planner import compare, plan_fastest, plan_strategy
from headrace.planning.prediction import Candidate, predict
from headrace.planning.rates import LayerTimes, Rates
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import RUNNABLE, Strategy
from headrace.planning.workload import Workload

HIDDEN = 256
DEVICE, HOST, DISK, CPU = Placement.DEVICE, Placement.HOST, Placement.DISK, Placement.CPU
CHUNK_BYTES = 64 << 10


def model(
    layer_widths: Sequence[int], *, vocab: int = 3000, tied: bool = False, experts: int = 0, dtype: str = "BF16"
) -> StoredModel:
    """Fabricate a model whose layers have the given widths of their feed-forward part; no bytes of it exist."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer, width in enumerate(layer_widths):
        inner = f"model.layers.{layer}."
        shapes |= {f"{inner}self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        shapes[f"{inner}input_layernorm.weight"] = (HIDDEN,)
        for part in range(experts) or ("",):
            place = f"{inner}mlp.experts.{part}." if experts else f"{inner}mlp."
            shapes |= {f"{place}up_proj.weight": (width, HIDDEN), f"{place}down_proj.weight": (HIDDEN, width)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, HIDDEN)
    entries, end = {}, 1000
    for name, shape in shapes.items():
        size_bytes = math.prod(shape) * STORED_BYTES[dtype]
        entries[name] = TensorEntry(name, dtype, shape, 0, end, size_bytes)
        end += size_bytes
    raw: dict[str, Any] = {
        "model_type": "qwen3_moe" if experts else "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": max(layer_widths),
        "moe_intermediate_size": max(layer_widths),
        "num_hidden_layers": len(layer_widths),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "num_experts": experts or None,
        "num_experts_per_tok": min(2, experts) or None,
    }
    index = TensorIndex(
        directory=Path("model"), files=(ShardFile(Path("model/0"), end, 0, 0, 0),), entries=MappingProxyType(entries)
    )
    return build_stored_model("made up", raw, index)


def rates_of(spec: StoredModel, *, load_per_compute: float, **changes: Any) -> Rates:
    """Return a machine on which a decode pass of one sequence computes for 1 s, reads for `load_per_compute`."""
    per_parameter = 1.0 / sum(block.active_parameters for block in spec.blocks)
    return dataclasses.replace(
        Rates(
            read_bytes_per_s=sum(block.read_bytes for block in spec.blocks) / load_per_compute,
            curve=ComputeCurve(
                compute_dtype="bfloat16",
                stored_dtype="BF16",
                points=(CurvePoint(1, per_parameter), CurvePoint(64, 8 * per_parameter)),
            ),
            block_overhead_s=0.0,
            pass_overhead_s=0.0,
        ),
        **changes,
    )


def accelerator_rates(spec: StoredModel, *, disk_s: float, link_s: float, **changes: Any) -> Rates:
    """Return a machine on which a decode pass computes for 1 s; reading or copying all blocks take this long."""
    size_bytes = sum(block.held_bytes for block in spec.blocks)
    return dataclasses.replace(
        rates_of(spec, load_per_compute=disk_s),
        **{"link_bytes_per_s": size_bytes / link_s, "staged_bytes_per_s": size_bytes / (3 * link_s), **changes},
    )


def cpu_scenario(spec: StoredModel, *, dtype: str = "bfloat16", **workload: int) -> Scenario:
    """Ask for plans of a made-up model on a CPU, with no memory at all."""
    return Scenario(
        model=spec,
        workload=Workload(**{"prompt_tokens": 16, "generate_tokens": 32, **workload}),
        compute_dtype=dtype,
        budget_bytes=0,
    )


def accelerator_scenario(
    spec: StoredModel, *, dtype: str = "bfloat16", work: Workload | None = None, **changes: Any
) -> Scenario:
    """Ask for plans of a made-up model on an accelerator, with no memory at all unless `changes` give some."""
    return dataclasses.replace(
        Scenario(
            model=spec,
            workload=work or Workload(prompt_tokens=16, generate_tokens=32),
            compute_dtype=dtype,
            budget_bytes=0,
            host_budget_bytes=0,
            device="cuda:0",
            chunk_bytes=CHUNK_BYTES,
        ),
        **changes,
    )


def with_budget(scenario: Scenario, budget_bytes: int) -> Scenario:
    return dataclasses.replace(scenario, budget_bytes=budget_bytes)


def without_blocks(scenario: Scenario) -> TierMemory:
    """Return the device's memory that is held whichever blocks stay."""
    return MemoryAccount(scenario).device(Arrangement((DISK,) * len(scenario.model.blocks), 0))


def everything_bytes(scenario: Scenario) -> int:
    """Return a budget in which all blocks and the embedding table can stay."""
    return minimum_bytes(scenario, Strategy.RESIDENT) + scenario.model.table_bytes + 4 * PAGE_BYTES


def weights_bytes(scenario: Scenario) -> int:
    return sum(MemoryAccount(scenario).block_bytes)


def host_without_blocks_bytes(scenario: Scenario) -> int:
    """Return the ring's memory, and what the CPU needs apart from its layers where it may compute."""
    account = MemoryAccount(scenario)
    if not scenario.allow_cpu:
        return account.ring_bytes
    return account.ring_bytes + account.work_space_bytes + account.cpu_conversion_bytes


def budgets(scenario: Scenario, share: float, host_share: float) -> Scenario:
    """Give these shares of the weights' bytes on the device and on the host, in addition to what is needed anyhow."""
    table_bytes = 2 * scenario.model.table_bytes
    return dataclasses.replace(
        scenario,
        budget_bytes=without_blocks(scenario).total_bytes + int(share * (weights_bytes(scenario) + table_bytes)),
        host_budget_bytes=host_without_blocks_bytes(scenario)
        + int(host_share * (weights_bytes(scenario) + table_bytes)),
    )


def plan_any(scenario: Scenario, strategy: Strategy | None) -> Candidate:
    return plan_fastest(scenario) if strategy is None else plan_strategy(scenario, strategy)


def planned(scenario: Scenario, strategy: Strategy | None = None) -> Candidate:
    """Plan, where anything fits; no example otherwise."""
    try:
        return plan_any(scenario, strategy)
    except BudgetError:
        assume(False)
        raise


def fastest(scenario: Scenario) -> Candidate:
    """The fastest of all strategies, however many moving parts it has."""
    found = [item for item in compare(scenario).values() if isinstance(item, Candidate)]
    if not found:
        assume(False)
    return min(found, key=lambda item: item.prediction.total_s)


def prediction_s(scenario: Scenario, plan: Plan, arrangement: Arrangement) -> float:
    """Return the seconds of the plan's work in another arrangement."""
    held = MemoryAccount(scenario).of(arrangement)
    other = dataclasses.replace(
        plan,
        strategy=Strategy.OVERLAP,
        placements=arrangement.placements,
        slots=arrangement.slots,
        embedding=held.embedding,
        memory=held.device,
        host_memory=held.host,
        cache_on_host=arrangement.cache_on_host,
    )
    return predict(other, scenario).total_s


strategies = st.sampled_from([*RUNNABLE, None])
cpu_widths = st.lists(st.just(700), min_size=1, max_size=8) | st.lists(
    st.sampled_from([100, 700, 2500]), min_size=1, max_size=6
)
cpu_specs = st.builds(model, cpu_widths, vocab=st.sampled_from([500, 3000, 9000, 20_000, 40_000]), tied=st.booleans())
cpu_workloads = st.builds(
    Workload,
    sequences=st.sampled_from([1, 4]),
    prompt_tokens=st.sampled_from([1, 16]),
    generate_tokens=st.sampled_from([1, 8, 32]),
)
accelerator_widths = st.integers(3, 10).map(lambda layers: [700] * layers) | st.lists(
    st.sampled_from([100, 700, 2500]), min_size=1, max_size=7
)
accelerator_specs = st.builds(model, accelerator_widths, vocab=st.sampled_from([500, 3000, 8000]), tied=st.booleans())
accelerator_workloads = st.builds(
    Workload,
    sequences=st.sampled_from([1, 4]),
    prompt_tokens=st.sampled_from([1, 16, 300]),
    generate_tokens=st.sampled_from([1, 8, 32]),
)


@st.composite
def cpu_scenarios(draw: st.DrawFn) -> Scenario:
    """Draw a model, some work, a CPU, and any budget between nothing and plenty."""
    spec = draw(cpu_specs)
    dtype = draw(st.sampled_from(["bfloat16", "float32"]))
    scenario = dataclasses.replace(cpu_scenario(spec, dtype=dtype), workload=draw(cpu_workloads))
    share = draw(st.floats(-0.1, 1.2))
    least, most = minimum_bytes(scenario), everything_bytes(scenario)
    slowdown = st.sampled_from([1.0, 1.2])
    rates = rates_of(
        spec,
        load_per_compute=draw(st.sampled_from([0.3, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0])),
        compute_slowdown=draw(slowdown),
        read_slowdown=draw(slowdown),
    )
    return with_budget(scenario, max(0, int(least + share * (most - least)))).at(rates)


@st.composite
def accelerator_scenarios(
    draw: st.DrawFn,
    *,
    models: st.SearchStrategy[StoredModel] = accelerator_specs,
    cpu: bool | None = None,
    host_cache: bool | None = None,
) -> Scenario:
    """Draw a model, some work, an accelerator, and any budgets between nothing and plenty."""
    spec = draw(models)
    scenario = accelerator_scenario(
        spec,
        dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        work=draw(accelerator_workloads),
        pinned=draw(st.booleans()),
        allow_cpu=draw(st.booleans()) if cpu is None else cpu,
        allow_host_cache=draw(st.booleans()) if host_cache is None else host_cache,
    )
    layers = len(spec.blocks) - 1
    slower = draw(st.sampled_from([0.5, 2.0, 10.0]))
    rates = accelerator_rates(
        spec,
        disk_s=draw(st.sampled_from([0.5, 1.5, 4.0, 20.0])),
        link_s=draw(st.sampled_from([0.3, 0.9, 1.5, 5.0])),
        copy_latency_s=draw(st.sampled_from([0.0, 1e-3])),
        cpu_layer=LayerTimes(prefill_s=4 * slower / layers, decode_s=slower / layers),
        activation_latency_s=draw(st.sampled_from([0.0, 1e-2])),
        activation_s_per_token=draw(st.sampled_from([0.0, 1e-4])),
        memory_copy_bytes_per_s=draw(st.sampled_from([math.inf, weights_bytes(scenario) / 0.5])),
    )
    twentieths = st.integers(0, 24).map(lambda number: number / 20 + 0.01)
    share = draw(twentieths | st.sampled_from([-0.1, 0.3, 0.5, 0.7]))
    return budgets(scenario.at(rates), share, draw(twentieths | st.sampled_from([-0.02, 0.0])))


def scenarios() -> st.SearchStrategy[Scenario]:
    """Draw one of either device."""
    return cpu_scenarios() | accelerator_scenarios()
