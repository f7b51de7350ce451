"""Models and machines made up for the planning tests: round figures, so that results can be worked out by hand."""

from __future__ import annotations

from headrace.machine.machine import Disk, Host, Link, Machine, Processor
from headrace.machine.quantity import Quantity
from headrace.model.model import Layer, LayerGroup, Model


def exact(value: float) -> Quantity:
    return Quantity.of(value, "a test")


def made_up_model(*, layers: int = 32, name: str = "made-up", context_tokens: int = 100_000) -> Model:
    """0.2 x 10^9 parameters a layer in 16 bits: 13 GB with 32 layers."""
    layer = Layer(
        attention_parameters=67_000_000,
        attention_bytes=134e6,
        feed_forward_parameters=135_000_000,
        feed_forward_bytes=270e6,
        query_heads=32,
        key_dim=128,
        value_dim=128,
        kv_elements_per_token=2 * 8 * 128,
        kv_heads=8,
    )
    return Model(
        name=name,
        groups=(LayerGroup(layer=layer, count=layers),),
        hidden_size=4096,
        vocab_size=32_000,
        context_tokens=context_tokens,
        embedding_parameters=131_000_000,
        embedding_bytes=262e6,
        head_parameters=131_000_000,
        head_bytes=262e6,
    )


def made_up_processor() -> Processor:
    """An 80 GB device of 2 TB/s and 989 T 16-bit operations per second, 2 $/h, 700 W, 30,000 $."""
    return Processor(
        name="made-up-80",
        kind="gpu",
        memory_bytes=80e9,
        memory_bytes_per_s=exact(2e12),
        flops={"bf16": exact(989e12)},
        achievable=exact(0.8),
        power_w=exact(700),
        rent_usd_per_h=exact(2.0),
        price_usd=exact(30_000),
    )


def made_up_machine(*, devices: int = 8, nodes: int = 1, host_bytes: float = 2e12) -> Machine:
    links = {
        "host": Link(name="host", bytes_per_s=exact(25e9), latency_s=exact(1e-5)),
        "scale_up": Link(name="scale_up", bytes_per_s=exact(300e9), latency_s=exact(2e-6)),
        "network": Link(name="network", bytes_per_s=exact(25e9), latency_s=exact(5e-6)),
    }
    host = Host(memory_bytes=host_bytes, memory_bytes_per_s=exact(200e9), flops=exact(2e12))
    return Machine(
        name=f"{nodes}x{devices}x made-up",
        processor=made_up_processor(),
        devices=devices,
        nodes=nodes,
        host=host,
        disk=Disk(bytes_per_s=exact(6e9), latency_s=exact(1e-4)),
        links=links,
    )
