"""The two ends of a model, where not every weight is needed: embedding rows, and the head in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from headrace.inference.block_weights import ConversionBuffer
from headrace.inference.skeleton import HOST, placeholder
from headrace.model.blocks import HEAD_CHUNK_ROWS, product_slices
from headrace.model.layout import HOST_ALIGNMENT_BYTES
from headrace.model.stored_model import StoredBlock
from headrace.streaming.arena import Piece
from headrace.streaming.checkpoint import view
from headrace.streaming.stream import Stream

RowSource = Callable[[list[int]], torch.Tensor]
"""Given distinct row numbers, return the rows: shape (rows, hidden), dtype as stored."""

TableSource = Callable[[], torch.Tensor | None]
"""The whole table as stored, where the model computes; None while it is not there."""


class EmbeddingRows:
    """Gives a model's own embedding module just the rows that a pass looks up.

    The module stays what it is (some scale their output): its weight becomes a small table of the distinct rows, and
    the token ids are renumbered to it, so that the result is the same bit for bit.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        dtype: torch.dtype,
        rows: RowSource,
        *,
        table: TableSource | None = None,
        device: torch.device = HOST,
    ) -> None:
        self._embedding = embedding
        self._dtype = dtype
        self._rows = rows
        self._table = table
        self._device = device
        self._num_rows = embedding.num_embeddings
        self._empty = placeholder((embedding.num_embeddings, embedding.embedding_dim), dtype, device)
        embedding.register_parameter("weight", self._empty)
        embedding.padding_idx = None  # matters for gradients only, and may lie outside the small table
        embedding.register_forward_pre_hook(self._enter)
        embedding.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        table = None if self._table is None else self._table()
        if table is not None:
            return self._look_up(module, args[0], table)
        distinct, renumbered = torch.unique(args[0].to(HOST), return_inverse=True)
        wanted = distinct.tolist()
        if wanted and not (wanted[0] >= 0 and wanted[-1] < self._num_rows):
            raise IndexError(f"token ids must lie between 0 and {self._num_rows - 1}, not {wanted[0]} to {wanted[-1]}")
        table = self._rows(wanted).to(self._dtype).to(self._device)
        module.register_parameter("weight", nn.Parameter(table, requires_grad=False))
        return (renumbered.to(self._device),)

    def _look_up(self, module: nn.Module, ids: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor]:
        """Take the rows on the device itself, so that the host need not know the ids, for which it would have to wait.

        Ids beyond the table are the device's to complain about.
        """
        if table.dtype is self._dtype:
            module.register_parameter("weight", nn.Parameter(table, requires_grad=False))
            return (ids,)
        rows = functional.embedding(ids.flatten(), table).to(self._dtype)
        module.register_parameter("weight", nn.Parameter(rows, requires_grad=False))
        return (torch.arange(ids.numel(), device=ids.device).view(ids.shape),)

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        module.register_parameter("weight", self._empty)


class StreamedHead(nn.Module):
    """The output projection, computed piece by piece as its rows come past.

    Input (..., hidden), output (..., vocabulary). About HEAD_CHUNK_ROWS rows are multiplied at once, which bounds the
    memory of conversion and of the libraries; `product_slices` sees to it that each part's product is the whole
    product's bit for bit. That is known of the CPU's libraries only: with `whole` a block is one product.
    """

    def __init__(
        self,
        blocks: Sequence[StoredBlock],
        stream: Stream,
        dtype: torch.dtype,
        buffer: ConversionBuffer,
        *,
        copy_misaligned: bool,
        bias: torch.Tensor | None = None,
        whole: bool = False,
        device: torch.device = HOST,
    ) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._whole = whole
        self._blocks = tuple(blocks)
        self._stream = stream
        self._buffer = buffer
        self._dtype = dtype
        self._copy_misaligned = copy_misaligned
        rows, columns = blocks[0].tensors[0].shape
        self.in_features, self.out_features = columns, rows
        self.weight = placeholder((rows, columns), dtype, device)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of `hidden`."""
        if len(self._blocks) == 1:
            return self._in_turn(self._blocks[0], hidden)
        logits = hidden.new_empty((*hidden.shape[:-1], self.out_features))
        for block in self._blocks:
            assert block.head_rows is not None
            logits[..., block.head_rows.first : block.head_rows.last] = self._in_turn(block, hidden)
        return logits

    def _in_turn(self, block: StoredBlock, hidden: torch.Tensor) -> torch.Tensor:
        piece = self._stream.wait(block.index)
        try:
            return self._product(block, piece, hidden)
        finally:
            self._stream.release(block.index)

    def _product(self, block: StoredBlock, piece: Piece, hidden: torch.Tensor) -> torch.Tensor:
        assert block.head_rows is not None
        weights = head_rows(block, piece, aligned=self._whole)
        bias = None if self.bias is None else self.bias[block.head_rows.first : block.head_rows.last]
        slices = product_slices(weights.shape[0], HEAD_CHUNK_ROWS)
        if self._whole or len(slices) == 1:
            return self._multiplied(weights, bias, hidden)
        logits = hidden.new_empty((*hidden.shape[:-1], weights.shape[0]))
        for first, last in slices:
            part = None if bias is None else bias[first:last]
            logits[..., first:last] = self._multiplied(weights[first:last], part, hidden)
        return logits

    def _multiplied(self, weights: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
        """The product with some rows, used where they lie or from the conversion buffer."""
        in_place = weights.dtype is self._dtype and not (
            self._copy_misaligned and weights.data_ptr() % HOST_ALIGNMENT_BYTES
        )
        if in_place:
            return _linear(hidden, weights, bias)
        top = self._buffer.top
        try:
            made = self._buffer.take(tuple(weights.shape), self._dtype)
            return _linear(hidden, made.copy_(weights), bias)
        finally:
            self._buffer.top = top


def _linear(hidden: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`functional.linear` on the hidden states as one matrix, as torch does it for weights that may need a gradient.

    Without that the last position of every sequence, cut out of a prefill's result, is no matrix to torch: it then
    multiplies sequence by sequence, and copies 16-bit weights once per sequence (32 sequences: 50 times as slow).
    """
    return functional.linear(hidden.reshape(-1, hidden.shape[-1]), weights, bias).view(*hidden.shape[:-1], -1)


def head_rows(block: StoredBlock, piece: Piece, *, aligned: bool = False) -> torch.Tensor:
    """The rows of the head's matrix that a head block carries, as stored; `aligned`: as an accelerator holds it."""
    assert block.head_rows is not None
    entry = block.tensors[0]
    positions = block.aligned.positions if aligned else block.layout.positions
    return view(piece, positions[entry.name], entry, rows=(block.head_rows.first, block.head_rows.last))
