"""Whether sequences of a model can share passes without padding: tried on the model's own class, without its weights.

The model is built with made-up weights that take no memory and multiply in no time. What is left is all that could tell
sequences apart, or mix them up: positions, masks, caches, the attention call. A few tokens in two sequences, in chunks,
must give what each sequence gives alone.
"""

from __future__ import annotations

import copy
import inspect
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from headrace.errors import UnsupportedModelError
from headrace.inference.batching.ragged_pass import RaggedRunner
from headrace.inference.skeleton import build_skeleton
from headrace.inference.transformers_seam import GenerationPasses, length_switch
from headrace.planning.jobs.forecast import Filling
from headrace.planning.jobs.packing import Turn

LAYERS_TRIED = 12
LENGTHS = (7, 5)
CUTS = ((0, 3, 6, 7), (0, 2, 4, 5))
"""where the passes end that compute the sequences"""
TOLERANCE = 1e-4


def why_not_packed(config: Any) -> str | None:
    """Why sequences of the model of this transformers config cannot share passes; None: they can."""
    model = _with_made_up_weights(config)
    try:
        with torch.inference_mode(), _MadeUpWeights():
            alone = [_alone(model, number) for number in range(len(LENGTHS))]
            together = _together(model)
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:  # a model's code may fail in any way on a cache or a mask that is not its own
        return f"they fail in a pass of several sequences ({type(error).__name__}: {error})"
    if not all(_alike(mine, theirs) for mine, theirs in zip(together, alone, strict=True)):
        return "what they compute for a sequence depends on the others of its pass"
    return None


def continues_prompts(config: Any) -> bool:
    """Whether a prompt may go on token by token after its beginning, and gives what it gives as a whole.

    Not where positions depend on its length, or where its tokens see later ones.
    """
    if length_switch(config) is not None:
        return False
    model = _with_made_up_weights(config)
    tokens, first = torch.tensor([_tokens(0)]), CUTS[0][1]
    try:
        with torch.inference_mode(), _MadeUpWeights():
            passes = GenerationPasses(model, sequences=1, most_tokens=tokens.shape[1])
            chunks = (tokens[:, :first], *(tokens[:, place : place + 1] for place in range(first, tokens.shape[1])))
            logits = torch.cat([passes.run(chunk) for chunk in chunks])
            return _alike(logits[[end - first for end in CUTS[0][1:]]], _alone(model, 0))
    except Exception:  # what cannot be tried is not relied upon
        return False


def padding_changes(config: Any) -> bool:
    """Whether a sequence comes to something else when it is padded to the length of another, as `generate` pads it."""
    model = _with_made_up_weights(config)
    longer, shorter = _tokens(0), _tokens(1)
    padding = len(longer) - len(shorter)
    mask = torch.ones((2, len(longer)), dtype=torch.long)
    mask[0, :padding] = 0
    ids = torch.tensor([[0] * padding + shorter, longer])
    try:
        with torch.inference_mode(), _MadeUpWeights():
            alone = model(input_ids=ids[:1, padding:], **_positions(model, mask[:1, padding:])).logits[0, -1]
            padded = model(input_ids=ids, attention_mask=mask, **_positions(model, mask)).logits[0, -1]
    except Exception:  # what cannot be tried may go wrong
        return True
    return not _alike(padded, alone)


def filling_of(config: Any) -> tuple[Filling, str]:
    """How passes of the model of this config are filled, and why not with tokens laid end to end ("": they are)."""
    reason = why_not_packed(config)
    if reason is None:
        return Filling.RAGGED, ""
    return (Filling.GROUPS if continues_prompts(config) else Filling.EQUAL_PROMPTS), reason


