"""Rules of the house that no linter knows. What breaks one today is listed and may only be taken off the list.

A list is compared both ways: a new sin fails the test, and so does an entry that has been mended.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from headrace.model.formats import FORMATS
from headrace.planning.strategies import Strategy

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "headrace"
MOST_FILES = 30

STRATEGIES_NAMED_ELSEWHERE = {
    "accuracy/published_case.py",
    "cli/options.py",
    "cli/plan_report.py",
    "economics/claims/latency.py",
    "planning/answer_json.py",
    "planning/plan.py",
}
SEAM = "inference/transformers_seam.py"
NAMES_OF_CACHES = {"past_key_values", "cache_params"}
OF_OTHER_LIBRARIES = {"_replace", "_asdict", "_fields", "_exit", "_non_persistent_buffers_set"}
"""private by their form: of named tuples, of os, of a torch module's buffers"""
FORMAT_TABLES_ELSEWHERE = {"model/quantized.py"}

OTHER_MEANINGS = {"cpu", "experts", "tensor"}
"""strategies whose names are also those of a device, of a part of a layer, of what a checkpoint consists of"""
NAMES_OF_FORMATS = {name.lower() for name in FORMATS} | {"float32", "bfloat16", "float16", "f32", "f16"}


@cache
def modules() -> dict[str, ast.Module]:
    """Every file of the source by its path within it."""
    return {
        path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(SOURCE.rglob("*.py"))
    }


def public_classes(tree: ast.Module) -> set[str]:
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}


def names_a_strategy(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in {*Strategy} - OTHER_MEANINGS
        for node in ast.walk(tree)
    )


def collections_of(tree: ast.Module) -> Iterator[list[ast.expr | None]]:
    """What each display, each dictionary's side and each enumeration of the file consists of."""
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            yield [*node.elts]
        elif isinstance(node, ast.Dict):
            yield [*node.keys]
            yield [*node.values]
        elif isinstance(node, ast.ClassDef):
            yield [item.value for item in node.body if isinstance(item, ast.Assign)]


def has_a_table_of_formats(tree: ast.Module) -> bool:
    return any(
        len(
            {each.value.lower() for each in every if isinstance(each, ast.Constant) and isinstance(each.value, str)}
            & NAMES_OF_FORMATS
        )
        >= 2
        for every in collections_of(tree)
    )


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def own_private_names() -> set[str]:
    """Private names that headrace gives to attributes, functions and classes of its own, outside of the seam."""
    own = set()
    for path, tree in modules().items():
        for node in ast.walk(tree) if path != SEAM else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in own if is_private(name)}


@cache
def private_names_of_the_seam() -> set[str]:
    return {name for node in ast.walk(modules()[SEAM]) for name in _names_in(node) if is_private(name)}


def _names_in(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
        yield node.value
    elif isinstance(node, ast.keyword) and node.arg is not None:
        yield node.arg


def knows_transformers_inside(tree: ast.Module) -> set[str]:
    """Modules within transformers that the file imports, and private names of others that it uses."""
    found = set()
    private = private_names_of_the_seam()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("transformers."):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names if each.name.startswith("transformers.")}
        names = set(_names_in(node))
        found |= names & (private | NAMES_OF_CACHES)
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            found |= names - own_private_names() - OF_OTHER_LIBRARIES
    return found


def files_where(breaks: Callable[[ast.Module], bool], *, apart_from: set[str]) -> set[str]:
    return {path for path, tree in modules().items() if path not in apart_from and breaks(tree)}


def test_no_two_public_classes_have_one_name() -> None:
    places = defaultdict(list)
    for path, tree in modules().items():
        for name in public_classes(tree):
            places[name].append(path)
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_no_folder_is_crowded() -> None:
    sizes: dict[str, int] = defaultdict(int)
    for path in SOURCE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            sizes[path.parent.relative_to(SOURCE).as_posix()] += 1
    assert [folder for folder, size in sizes.items() if size > MOST_FILES] == [], sizes


