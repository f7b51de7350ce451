"""A transformers model without weights: the real class, real buffers, and parameters that are not-a-number scalars.

Between its turns a block has no weights. Its parameters are then one NaN seen in the parameter's shape, which takes
no memory, keeps `model.device`, `model.dtype` and `num_parameters()` right, and shows at once if anything reads it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

from headrace.errors import InvalidRequestError, UnsupportedModelError
from headrace.inference.refused_config import refused_config
from headrace.inference.streamed_model import StreamedModel
from headrace.inference.transformers_seam import causal_class_of, dtype_of_parameters, make_model

HOST = torch.device("cpu")
_DRAWS = frozenset(name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_"))
"""functions, and methods of tensors by the same names, that give parameters their first values"""


def read_transformers_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a checkpoint; raises CheckpointError with its reason where it does not load."""
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # config classes check their fields in many ways
        path = directory / "config.json"
        raise refused_config(path, error, lambda raw: AutoConfig.for_model(**copy.deepcopy(raw))) from error


def build_without_weights(config: Any, dtype: torch.dtype) -> Any:
    """The transformers model of `config`, every parameter one zero seen in its shape."""
    model = _without_weights(_class_of(config), config, dtype=dtype)
    _fill(model, dtype, 0.0, HOST)
    return model.eval()


def _class_of(config: Any) -> Any:
    found = causal_class_of(config)
    if found is None:
        raise UnsupportedModelError(f"transformers has no causal language model for {type(config).__name__}")
    return found


def build_skeleton(
    config: Any, dtype: torch.dtype, *, attention: str | None = None, device: torch.device = HOST
) -> Any:
    """Return the model for causal language modelling in eval mode; every parameter is a placeholder of `dtype`.

    Placeholders and buffers are on `device`; buffers are made on the host, as `from_pretrained` makes them.
    The class is a subclass of the transformers class, with `StreamedModel`'s methods added; nothing is patched.
    """
    original = _class_of(config)
    streamed: Any = type(original.__name__, (StreamedModel, original), {"__module__": original.__module__})
    options = {} if attention is None else {"attn_implementation": attention}
    model = _without_weights(streamed, config, dtype=dtype, **options)
    _fill(model, dtype, torch.nan, device)
    move_buffers(model, device)
    model.requires_grad_(requires_grad=False)
    return model.eval()


def _without_weights(model_class: Any, config: Any, **options: Any) -> Any:
    """Make the model; raises CheckpointError, naming the field of config.json, where its class refuses."""

    def make(config: Any) -> Any:
        with init_empty_weights(include_buffers=False), _NothingIsDrawn():
            return make_model(model_class, config, **options)

    try:
        return make(copy.deepcopy(config))
    except Exception as error:  # model classes look their fields up in many tables
        if options.get("attn_implementation") is not None:
            raise InvalidRequestError(
                f"attention {options['attn_implementation']!r} does not work here: {error}; leave the option out"
            ) from error
        path = Path(config.name_or_path) / "config.json"
        raise refused_config(path, error, lambda raw: make(type(config).from_dict(copy.deepcopy(raw)))) from error


class _NothingIsDrawn(TorchFunctionMode):
    """Leave parameters without memory alone: drawing values for them takes longer than all the rest, and sympy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _fill(model: Any, dtype: torch.dtype, value: float, device: torch.device) -> None:
    """Let every parameter be one number, seen in its shape, in the dtype that `from_pretrained` would give it."""
    dtype_of = dtype_of_parameters(model, dtype)
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = dtype_of(f"{path}.{name}", parameter.dtype)
            module.register_parameter(name, placeholder(tuple(parameter.shape), own, device, value))


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the buffers of a module tree; parameters stay where they are."""
    for inner in module.modules():
        for name, buffer in inner.named_buffers(recurse=False):
            if buffer.device != device:
                inner.register_buffer(name, buffer.to(device), persistent=name not in inner._non_persistent_buffers_set)


def placeholder(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = HOST, value: float = torch.nan
) -> nn.Parameter:
    """One not-a-number, seen in `shape`."""
    return nn.Parameter(torch.full((), value, dtype=dtype, device=device).expand(shape), requires_grad=False)
