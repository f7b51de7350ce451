"""Which checkpoint tensors make which model parameter.

Names in a checkpoint are not always the model's: prefixes differ, and a mixture of experts is stored expert by expert
while the model holds all experts in one tensor. The transformers library knows these rules; this file asks it and
turns the answer into recipes that copy bytes to places. A rule that is no renaming, stacking or concatenation is
refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from headrace.errors import CheckpointCorruptError, UnsupportedModelError
from headrace.inference.transformers_seam import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)
from headrace.model.safetensors_index import TensorEntry


class Ingredient(NamedTuple):
    """A checkpoint tensor and the place in the parameter that it fills."""

    entry: TensorEntry
    place: tuple[Any, ...]
    """index expression into the parameter; empty: all of it"""


class Recipe(NamedTuple):
    """How one parameter is made."""

    parameter: str
    shape: tuple[int, ...]
    ingredients: tuple[Ingredient, ...]

    @property
    def is_one_tensor(self) -> bool:
        """The parameter is a checkpoint tensor as it stands."""
        return len(self.ingredients) == 1 and not self.ingredients[0].place


def recipes_of(model: Any, entries: Iterable[TensorEntry]) -> dict[str, Recipe]:
    """Return parameter name -> recipe for every parameter of `model` that a checkpoint tensor belongs to.

    Tensors that the model has no place for are left out, as the transformers library does. Raises
    CheckpointCorruptError where shapes do not agree and UnsupportedModelError for an unknown conversion.
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
            name, pattern = entry.name, None
        if name in state:
            collected.setdefault(name, []).append((pattern, entry))
    recipes = {}
    for name, parts in collected.items():
        shape = tuple(state[name].shape)
        pattern = parts[0][0]
        ingredients = (Ingredient(parts[-1][1], ()),) if pattern is None else _fused(name, by_pattern[pattern], parts)
        recipes[name] = Recipe(name, shape, ingredients)
        _check_shape(recipes[name])
    return recipes


def _fused(name: str, rule: Any, parts: list[tuple[str | None, TensorEntry]]) -> tuple[Ingredient, ...]:
    """Places of the parts of a parameter that is stacked along dim 0 and then concatenated along dim 1."""
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in rule.operations]
    if operations not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        kinds = ", ".join(kind.__name__ for kind, _ in operations)
        raise UnsupportedModelError(f"{name} is made from the checkpoint by {kinds}, which headrace cannot stream yet")
    ingredients = []
    offset = 0
    for pattern in rule.source_patterns:
        stacked = [entry for own, entry in parts if own == pattern]
        for number, entry in enumerate(stacked):
            ingredients.append(Ingredient(entry, (number, slice(offset, offset + entry.shape[0]))))
        offset += stacked[0].shape[0] if stacked else 0
    return tuple(ingredients)


def _check_shape(recipe: Recipe) -> None:
    if recipe.is_one_tensor:
        found: tuple[int, ...] = recipe.ingredients[0].entry.shape
    else:
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