def test_strategies_are_named_in_one_file() -> None:
    assert files_where(names_a_strategy, apart_from={"planning/strategies.py"}) == STRATEGIES_NAMED_ELSEWHERE


def test_one_file_knows_transformers_inside() -> None:
    """What a release may change is mended in one place; tests/inference/test_transformers_seam.py names each thing."""
    found = {path: knows_transformers_inside(tree) for path, tree in modules().items() if path != SEAM}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from transformers.cache_utils import Cache", {"transformers.cache_utils"}),
        ("import transformers.generation.utils", {"transformers.generation.utils"}),
        ("model(past_key_values=cache)", {"past_key_values"}),
        ('options["cache_params"] = cache', {"cache_params"}),
        ("config._attn_implementation = 'sdpa'", {"_attn_implementation"}),
        ("model._tied_weights_keys", {"_tied_weights_keys"}),
        ("from transformers import AutoConfig", set()),
        ("row._replace(length=3)", set()),
    ],
)
def test_knowledge_of_transformers_inside_is_seen(source: str, names: set[str]) -> None:
    assert knows_transformers_inside(ast.parse(source)) == names


def test_formats_of_numbers_have_one_table() -> None:
    """Of single numbers, which machines and models share, in dtypes; of weights with their scales in formats."""
    assert files_where(has_a_table_of_formats, apart_from={"dtypes.py", "model/formats.py"}) == FORMAT_TABLES_ELSEWHERE


def test_no_traces_of_a_run_are_kept() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so that nothing says which files are kept")
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert "pyproject.toml" in kept
    assert [path for path in kept if path.endswith((".log", ".tmp"))] == []


@pytest.mark.parametrize(
    ("source", "broken"),
    [
        ('chosen == "overlap"', True),
        ('chosen == "cpu"', False),
        ('"""overlap and resident"""', False),
    ],
)
def test_a_strategy_is_seen(source: str, broken: bool) -> None:
    assert names_a_strategy(ast.parse(source)) is broken


@pytest.mark.parametrize(
    ("source", "broken"),
    [
        ('BYTES = {"F32": 4, "BF16": 2}', True),
        ('STORED = {torch.float32: "float32", torch.float16: "float16"}', True),
        ('if name in ("bf16", "fp16"): pass', True),
        ('class Dtype(StrEnum):\n    A = "float32"\n    B = "bfloat16"', True),
        ('find("bf16", "overlap")', False),
        ('NAMES = ("bf16", "llama")', False),
    ],
)
def test_a_table_of_formats_is_seen(source: str, broken: bool) -> None:
    assert has_a_table_of_formats(ast.parse(source)) is broken


def found(file: str, pattern: str) -> tuple[str, ...]:
    match = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None, f"{file} has no {pattern}"
    return match.groups()


def test_the_range_of_transformers_is_what_is_tested() -> None:
    """`make versions` takes its two ends, constraints.txt a version between them, README names all three."""
    least, newest = found("Makefile", r"^TRANSFORMERS := ([\d.]+)\.0 ([\d.]+)\.\d+$")
    (pinned,) = found("constraints.txt", r"^transformers==([\d.]+)\.\d+$")
    major, minor = newest.split(".")
    assert found("pyproject.toml", r'"transformers>=([\d.]+),<([\d.]+)"') == (least, f"{major}.{int(minor) + 1}")
    assert found("README.md", r"transformers ([\d.]+), ([\d.]+) and ([\d.]+\d)") == (least, pinned, newest)


DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/formulas.md", "bench/METHODOLOGY.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_documents_name_exist(document: str) -> None:
    """A path in backticks is one of the repository's, or the end of one."""
    named = re.findall(r"`([a-z_/]+\.(?:py|toml|md))`", (ROOT / document).read_text(encoding="utf-8"))
    there = [f"/{path.relative_to(ROOT)}" for path in ROOT.rglob("*") if path.suffix in (".py", ".toml", ".md")]
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in there)] == []
