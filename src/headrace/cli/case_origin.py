"""Where a planning case comes from: this machine, measured now with the model, or a machine file.

Measuring takes a second or two and needs torch. A machine file, written by `headrace probe` here or elsewhere, needs
none; the model is then known by its headers alone.
"""

from __future__ import annotations

from pathlib import Path

from headrace.cli.accelerator_case import described_accelerator, measured_accelerator
from headrace.cli.planning_case import Asked, PlanningCase
from headrace.cli.processor_case import described_processor, measured_processor
from headrace.machine.machine import Machine
from headrace.model.config_fields import read_config
from headrace.model.safetensors_index import TensorIndex
from headrace.model.stored_model import build_stored_model


def measured_here(directory: Path, asked: Asked) -> PlanningCase:
    """Measure this machine with the model in `directory`, on the device that a run would take."""
    from headrace.streaming.checkpoint import Checkpoint
    from headrace.streaming.devices import open_device

    device = open_device(asked.device)
    checkpoint = Checkpoint(directory, cut_head=device.uses_host_memory)
    try:
        if device.uses_host_memory:
            return measured_processor(checkpoint, asked)
        return measured_accelerator(checkpoint, device, asked)
    finally:
        checkpoint.close()


def from_description(directory: Path, asked: Asked, machine: Machine, *, origin: str) -> PlanningCase:
    """Plan for the machine of a file: its first accelerator, or the device that was asked for.

    Raises InvalidRequestError for a device that the file does not describe, MachineError for what it does not say.
    """
    machine = machine.on(asked.device, origin=origin)
    on_cpu = not machine.accelerators
    config, index = read_config(directory / "config.json"), TensorIndex.from_directory(directory)
    model = build_stored_model(directory.resolve().name, config, index, cut_head=on_cpu)
    if on_cpu:
        return described_processor(model, asked, machine, origin=origin)
    return described_accelerator(model, asked, machine, origin=origin)
