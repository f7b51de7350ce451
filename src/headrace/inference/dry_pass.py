"""What a pass without weights shows of a model: its layers in the order of calls, its ends, and what its cache keeps.

The model is built without weights and computes two tokens and then one more; large products give zeros at once. Nothing
of this is looked up by the name of a model, so it holds for every model that transformers can build.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from headrace.errors import UnsupportedModelError
from headrace.inference.skeleton import build_without_weights
from headrace.inference.transformers_seam import cache_argument, cache_in, cached_in_layers, chunks_of
from headrace.inference.weight_names import Recipe, recipes_of, require_all
from headrace.model.safetensors_index import TensorEntry
from headrace.model.stored_model import StoredModel
from headrace.model.structure import Kept, Made, Parts

PREFILL_TOKENS = 2
EXPERTS_MIN = 4096
"""elements of a parameter of three dimensions that belongs to experts rather than to a short convolution"""


class _NotTriedError(UnsupportedModelError):
    """The pass without weights failed."""


class SeenCache(NamedTuple):
    """What the cache keeps of one sequence in one layer, in elements of the compute dtype."""

    elements_per_token: int = 0
    state_elements: int = 0
    """whatever the length: recurrent and convolution states"""
    window_tokens: int = 0
    """sliding window; 0: the whole context is kept"""
    heads: tuple[int, int, int, int] = (1, 1, 1, 1)
    """heads and width of the keys, heads and width of the values"""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where a transformers model keeps its parts, as dotted paths of modules, and what of it was seen."""

    layers: str
    embedding: str
    head: str
    tables: tuple[str, ...]
    """other tables with a row for each token"""
    kinds: tuple[int, ...]
    """of each layer: equal for those that are timed alike, the same modules and the same kind of cache; from 0 on"""
    caches: tuple[SeenCache, ...]
    """of each layer"""
    outputs: tuple[int | None, ...]
    """how many values each layer returns, the hidden states first; None: the hidden states alone"""
    has_cache_layers: bool
    """the cache is transformers' own, made of layers; some models have another one, or none"""
    chunks: tuple[tuple[int, int], ...]
    """of each layer: tokens of a chunk of linear attention, numbers held for each"""
    made_in: dict[str, str]
    """modules whose weights others read without calling them -> the module around them that is called"""
    unused: tuple[str, ...]
    """modules that have no turn in a pass of text: those of images and sounds, whose weights are never read"""

    @property
    def first_of_kinds(self) -> tuple[int, ...]:
        """Number of the first layer of each kind."""
        return tuple(self.kinds.index(kind) for kind in range(max(self.kinds) + 1))


def examine(config: Any, stored: StoredModel, entries: Iterable[TensorEntry]) -> tuple[Anatomy, Parts]:
    """Build the model of `config` without weights, watch it compute, and sort a checkpoint's tensors by it.

    Raises UnsupportedModelError, naming the model and the reason, where layers are not called once each in order, share
    weights, or cannot be told from the rest; CheckpointCorruptError where weights are missing.
    """
    try:
        return _examine(config, stored, entries, torch.bfloat16)
    except _NotTriedError:  # some mix numbers of 32 bits into their own
        return _examine(config, stored, entries, torch.float32)


