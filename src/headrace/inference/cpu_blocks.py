"""Decoder layers that the CPU computes, in the middle of a model that an accelerator computes.

Their weights lie in host memory and never travel; the hidden states do, down and up again, some kilobytes a token.
Their keys and values stay on the host, where the cache finds them made. While the CPU is at work the link brings
the next blocks, so that the two bandwidths add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from headrace.inference.skeleton import HOST, move_buffers


class HostInputs:
    """What layers are given beside the hidden states (masks, positions), brought down once in a pass, not per layer."""

    def __init__(self) -> None:
        self._brought: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def bring(self, value: Any) -> Any:
        """The same on the host: tensors, and what is in tuples, lists and dictionaries."""
        if isinstance(value, torch.Tensor):
            if value.device == HOST:
                return value
            found = self._brought.get(id(value))
            if found is None:
                found = self._brought[id(value)] = (value, value.to(HOST))  # keeps the original, and so its id, alive
            return found[1]
        if isinstance(value, tuple | list):
            return type(value)(self.bring(item) for item in value)
        if isinstance(value, dict):
            return {key: self.bring(item) for key, item in value.items()}
        return value

    def forget(self) -> None:
        """A pass has ended."""
        self._brought.clear()


def compute_on_host(layer: nn.Module, inputs: HostInputs, device: torch.device) -> None:
    """Let a layer take its inputs down to the host and send its output up to the device again."""
    move_buffers(layer, HOST)

    def down(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = tuple(value.to(HOST) if isinstance(value, torch.Tensor) else value for value in args)
        return hidden, {
            key: value.to(HOST) if key == "hidden_states" else inputs.bring(value) for key, value in kwargs.items()
        }

    def up(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return output.to(device)
        return type(output)(value.to(device) if isinstance(value, torch.Tensor) else value for value in output)

    layer.register_forward_pre_hook(down, prepend=True, with_kwargs=True)
    layer.register_forward_hook(up)
