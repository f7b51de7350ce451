"""The one JSON object of a plan's answer, for the command line, Python, the server and the page."""

from __future__ import annotations

import math
from typing import Any

from headrace.errors import BudgetError
from headrace.machine.machine import Machine
from headrace.machine.quantity import Quantity
from headrace.model.model import Model
from headrace.model.stored_model import StoredModel
from headrace.planning.answer import PlanAnswer
from headrace.planning.break_even import BreakEven
from headrace.planning.plan import Placement
from headrace.planning.prediction import Candidate, PredictionInterval
from headrace.planning.price import Price
from headrace.planning.scenario import Scenario
from headrace.planning.strategies import Strategy


def answer_json(answer: PlanAnswer, *, version: str) -> dict[str, Any]:
    """Build the object that `headrace plan --json` prints."""
    scenario = answer.scenario
    return {
        "model": model_json(scenario.model),
        "machine": _machine(answer),
        "workload": dict(vars(scenario.workload)),
        "strategies": [_strategy(answer, name, item) for name, item in answer.compared.items()],
        "recommended": None if answer.best is None else answer.best.plan.strategy.value,
        "break_even": _break_even(answer.break_even),
        "advice": list(answer.advice),
        "notes": list(answer.notes),
        "headrace_version": version,
    }


def model_json(model: Model) -> dict[str, Any]:
    """A model in numbers."""
    return {
        **_fields(model, "name", "parameters", "active_parameters", "weight_format", "stored_dtype", "num_layers"),
        **_fields(model, "hidden_size", "vocab_size", "context_tokens", "tied", "source"),
        "model_type": model.model_type if isinstance(model, StoredModel) else None,
        "weights_bytes": round(model.weights_bytes),
        "num_blocks": len(model.blocks),
        "largest_block_bytes": max(block.size_bytes for block in model.blocks),
        "kv_cache_bytes_per_token": round(model.kv_bytes_per_token()),
        "layers": [
            {
                "count": group.count,
                "size_bytes": round(group.layer.size_bytes),
                "attention_heads": group.layer.query_heads,
                "key_value_heads": group.layer.kv_heads,
                **_fields(group.layer, "parameters", "active_parameters", "num_experts", "experts_per_token"),
                **_fields(group.layer, "kv_elements_per_token", "window_tokens"),
            }
            for group in model.groups
        ],
        "notes": list(model.notes),
    }


def _machine(answer: PlanAnswer) -> dict[str, Any]:
    scenario, machine = answer.scenario, answer.scenario.machine
    found: dict[str, Any] = {"name": answer.machine_name, "source": answer.source, "device": scenario.device}
    if answer.accelerator:
        found["accelerator"] = answer.accelerator
    if machine is not None:
        found |= _described(machine)
    if scenario.is_calibrated:
        found |= _measured(scenario)
    else:
        found["engine"] = {"name": scenario.engine.name}
    return {
        **found,
        "budget_bytes": scenario.budget_bytes,
        "host_budget_bytes": scenario.host_budget_bytes,
        "host_memory_bytes": scenario.host_budget_bytes,
    }


def _described(machine: Machine) -> dict[str, Any]:
    return {
        "processor": machine.processor.name,
        "memory_bytes": machine.host_bytes,
        "device_memory_bytes": int(machine.processor.memory_bytes),
        "device_free_bytes": machine.processor.available_bytes,
        "disk": None if machine.disk is None else _rate(machine.disk.bytes_per_s),
        "devices": machine.num_devices,
        "devices_per_node": machine.devices,
        "nodes": machine.nodes,
        "links": {name: _rate(link.bytes_per_s) | {"uplink": link.uplink} for name, link in machine.links.items()},
    }


def _rate(rate: Quantity) -> dict[str, Any]:
    return {
        "bytes_per_s": rate.expected,
        "low_bytes_per_s": rate.low,
        "high_bytes_per_s": rate.high,
        "source": rate.source,
    }


