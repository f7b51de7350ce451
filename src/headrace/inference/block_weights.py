"""Gives one module tree its weights for the time of its turn, from memory where their stored bytes lie.

Weights that are stored as they are computed with are used where they landed. Others (a wider compute dtype, experts
that the model holds in one tensor, addresses that this processor's products are not exact at) are copied into one
shared buffer, module by module, just before the module computes: so the buffer is as large as the largest module,
not as a block, and what was just widened is still in the CPU's cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from headrace.errors import CheckpointCorruptError
from headrace.inference.skeleton import HOST, placeholder
from headrace.inference.weight_names import Recipe
from headrace.model.layout import HOST_ALIGNMENT_BYTES
from headrace.streaming.arena import Piece
from headrace.streaming.checkpoint import Checkpoint, view
from headrace.streaming.torch_dtypes import STORED_TORCH_DTYPES


class ConversionBuffer:
    """Scratch memory for weights in the compute dtype, used as a stack: inner modules lie above outer ones."""

    def __init__(self, size_bytes: int, device: torch.device = HOST) -> None:
        self._bytes = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self._bytes = self._bytes[(-self._bytes.data_ptr()) % HOST_ALIGNMENT_BYTES :]
        self.top = 0

    @property
    def free_bytes(self) -> int:
        """Bytes above the present top."""
        return self._bytes.numel() - self.top

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor on top of the stack; give back by restoring `top`."""
        size_bytes = dtype.itemsize
        for length in shape:
            size_bytes *= length
        if size_bytes > self.free_bytes:
            raise MemoryError(f"the conversion buffer has {self.free_bytes} bytes left, {size_bytes} are needed")
        tensor = self._bytes[self.top : self.top + size_bytes].view(dtype).view(shape)
        self.top += -(-size_bytes // HOST_ALIGNMENT_BYTES) * HOST_ALIGNMENT_BYTES
        return tensor


class _Target(NamedTuple):
    """A parameter of a module, what stands there between turns, and how it is made."""

    module: nn.Module
    name: str
    empty: nn.Parameter
    recipe: Recipe

    def put(self, parameter: nn.Parameter) -> None:
        """Let it be the module's parameter.

        It seems to need a gradient, as weights of `from_pretrained` do, since torch chooses its products by that. Where
        gradients are recorded it does not, so that nothing holds on to the memory.
        """
        if parameter.requires_grad is torch.is_grad_enabled() and not parameter.is_inference():
            parameter.requires_grad_(not torch.is_grad_enabled())
        self.module.register_parameter(self.name, parameter)


@dataclass
class BlockWeights:
    """The weights of one block. `enter` before its forward, `leave` after it.

    `positions` maps checkpoint tensor names to offsets in the block's memory.
    """

    block: nn.Module
    path: str
    """of the block in the names of `recipes` and `made_in`, which are the whole model's"""
    recipes: Mapping[str, Recipe]
    """parameter name -> recipe"""
    positions: Mapping[str, int]
    buffer: ConversionBuffer
    copy_misaligned: bool = False
    device: torch.device = HOST
    """where the block computes, and its memory lies"""
    made_in: Mapping[str, str] = field(default_factory=dict)
    """modules whose weights others read -> the module before whose turn they are made"""
    _direct: list[_Target] = field(default_factory=list)
    _converted: dict[nn.Module, list[_Target]] = field(default_factory=dict)
    _views: dict[int, list[nn.Parameter]] = field(default_factory=dict)
    _piece: Piece | None = None
    _fixed_piece: Piece | None = None
    _tops: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for module_name, module in self.block.named_modules():
            own = f"{self.path}.{module_name}" if module_name else self.path
            for name, parameter in list(module.named_parameters(recurse=False)):
                full = f"{own}.{name}"
                if full not in self.recipes:
                    raise CheckpointCorruptError(f"the checkpoint lacks the weights of {full}")
                recipe = self.recipes[full]
                empty = placeholder(tuple(parameter.shape), recipe.dtype, self.device)
                target = _Target(module, name, empty, recipe)
                module.register_parameter(name, target.empty)
                if self._used_in_place(recipe):
                    self._direct.append(target)
                else:
                    turn = self.made_in.get(own, own).removeprefix(self.path).removeprefix(".")
                    self._converted.setdefault(self.block.get_submodule(turn), []).append(target)
        for module in self._converted:
            module.register_forward_pre_hook(self._convert)
            module.register_forward_hook(self._forget, always_call=True)

    def enter(self, piece: Piece, *, stays: bool) -> None:
        """Let the parameters be views into `piece`; with `stays`, for good."""
        self._piece = piece
        if self._fixed_piece is piece:
            return
        views = self._views.get(id(piece))
        if views is None:
            views = [nn.Parameter(self._view(piece, t.recipe), requires_grad=False) for t in self._direct]
            self._views[id(piece)] = views
        for target, parameter in zip(self._direct, views, strict=True):
            target.put(parameter)
        if stays:
            self._fixed_piece = piece

    def leave(self) -> None:
        """Take the weights away again, unless they stay."""
        if self._piece is self._fixed_piece and self._piece is not None:
            return
        self._piece = None
        for target in self._direct:
            target.module.register_parameter(target.name, target.empty)

    def abandon(self) -> None:
        """Leave in the middle: an interrupt ended the forward pass, which torch does not tell hooks of."""
        for module in self._converted:
            self._forget(module, None, None)
        self._tops.clear()
        self.buffer.top = 0
        self.leave()

    def drop_views(self) -> None:
        """Keep no view of any memory: the model was closed."""
        self._views.clear()
        self._piece = self._fixed_piece = None
        for target in self._direct:
            target.module.register_parameter(target.name, target.empty)

    def _used_in_place(self, recipe: Recipe) -> bool:
        if not recipe.is_one_tensor:
            return False
        entry = recipe.ingredients[0].entry
        stored = STORED_TORCH_DTYPES.get(entry.dtype)
        aligned = self.positions[entry.name] % HOST_ALIGNMENT_BYTES == 0
        return stored is recipe.dtype and (aligned or not self.copy_misaligned)

    def _view(self, piece: Piece, recipe: Recipe) -> torch.Tensor:
        entry = recipe.ingredients[0].entry
        return view(piece, self.positions[entry.name], entry)

    def _convert(self, module: nn.Module, _args: Any) -> None:
        """Pre-hook of a module: make weights in the buffer, its own and those that it reads of others."""
        assert self._piece is not None, "a block computes outside its turn"
        self._tops.append(self.buffer.top)
        for target in self._converted[module]:
            made = self.buffer.take(target.recipe.shape, target.recipe.dtype)
            entries = [ingredient.entry for ingredient in target.recipe.ingredients]
            target.recipe.make([view(self._piece, self.positions[entry.name], entry) for entry in entries], made)
            target.put(nn.Parameter(made, requires_grad=False))

    def _forget(self, module: nn.Module, _args: Any, _output: Any) -> None:
        """Post-hook: the buffer is free again."""
        for target in self._converted[module]:
            target.module.register_parameter(target.name, target.empty)
        if self._tops:
            self.buffer.top = self._tops.pop()


def give_fixed(model: nn.Module, checkpoint: Checkpoint, recipes: Mapping[str, Recipe], device: torch.device) -> None:
    """Give a model its small tensors for good: final norm, position table, persistent buffers."""
    values = checkpoint.read_tensors(checkpoint.model.fixed)
    for name, recipe in recipes.items():
        names = [ingredient.entry.name for ingredient in recipe.ingredients]
        if not all(own in values for own in names):
            continue
        as_it_lies = recipe.is_one_tensor and values[names[0]].dtype is recipe.dtype
        place = recipe.ingredients[0].entry.offset % HOST_ALIGNMENT_BYTES if as_it_lies else 0
        made = _empty_at(place, recipe.shape, recipe.dtype)
        recipe.make([values[own] for own in names], made)
        module_name, _, own_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        if own_name in dict(module.named_buffers(recurse=False)):
            module.register_buffer(own_name, made.to(device))
        else:
            module.register_parameter(own_name, nn.Parameter(made.to(device), requires_grad=False))


def _empty_at(place: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised, beginning so many bytes behind a multiple of HOST_ALIGNMENT_BYTES: products may depend on it."""
    size_bytes = dtype.itemsize * math.prod(shape)
    memory = torch.empty(size_bytes + 2 * HOST_ALIGNMENT_BYTES, dtype=torch.uint8)
    start = (-memory.data_ptr()) % HOST_ALIGNMENT_BYTES + place - place % dtype.itemsize
    return memory[start : start + size_bytes].view(dtype).view(shape)
