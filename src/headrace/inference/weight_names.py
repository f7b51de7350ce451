"""Which checkpoint tensors make which model parameter.

Names in a checkpoint are not always the model's: prefixes differ, and a mixture of experts is stored expert by expert
while the model holds all experts in one tensor. The transformers library knows these rules; this file asks it and
turns the answer into recipes: stacking and concatenating copy bytes to places, everything else is done by the library's
own operation on the tensors as they are stored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from headrace.errors import CheckpointCorruptError, UnsupportedModelError
from headrace.inference.transformers_seam import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
    ties_of,
)
from headrace.model.safetensors_index import TensorEntry


class Ingredient(NamedTuple):
    """A checkpoint tensor and the place in the parameter that it fills."""

    entry: TensorEntry
    place: tuple[Any, ...] = ()
    """index expression into the parameter; empty: all of it"""


class Recipe(NamedTuple):
    """How one parameter, or one buffer, is made."""

    parameter: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """that the model computes with"""
    ingredients: tuple[Ingredient, ...]
    converted: Callable[[list[torch.Tensor]], torch.Tensor] | None = None
    """makes the parameter of the stored tensors, in the order of the ingredients; None: each is copied to its place"""

    @property
    def is_one_tensor(self) -> bool:
        """The parameter is a checkpoint tensor as it stands."""
        return self.converted is None and len(self.ingredients) == 1 and not self.ingredients[0].place

    def make(self, stored: Sequence[torch.Tensor], into: torch.Tensor) -> None:
        """Write the parameter's values into `into`, from the ingredients' tensors as stored."""
        if self.converted is not None:
            into.copy_(self.converted([tensor.to(self.dtype) for tensor in stored]))
            return
        for ingredient, tensor in zip(self.ingredients, stored, strict=True):
            (into[ingredient.place] if ingredient.place else into).copy_(tensor)


def recipes_of(model: Any, entries: Iterable[TensorEntry]) -> dict[str, Recipe]:
    """Return name -> recipe for every parameter and buffer of `model` that a checkpoint tensor belongs to.

    Tensors that the model has no place for are left out, as the transformers library does. Raises
    CheckpointCorruptError where shapes do not agree and UnsupportedModelError for a conversion that fails.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = dict(model.state_dict(keep_vars=True))
    collected: dict[str, list[tuple[str | None, TensorEntry]]] = {}
    for entry in sorted(entries, key=lambda item: dot_natural_key(item.name)):
        name, pattern = rename_source_key(entry.name, renamings, converters, model.base_model_prefix, state)
        if name not in state and entry.name in state:
            name, pattern = rename_source_key(entry.name, [], [], model.base_model_prefix, state)
        if name in state:
            collected.setdefault(name, []).append((pattern, entry))
    recipes: dict[str, Recipe] = {}
    for name, parts in collected.items():
        pattern = parts[0][0]
        if pattern is None:
            made = [_as_stored(name, state[name], parts[-1][1])]
        else:
            made = _converted(model, name, by_pattern[pattern], parts, state)
        recipes |= {recipe.parameter: recipe for recipe in made}
    for name, source in ties_of(model).items():
        if name not in recipes and source in recipes:
            recipes[name] = recipes[source]._replace(parameter=name)
        elif source not in recipes and name in recipes:
            recipes[source] = recipes[name]._replace(parameter=source)
    return recipes


def _as_stored(name: str, parameter: torch.Tensor, entry: TensorEntry) -> Recipe:
    if entry.shape != tuple(parameter.shape):
        raise CheckpointCorruptError(
            f"{name} has shape {list(parameter.shape)} by config.json and {list(entry.shape)} in the checkpoint"
        )
    return Recipe(name, tuple(parameter.shape), parameter.dtype, (Ingredient(entry),))


def _converted(
    model: Any, name: str, rule: Any, parts: list[tuple[str | None, TensorEntry]], state: Mapping[str, torch.Tensor]
) -> list[Recipe]:
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in rule.operations]
    if operations in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        shape = tuple(state[name].shape)
        recipe = Recipe(name, shape, state[name].dtype, _fused(rule, parts))
        _check_fused(recipe)
        return [recipe]
    return _by_library(model, name, rule, parts, state)


def _by_library(
    model: Any, name: str, rule: Any, parts: list[tuple[str | None, TensorEntry]], state: Mapping[str, torch.Tensor]
) -> list[Recipe]:
    """Recipes of what the library's own operations make of these tensors, tried without values."""

    def convert(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        own = copy.deepcopy(rule)
        for (pattern, entry), tensor in zip(parts, tensors, strict=True):
            own.add_tensor(name, entry.name, pattern, tensor)
        made: dict[str, Any] = own.convert(name, model=model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    try:
        tried = convert([torch.empty(entry.shape, device="meta") for _, entry in parts])
    except Exception as error:
        kinds = ", ".join(type(operation).__name__ for operation in rule.operations)
        raise UnsupportedModelError(
            f"{name} is made from the checkpoint by {kinds}, which fails for the tensors that are there: {error}"
        ) from error
    recipes = []
    for target, shape in ((key, tuple(value.shape)) for key, value in tried.items()):
        if target not in state:
            continue
        if shape != tuple(state[target].shape):
            raise CheckpointCorruptError(
                f"{target} has shape {list(state[target].shape)} by config.json and {list(shape)} in the checkpoint"
            )

        def one(tensors: list[torch.Tensor], target: str = target) -> torch.Tensor:
            return convert(tensors)[target]

        ingredients = tuple(Ingredient(entry) for _, entry in parts)
        recipes.append(Recipe(target, shape, state[target].dtype, ingredients, one))
    return recipes


def _fused(rule: Any, parts: list[tuple[str | None, TensorEntry]]) -> tuple[Ingredient, ...]:
    """Places of the parts of a parameter that is stacked along dim 0 and then concatenated along dim 1."""
    ingredients = []
    offset = 0
    for pattern in rule.source_patterns:
        stacked = [entry for own, entry in parts if own == pattern]
        for number, entry in enumerate(stacked):
            ingredients.append(Ingredient(entry, (number, slice(offset, offset + entry.shape[0]))))
        offset += stacked[0].shape[0] if stacked else 0
    return tuple(ingredients)


def _check_fused(recipe: Recipe) -> None:
    numbers = {ingredient.place[0] for ingredient in recipe.ingredients}
    rows = max(ingredient.place[1].stop for ingredient in recipe.ingredients)
    complete = len(recipe.ingredients) % len(numbers) == 0
    found = (len(numbers), rows, *recipe.ingredients[0].entry.shape[1:]) if complete else ()
    if found != recipe.shape:
        raise CheckpointCorruptError(
            f"{recipe.parameter} has shape {list(recipe.shape)} by config.json and {list(found)} in the checkpoint"
        )


def require_all(recipes: dict[str, Recipe], parameters: Iterable[str]) -> None:
    """Raise CheckpointCorruptError when a parameter has no weights in the checkpoint."""
    missing = [name for name in parameters if name not in recipes]
    if missing:
        raise CheckpointCorruptError(
            f"the checkpoint lacks the weights of {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
        )