def _alike(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def shortened(config: Any) -> Any:
    """The same model with fewer layers, enough to hold one of each kind."""
    short = copy.deepcopy(config)
    layers = getattr(short, "num_hidden_layers", 0)
    if layers <= LAYERS_TRIED:
        return short
    for name, value in list(vars(short).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(short, name, value[:LAYERS_TRIED])
    short.num_hidden_layers = LAYERS_TRIED
    return short


def _with_made_up_weights(config: Any) -> Any:
    model = build_skeleton(shortened(config), torch.float32)
    model.headrace = SimpleNamespace(passes=[], admit=_let_in, lay_out_cache=_let_in)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data = torch.linspace(0.5, 1.5, parameter.numel()).reshape(parameter.shape)
        else:
            parameter.data = torch.full((), 0.1).expand(parameter.shape)
    return model


def _let_in(*_args: Any, **_sizes: Any) -> None:
    """In place of what looks after memory: a few tokens need none."""


def _tokens(number: int) -> list[int]:
    return [3 + (7 * number + 5 * place) % 31 for place in range(LENGTHS[number])]


def _positions(model: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The positions that `generate` gives a model that takes some."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def _alone(model: Any, number: int) -> torch.Tensor:
    """Logits of the last token of each chunk, from one pass over the whole sequence."""
    ids = torch.tensor([_tokens(number)])
    logits = model(input_ids=ids, **_positions(model, torch.ones_like(ids))).logits
    return logits[0, [end - 1 for end in CUTS[number][1:]]]  # type: ignore[no-any-return]


def _together(model: Any) -> list[torch.Tensor]:
    runner = RaggedRunner(model, positions=sum(LENGTHS))
    rows: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    starts = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
    for step in range(len(CUTS[0]) - 1):
        spans = [(cuts[step], cuts[step + 1]) for cuts in CUTS]
        turns = [
            Turn(number, first, end - first, starts[number], samples=True, whole=end)
            for number, (first, end) in enumerate(spans)
        ]
        logits = runner.run([], turns, [_tokens(number)[first:end] for number, (first, end) in enumerate(spans)])
        for own, row in zip(rows, logits, strict=True):
            own.append(row)
    return [torch.stack(own) for own in rows]


class _MadeUpWeights(TorchFunctionMode):
    """Products with placeholders of weights pick numbers of their other factor, others for each weight.

    So every row of a product follows from its own row alone, as it does with weights.
    """

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer products, look-ups and indexing of placeholders; let everything else be what it is."""
        kwargs = kwargs or {}
        if function is functional.linear and _is_placeholder(args[1]):
            return _picked(args[0], args[1], args[1].shape[-2])
        if function is torch.addmm and _is_placeholder(args[2]):
            return _picked(args[1], args[2], args[2].shape[-1])
        if getattr(function, "__name__", "") in _PRODUCTS and _is_placeholder(args[1]):
            return _picked(args[0], args[1], args[1].shape[-1])
        if function is functional.embedding:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if _is_placeholder(weight):
                return torch.sin((args[0].unsqueeze(-1) + 1.0) * torch.linspace(0.3, 2.9, weight.shape[-1]))
        if function is torch.Tensor.__getitem__ and _is_placeholder(args[0]):
            shape = torch.empty(args[0].shape, device="meta")[_on_meta(args[1])].shape
            return args[0].as_strided(shape, (0,) * len(shape))
        return function(*args, **kwargs)


_PRODUCTS = frozenset({"matmul", "__matmul__", "mm", "bmm", "grouped_mm", "_grouped_mm"})


def _is_placeholder(weight: object) -> bool:
    return isinstance(weight, torch.Tensor) and weight.numel() > 1 and not any(weight.stride())


def _picked(rows: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    return rows[..., _places(rows.shape[-1], weight.untyped_storage().data_ptr() % 1009, count)]


@cache
def _places(width: int, seed: int, count: int) -> torch.Tensor:
    return torch.randint(width, (count,), generator=torch.Generator().manual_seed(seed))


def _on_meta(index: Any) -> Any:
    if isinstance(index, torch.Tensor):
        return index if index.dtype is torch.bool else torch.zeros(index.shape, dtype=torch.long, device="meta")
    return tuple(_on_meta(item) for item in index) if isinstance(index, tuple) else index