def _measured(scenario: Scenario) -> dict[str, Any]:
    """List the speeds that a simulated prediction rests on."""
    rates = scenario.known_rates
    found: dict[str, Any] = {}
    if not scenario.on_cpu:
        found = {
            "link_bytes_per_s": rates.link_bytes_per_s,
            "staged_bytes_per_s": rates.staged_bytes_per_s,
            "page_locked": scenario.pinned,
        }
    return {
        **found,
        "read_bytes_per_s": rates.read_bytes_per_s,
        "compute_dtype": rates.known_curve.compute_dtype,
        "stored_dtype": scenario.model.stored_dtype,
        "arithmetic": [
            {"tokens": point.tokens, "parameters_per_s": 1 / point.seconds_per_parameter}
            for point in rates.known_curve.points
        ],
        "block_overhead_s": rates.block_overhead_s,
        "pass_overhead_s": rates.pass_overhead_s,
    }


_TIMES = ("prefill_s", "decode_s_per_pass", "tokens_per_s", "total_s")


def _strategy(answer: PlanAnswer, name: Strategy, item: Candidate | BudgetError) -> dict[str, Any]:
    if isinstance(item, BudgetError):
        no_times = dict.fromkeys(_TIMES)
        return {
            "name": name.value,
            "fits": False,
            **no_times,
            "memory_bytes": None,
            "binds": None,
            **_price(None),
            "low": no_times,
            "high": no_times,
            "why_not": str(item),
            "required_bytes": item.required_bytes,
        }
    (plan, predicted), interval, cost = item, answer.intervals[name], answer.prices.get(name)
    arrangement, even = plan.arrangement, answer.break_even_of(item)
    return {
        "name": name.value,
        "fits": True,
        **_fields(predicted, *_TIMES, "binds", "load_s_per_pass", "compute_s_per_pass", "possible_decode_s"),
        "memory_bytes": plan.bytes_by_tier,
        **_price(cost),
        "low": _ends(interval, cost, "low"),
        "high": _ends(interval, cost, "high"),
        "why_not": None,
        "break_even_tokens_per_pass": 0.0 if even is None else _finite(even.expected),
        "decode_parts_s": dict(predicted.decode_parts_s),
        "prefill_parts_s": dict(predicted.prefill_parts_s),
        **_fields(plan.parallelism, "devices", "tensor", "pipeline", "micro_batches", "replicas"),
        **_fields(plan, "compute_dtype", "device", "num_blocks", "resident_blocks", "streamed_blocks", "cpu_blocks"),
        **_fields(plan, "slots", "streamed_bytes_per_pass", "cache_on_host", "expert_hit_rate"),
        "host_stored_blocks": plan.placements.count(Placement.HOST),
        "disk_blocks": plan.placements.count(Placement.DISK),
        "resident_share": arrangement.resident_share,
        "host_share": arrangement.cpu_share,
        "weights_from": arrangement.source.value,
        "embedding": plan.embedding.value,
        "kv_cache_bytes": plan.memory.kv_cache_bytes,
        "kv_cache_in": "host" if plan.cache_on_host else "device",
    }


def _fields(value: object, *names: str) -> dict[str, Any]:
    """Those that are called in JSON as they are here."""
    return {name: getattr(value, name) for name in names}


def _price(cost: Price | None) -> dict[str, float | None]:
    names = ("usd_per_750_words", "usd_per_million_tokens", "joules_per_token")
    return {name: getattr(getattr(cost, name, None), "expected", None) for name in names}


def _ends(interval: PredictionInterval, cost: Price | None, end: str) -> dict[str, float]:
    values: dict[str, float] = {name: getattr(getattr(interval, name), end) for name in _TIMES}
    if cost is not None and cost.usd_per_million_tokens is not None:
        values["usd_per_million_tokens"] = getattr(cost.usd_per_million_tokens, end)
    return values


def _break_even(even: BreakEven | None) -> dict[str, Any]:
    if even is None:
        return {"tokens_per_pass": 0.0, "kv_cache_bytes": 0, "reachable_by": [], "how": [], "why_not": []}
    return {
        "tokens_per_pass": _finite(even.tokens_per_pass.expected),
        "low": _finite(even.tokens_per_pass.low),
        "high": _finite(even.tokens_per_pass.high),
        "source": even.source.value,
        "kv_cache_bytes": None if even.kv_cache_bytes == math.inf else round(even.kv_cache_bytes),
        "critical_batch": even.critical_batch,
        "reachable_by": [way.name for way in even.ways if way.reached],
        "how": [way.how for way in even.ways if way.reached],
        "why_not": [f"{way.name}: {way.how}" for way in even.ways if not way.reached],
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: null stands for a number of tokens that is never reached."""
    return value if value < math.inf else None
