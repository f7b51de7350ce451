"""The device of a run as its report names it."""

from __future__ import annotations

import re
import subprocess
from typing import NamedTuple

import torch

from headrace.streaming.cuda_device import list_gpus
from headrace.streaming.device import Device


class DescribedGpu(NamedTuple):
    """Names, versions, bytes."""

    name: str
    driver: str
    cuda: str
    memory_bytes: int
    link: str
    """PCIe generation and lanes, as the driver says"""

    @property
    def slug(self) -> str:
        """For the names of files."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def describe(device: Device) -> DescribedGpu:
    """Ask torch and the driver; what cannot be learned is `unknown`."""
    memory = device.memory()
    assert memory is not None
    if device.torch_device.type != "cuda":
        return DescribedGpu("fake", "none", "none", memory.total_bytes, "none")
    index = device.torch_device.index or 0
    gpu = list_gpus()[index]
    driver = _ask("driver_version", index)
    link = f"PCIe {_ask('pcie.link.gen.max', index)} x{_ask('pcie.link.width.max', index)}"
    return DescribedGpu(gpu.name, driver, str(torch.version.cuda), gpu.memory_bytes, link)


def _ask(what: str, index: int) -> str:
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", f"--id={index}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer or "unknown"
