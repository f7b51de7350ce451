"""Models and machines with round numbers, for the tests of the planning floor."""

from __future__ import annotations

from typing import Any

from headrace.machine.engine import CONSTANTS, Engine
from headrace.machine.machine import Disk, Host, Link, Machine, Processor
from headrace.model.model import Layer, LayerGroup, Model
from planning_cases import exact

GPT3_WIDTH = 12288


def sure_engine(engine: Engine) -> Engine:
    """Return an engine whose constants are not in doubt."""
    sure: dict[str, Any] = {name: exact(getattr(engine, name).expected) for name in CONSTANTS}
    return Engine(name="sure", **(sure | {"spread": exact(1.0)}))


PERFECT_ENGINE = Engine(
    name="perfect",
    memory_share=exact(1.0),
    compute_share=exact(1.0),
    attention_share=exact(1.0),
    layer_overhead_s=exact(0.0),
    split_overhead_s=exact(0.0),
    pass_overhead_s=exact(0.0),
    link_share=exact(1.0),
    quantised_share=exact(1.0),
    exchange_excess=exact(0.0),
    spread=exact(1.0),
)


def dense_model(
    *,
    name: str = "dense",
    layers: int = 32,
    hidden: int = 4096,
    heads: int = 32,
    kv_heads: int = 8,
    inner: int = 14336,
    vocab: int = 128000,
    bytes_per_parameter: float = 2.0,
    context: int = 8192,
) -> Model:
    """Return a llama-like decoder with gated feed-forward."""
    head = hidden // heads
    attention = 2 * hidden * hidden + 2 * hidden * kv_heads * head
    feed_forward = 3 * hidden * inner
    layer = Layer(
        attention_parameters=attention,
        attention_bytes=attention * bytes_per_parameter,
        feed_forward_parameters=feed_forward,
        feed_forward_bytes=feed_forward * bytes_per_parameter,
        query_heads=heads,
        key_dim=head,
        value_dim=head,
        kv_elements_per_token=2 * kv_heads * head,
        kv_heads=kv_heads,
    )
    table = vocab * hidden
    return Model(
        name=name,
        groups=(LayerGroup(layer=layer, count=layers),),
        hidden_size=hidden,
        vocab_size=vocab,
        context_tokens=context,
        embedding_parameters=table,
        embedding_bytes=table * bytes_per_parameter,
        head_parameters=table,
        head_bytes=table * bytes_per_parameter,
    )


def moe_model() -> Model:
    """Return a mixture of 8 experts of which 2 are used."""
    layer = Layer(
        attention_parameters=40_000_000,
        attention_bytes=80e6,
        feed_forward_parameters=100_000,
        feed_forward_bytes=0.2e6,
        expert_parameters=176_000_000,
        expert_bytes=352e6,
        num_experts=8,
        experts_per_token=2,
        query_heads=32,
        key_dim=128,
        value_dim=128,
        kv_elements_per_token=2 * 8 * 128,
        kv_heads=8,
    )
    return Model(
        name="mixture",
        groups=(LayerGroup(layer=layer, count=32),),
        hidden_size=4096,
        vocab_size=32000,
        context_tokens=32768,
        embedding_parameters=131_072_000,
        embedding_bytes=262_144_000,
        head_parameters=131_072_000,
        head_bytes=262_144_000,
    )


def server(
    *,
    devices: int = 8,
    nodes: int = 1,
    memory_gb: float = 80,
    host_memory_gb: float = 1000,
    with_host: bool = True,
) -> Machine:
    """Return nodes of GPUs with exact constants: 2 TB/s, 300 TFLOP/s, 25 GB/s from the host, 5 GB/s from disk."""
    processor = Processor(
        name="gpu",
        kind="gpu",
        memory_bytes=memory_gb * 1e9,
        memory_bytes_per_s=exact(2e12),
        flops={"bf16": exact(300e12)},
        achievable=exact(1.0),
        power_w=exact(400),
        rent_usd_per_h=exact(2.0),
    )
    links = {
        "network": Link(name="network", bytes_per_s=exact(25e9), latency_s=exact(5e-6)),
    }
    if with_host:
        links["host"] = Link(name="host", bytes_per_s=exact(25e9), latency_s=exact(0))
    if devices > 1:
        links["scale_up"] = Link(name="scale_up", bytes_per_s=exact(300e9), latency_s=exact(3e-6))
    host = Host(memory_bytes=host_memory_gb * 1e9, memory_bytes_per_s=exact(200e9), flops=exact(2e12))
    return Machine(
        name=f"{nodes}x{devices} gpu",
        processor=processor,
        devices=devices,
        nodes=nodes,
        host=host if with_host else None,
        disk=Disk(bytes_per_s=exact(5e9), latency_s=exact(0)),
        links=links,
    )