def _examine(
    config: Any, stored: StoredModel, entries: Iterable[TensorEntry], dtype: torch.dtype
) -> tuple[Anatomy, Parts]:
    model, name = build_without_weights(config, dtype), stored.name
    paths = {id(module): path for path, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or id(embedding) not in paths or not _looks_up_rows(embedding):
        raise UnsupportedModelError(f"the embedding of {name} is no table of rows, which headrace cannot stream yet")
    watched = _watch(model, name)
    layers_path, layers = _layers_of(model, set(watched.order), name)
    if len(layers) != stored.num_layers:
        raise UnsupportedModelError(
            f"{name} has {len(layers)} layers where config.json promises {stored.num_layers}, in {layers_path}"
        )
    numbers = {id(layer): number for number, layer in enumerate(layers)}
    if [numbers[own] for own in watched.order if own in numbers] != 2 * list(range(len(layers))):
        raise UnsupportedModelError(f"{name} does not call its layers once each, in order, and so they cannot stream")
    _refuse_shared_weights(layers, name)
    caches = _differences(watched.cache, watched.sizes_before, len(layers), model.dtype.itemsize)
    looks = [_looks_of(layer, cache) for layer, cache in zip(layers, caches, strict=True)]
    kinds = {look: kind for kind, look in enumerate(dict.fromkeys(looks))}
    anatomy = Anatomy(
        layers=layers_path,
        embedding=paths[id(embedding)],
        head=_head_of(model, layers_path, name),
        tables=tuple(
            path
            for path, module in model.named_modules()
            if isinstance(module, nn.Embedding)
            and module is not embedding
            and not path.startswith(layers_path + ".")
            and module.num_embeddings >= embedding.num_embeddings
            and _looks_up_rows(module)
        ),
        kinds=tuple(kinds[look] for look in looks),
        caches=tuple(caches),
        outputs=tuple(watched.outputs[id(layer)] for layer in layers),
        has_cache_layers=cached_in_layers(watched.cache),
        made_in=_made_in(layers, layers_path, watched.in_both),
        unused=tuple(_unused(model, set(watched.order))),
        chunks=tuple(max(map(chunks_of, layer.modules())) for layer in layers),
    )
    return anatomy, _parts(model, anatomy, recipes_of(model, entries), name)


def _looks_of(layer: nn.Module, cache: SeenCache) -> tuple[Any, ...]:
    """Equal for layers that take equally long, size for size."""
    modules = tuple(type(module).__name__ for module in layer.modules())
    return (modules, cache.window_tokens, bool(cache.elements_per_token), bool(cache.state_elements))


def _unused(model: nn.Module, called: set[int], path: str = "") -> Iterator[str]:
    """The outermost modules with parts of their own of which nothing has its turn for text, as what sees images."""
    for name, module in model.named_children():
        own = f"{path}.{name}".lstrip(".")
        if not any(id(inner) in called for inner in module.modules()):
            if any(True for _ in module.children()) and any(True for _ in module.parameters()):
                yield own
        elif not isinstance(module, nn.ModuleList):
            yield from _unused(module, called, own)


def _parts(model: Any, anatomy: Anatomy, recipes: dict[str, Recipe], name: str) -> Parts:
    """Sort the checkpoint's tensors by the parameters that they become."""
    apart = tuple(f"{path}." for path in anatomy.unused)
    parameters = {
        own: parameter for own, parameter in model.named_parameters(remove_duplicate=False) if not own.startswith(apart)
    }
    require_all(recipes, parameters)
    ends = {path: f"{path}.weight" for path in (anatomy.embedding, anatomy.head, *anatomy.tables)}
    for path in ends.values():
        if not recipes[path].is_one_tensor:
            raise UnsupportedModelError(f"{path} of {name} is put together from several tensors, and so cannot stream")
    entries = {path: recipes[weight].ingredients[0].entry for path, weight in ends.items()}
    embedding, head = entries[anatomy.embedding], entries[anatomy.head]
    layers: list[dict[str, TensorEntry]] = [{} for _ in anatomy.kinds]
    made: list[list[Made]] = [[] for _ in anatomy.kinds]
    fixed: dict[str, TensorEntry] = {}
    for parameter, recipe in recipes.items():
        if parameter in ends.values() or parameter.startswith(apart):
            continue
        number, _, inner = parameter.removeprefix(anatomy.layers + ".").partition(".")
        own = {ingredient.entry.name: ingredient.entry for ingredient in recipe.ingredients}
        if not parameter.startswith(anatomy.layers + ".") or parameter not in parameters:  # buffers stay
            fixed |= own
            continue
        layers[int(number)] |= own
        module = f"{anatomy.layers}.{number}.{inner}".rpartition(".")[0]
        made[int(number)].append(
            Made(
                module=anatomy.made_in.get(module, module).removeprefix(f"{anatomy.layers}.{number}").lstrip("."),
                elements=math.prod(recipe.shape),
                stored=recipe.ingredients[0].entry.dtype,
                as_stored=recipe.is_one_tensor,
                by_library=recipe.converted is not None,
                in_float32=recipe.dtype is torch.float32 and model.dtype is not torch.float32,
            )
        )
    owners: dict[str, int] = {}
    for owner, tensors in enumerate(layers):
        for tensor in tensors:
            if owners.setdefault(tensor, owner) != owner:
                raise UnsupportedModelError(f"{tensor} of {name} belongs to several layers, and so cannot stream")
    return Parts(
        layers=anatomy.layers,
        layer_tensors=tuple(tuple(tensors.values()) for tensors in layers),
        embedding=embedding,
        head=None if head is embedding else head,
        tables=tuple(entries[path] for path in anatomy.tables),
        fixed=tuple(fixed.values()),
        made=tuple(tuple(items) for items in made),
        kept=tuple(
            Kept(cache.elements_per_token, cache.state_elements, cache.window_tokens, kind, *chunks)
            for cache, kind, chunks in zip(anatomy.caches, anatomy.kinds, anatomy.chunks, strict=True)
        ),
    )


def _made_in(layers: nn.ModuleList, layers_path: str, called: set[int]) -> dict[str, str]:
    """Where the weights of modules are made that are read without being called: a convolution's by what is around it.

    Of modules in one list that are alike, as experts are, some need not have their turn.
    """
    found = {}
    for number, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        for path, module in modules.items():
            if id(module) in called or not list(module.parameters(recurse=False)):
                continue
            if any(id(other) in called for other in _alike(path, modules)):
                continue
            outer = path
            while outer and id(modules[outer]) not in called:
                outer = outer.rpartition(".")[0]
            own = f"{layers_path}.{number}"
            found[f"{own}.{path}".rstrip(".")] = f"{own}.{outer}".rstrip(".")
    return found


def _alike(path: str, modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """The modules that stand in the same place within other members of the list that `path` leads through."""
    words = path.split(".")
    for place, word in enumerate(words):
        if word.isdecimal():
            for number in range(len(list(modules[".".join(words[:place])].children()))):
                other = modules.get(".".join([*words[:place], str(number), *words[place + 1 :]]))
                if other is not None:
                    yield other


def _layers_of(model: nn.Module, called: set[int], name: str) -> tuple[str, nn.ModuleList]:
    """The list that holds most parameters, of those that have their turn and lie in no other."""
    found: list[tuple[int, str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and any(id(layer) in called for layer in module)
            and not any(path.startswith(outer + ".") for _, outer, _ in found)
        ):
            found.append((sum(parameter.numel() for parameter in module.parameters()), path, module))
    if not found:
        raise UnsupportedModelError(f"{name} has no list of layers that could stream")
    _, path, layers = max(found, key=lambda item: item[0])
    return path, layers


def _looks_up_rows(table: nn.Embedding) -> bool:
    """Whether the module needs no rows but those of the ids that it is given; tried with numbers."""
    weight: Any = table.weight
    padding = table.padding_idx
    numbers = torch.arange(1.0, table.num_embeddings + 1).to(weight.dtype).unsqueeze(1).expand(weight.shape)
    table.padding_idx = None
    try:
        with torch.inference_mode():
            outputs = []
            for rows, ids in ((numbers, [3, 1]), (numbers[[1, 3]], [1, 0])):
                table.register_parameter("weight", nn.Parameter(rows, requires_grad=False))
                outputs.append(table(torch.tensor([ids])))
        return torch.equal(*outputs)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    finally:
        table.register_parameter("weight", weight)
        table.padding_idx = padding


def _refuse_shared_weights(layers: nn.ModuleList, name: str) -> None:
    owners: dict[int, int] = {}
    for number, layer in enumerate(layers):
        for parameter in layer.parameters():
            if owners.setdefault(id(parameter), number) != number:
                raise UnsupportedModelError(
                    f"layers {owners[id(parameter)]} and {number} of {name} share weights, which headrace cannot stream"
                )


def _head_of(model: Any, layers_path: str, name: str) -> str:
    """The matrix that makes the logits: what the model names, or the only one of that size outside of the layers."""
    vocabulary = model.get_input_embeddings().num_embeddings
    named = model.get_output_embeddings()
    outside: list[tuple[str, nn.Linear]] = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not path.startswith(layers_path + ".")
    ]
    for path, module in outside:
        if module is named:
            return path
    large = [path for path, module in outside if module.out_features == vocabulary]
    if named is None and len(large) == 1:
        return large[0]
    raise UnsupportedModelError(f"the head of {name} is no single matrix, which headrace cannot stream yet")


# -- the pass -----------------------------------------------------------------------------------------------------


class _Watched(NamedTuple):
    """What two passes showed, modules by their ids."""

    order: list[int]
    """every module that had its turn, in order of its end"""
    in_both: set[int]
    """those that had one in either pass"""
    outputs: dict[int, int | None]
    cache: Any
    sizes_before: list[dict[str, int]]
    """of the cache after the first pass"""


def _watch(model: Any, name: str) -> _Watched:
    order: list[int] = []
    outputs: dict[int, int | None] = {}
    called: list[set[int]] = [set()]

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        called[-1].add(id(module))
        order.append(id(module))
        outputs[id(module)] = len(output) if isinstance(output, tuple) else None

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with torch.inference_mode(), _without_weights(model):
            first = model(input_ids=torch.zeros(1, PREFILL_TOKENS, dtype=torch.long), use_cache=True)
            cache = cache_in(first)
            before = _sizes(cache)
            called.append(set())  # one token more, to see what grows, and what else is read for a single token
            given = {} if cache is None else {cache_argument(model): cache}
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True, **given)
    except Exception as error:
        raise _NotTriedError(
            f"{name} could not be tried without its weights: {type(error).__name__}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return _Watched(order, set.intersection(*called), outputs, cache, before)


def _sizes(cache: Any) -> list[dict[str, int]]:
    """Bytes of each layer's tensors by attribute; a cache without layers counts as one."""
    return [_bytes_by_name(layer) for layer in getattr(cache, "layers", [cache])]


def _bytes_by_name(owner: Any) -> dict[str, int]:
    found: dict[str, int] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = found.get(name, 0) + value.numel() * value.element_size()
        elif isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}", inner)
        elif isinstance(value, (list, tuple)):
            for key, inner in enumerate(value):
                add(f"{name}.{key}", inner)

    for name, value in vars(owner).items() if owner is not None else ():
        add(name, value)
    return found


def _differences(cache: Any, before: list[dict[str, int]], count: int, element_bytes: int) -> list[SeenCache]:
    """What grew with the third token, and what did not; a cache of other layers than the model's is spread over all."""
    found = []
    own_layers = getattr(cache, "layers", [cache])
    for layer, old, new in zip(own_layers, before, _sizes(cache), strict=True):
        grown = {name: new[name] - old.get(name, 0) for name in new}
        per_token = sum(grown.values())
        fixed = sum(size for name, size in new.items() if not grown[name])
        window = int(getattr(layer, "sliding_window", 0) or 0) if getattr(layer, "is_sliding", False) else 0
        found.append(SeenCache(-(-per_token // element_bytes), -(-fixed // element_bytes), window, _heads_of(layer)))
    if len(found) == count:
        return found
    return [
        SeenCache(
            -(-sum(item.elements_per_token for item in found) // count),
            -(-sum(item.state_elements for item in found) // count),
        )
    ] * count


def _heads_of(layer: Any) -> tuple[int, int, int, int]:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor) or keys.dim() != 4:
        return SeenCache().heads
    return (keys.shape[1], keys.shape[3], values.shape[1], values.shape[3])


@contextlib.contextmanager
def _without_weights(model: nn.Module) -> Iterator[None]:
    """Let what multiplies with a matrix give zeros, and let experts hand on their input.

    So the pass costs next to nothing however large the model is, and all that is no product is the model's own.
    """
    replaced = [(module, forward) for module in model.modules() if (forward := _forward_of(module)) is not None]
    for module, forward in replaced:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in replaced:
            del module.forward


def _forward_of(module: nn.Module) -> Callable[..., Any] | None:
    """What takes the place of a module's own forward; None where that is cheap."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return lambda hidden, *_, **__: hidden.new_zeros((*hidden.shape[:-1], module.out_features))
    if type(module).__name__ == "Conv1D" and isinstance(weight, nn.Parameter):  # GPT-2's, whose matrix is transposed
        return lambda hidden, *_, **__: hidden.new_zeros((*hidden.shape[:-1], weight.shape[1]))
    if any(parameter.dim() >= 3 and parameter.numel() > EXPERTS_MIN for parameter in module.parameters(recurse=False)):
        if isinstance(weight, nn.Parameter):  # experts one matrix at a time: (experts, outputs, inputs)
            return lambda hidden, *_, **__: hidden.new_zeros((*hidden.shape[:-1], weight.shape[1]))
        return lambda hidden, *_, **__: hidden
    return None
