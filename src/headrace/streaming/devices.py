"""From the name of a device, as users write it, to the device: `auto`, `cpu`, `cuda`, `cuda:1`."""

from __future__ import annotations

import os
import re

from headrace.errors import InvalidRequestError
from headrace.streaming.device import CpuDevice, Device

VARIABLE = "HEADRACE_DEVICE"
"""Environment variable that stands for `auto`'s choice."""


def open_device(name: str | Device = "auto") -> Device:
    """Open the device; `auto` is what HEADRACE_DEVICE names, else the first GPU, else the CPU.

    Raises InvalidRequestError where the name is unknown or the device is not there.
    """
    if not isinstance(name, str):
        return name
    if name == "auto":
        name = os.environ.get(VARIABLE) or _best()
    if name == "cpu":
        return CpuDevice()
    matched = re.fullmatch(r"cuda(?::(\d+))?", name)
    if matched is None:
        raise InvalidRequestError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:N")
    from headrace.streaming.cuda_device import open_cuda  # torch.cuda is not touched where it is not asked for

    return open_cuda(None if matched[1] is None else int(matched[1]))


def _best() -> str:
    from headrace.streaming.cuda_device import list_gpus

    return "cuda" if list_gpus() else "cpu"


def maker_name(device: Device) -> str:
    """What the maker calls a device, where the driver tells; elsewhere what users write."""
    from headrace.streaming.cuda_device import list_gpus

    names = {f"cuda:{gpu.number}": gpu.name for gpu in list_gpus()}
    return names.get(device.name, device.name)
