"""torch's dtypes by the names that plans and checkpoints use, and back."""

from __future__ import annotations

import torch

from headrace.dtypes import DTYPES, STORED_DTYPES, Dtype

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
STORED_TORCH_DTYPES: dict[str, torch.dtype] = {
    stored_name: TORCH_DTYPES[dtype.name] for stored_name, dtype in STORED_DTYPES.items()
}


def described(dtype: torch.dtype) -> Dtype:
    """The names and the size of one of them."""
    return DTYPES[str(dtype).removeprefix("torch.")]
