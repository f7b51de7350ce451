"""What travels as one: a decoder layer, or the head (the output projection), which may be cut into pieces.

The input embedding is no block, since a pass reads only some of its rows.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from headrace.dtypes import DTYPES
from headrace.model.layout import align_device, align_up

HEAD_CHUNK_ROWS = 8192
"""The head is multiplied about this many rows at a time: parts of 1,024 rows were seen to change the last bit of
bfloat16 products, 4,096 never."""

ROW_TILE = 256
"""Matrix libraries choose another kernel, with another order of summing, for a number of rows that is a multiple of
this (seen with MKL 2024.2, float32, 4 to 15 tokens)."""


class RowSlice(NamedTuple):
    """Rows [first, last) of the head's matrix."""

    first: int
    last: int

    def head_name(self, rows: int) -> str:
        """Name of the block that holds these of the head's `rows`."""
        whole = self.last - self.first == rows
        return "head" if whole else f"head, rows {self.first}-{self.last - 1}"


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block: a decoder layer (`layer_index`) or a piece of the head (`head_rows`)."""

    index: int
    name: str
    layer_index: int | None = None
    head_rows: RowSlice | None = None
    size_bytes: int
    """bytes of its weights as stored, nothing else"""
    parameters: int
    active_parameters: float
    """matrix elements that one token is multiplied with (of a mixture of experts: the share that is used)"""
    kv_elements_per_token: int = 0
    state_elements: int = 0
    """kept of a sequence whatever its length: recurrent and convolution states"""
    window_tokens: int = 0
    """sliding window; 0: the whole context is kept"""
    kind: int = 0
    """equal for layers that take equally long, size for size"""
    module_parameters: int = 0
    """elements of a layer's largest module"""
    fused_parameters: int = 0
    """elements of all its experts, which the running model holds as one tensor"""

    @property
    def read_bytes(self) -> int:
        """Bytes of slot, and bytes read: whole pages."""
        return align_up(self.size_bytes)

    @property
    def held_bytes(self) -> int:
        """Bytes of an accelerator's memory that the block takes, and bytes copied to bring it there."""
        return align_device(self.size_bytes)

    def kv_elements(self, tokens: int) -> int:
        """Elements that the cache keeps of a context of `tokens`; a sliding window keeps no more than itself."""
        return self.kv_elements_per_token * min(tokens, self.window_tokens or tokens) + self.state_elements

    def stored_as(self, prevailing: str) -> str:
        """Safetensors dtype of a head's rows, where most weights are in `prevailing`."""
        return prevailing

    def module_bytes(self, compute_dtype: str, *, prevailing: str, copies: bool) -> int:
        """Bytes of the largest module of a layer that is converted, or put together from experts; 0 where none is.

        `copies`: weights are copied even as they are stored, to places that products are exact at.
        """
        dtype = DTYPES[compute_dtype]
        converts = copies or prevailing != dtype.stored_name
        return max(self.fused_parameters, self.module_parameters if converts else 0) * dtype.size_bytes


def product_slices(rows: int, largest_rows: int) -> list[RowSlice]:
    """Cut the rows of a matrix so that each part's product is the whole product's bit for bit.

    About equal parts of at most `largest_rows` and a few. If `rows` is a multiple of ROW_TILE so are all parts, and
    otherwise none is (see there). A number of rows that is no multiple of 8 is not cut: the row left over at the
    libraries' own cut between threads is summed in another order than the others.
    """
    count = -(-rows // largest_rows)
    if count <= 1 or rows % 8:
        return [RowSlice(0, rows)]
    tiles, rest = divmod(rows, ROW_TILE)
    shift = 0 if rest == 0 else 32 if rest == 16 else 16
    edges = [tiles * number // count * ROW_TILE + (shift if number % 2 else 0) for number in range(count)] + [rows]
    return [RowSlice(first, last) for first, last in itertools.pairwise(edges)]


def head_slices(rows: int, head_bytes: int, piece_bytes: int) -> list[RowSlice]:
    """Cut a head into equal pieces of about `piece_bytes`, a layer's size, or of HEAD_CHUNK_ROWS where that is more."""
    wanted = math.ceil(head_bytes / max(1, piece_bytes))
    return product_slices(rows, max(HEAD_CHUNK_ROWS, math.ceil(rows / wanted)))
