"""Imports go downward only, never in a circle, and no file grows beyond what one reads in a sitting.

All imports count: those within functions and those under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 450

# From the ground up: a module imports from its own floor and from those below. `a.*` is everything in a package that
# has no line of its own; a package's bare name is its __init__.py.
FLOORS = [
    ["s2.*"],
    ["s2.attention.*"],
    ["s2.attention.kernels", "s2.attention.kernels.*"],
    ["s2.attention.kernels.hopper.*", "s2.attention.kernels.hopper"],
    ["s2.attention.op", "s2.attention.decode", "s2.attention.paged", "s2.attention.store"],
    ["s2.attention"],
    ["s2.integrations.*", "s2.integrations"],
    ["s2"],  # its __init__.py, which registers with transformers
    ["s2.model.*", "s2.model"],
    ["s2.inference.*", "s2.inference"],
    ["s2.integrations.megatron.*", "s2.integrations.megatron"],  # these know the model, unlike their neighbours
    ["s2.integrations.vllm.*", "s2.integrations.vllm"],
    ["data.*", "data"],
    ["s2.training.*", "s2.training"],
    ["eval.*", "eval"],
    ["scripts.*", "scripts"],
]
# data knows no model, and the trainer gets its data module from the recipe
STRANGERS = [
    ("data", "s2.attention"),
    ("data", "s2.model"),
    ("data", "s2.inference"),
    ("s2.training", "data"),
    ("s2.training", "s2.inference"),
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for folder in ("s2", "data", "eval", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(module: str, code: str, is_package: bool, known: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """(imported module, line) for the project's modules that `code` imports."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            names = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, name in names:
            # a script imports its neighbours by their bare names
            beside = f"{module.rpartition('.')[0]}.{base}" if module.startswith("scripts.") else base
            for found in (f"{base}.{name}", base, beside):
                if found in known:
                    yield found, node.lineno
                    break


GRAPH = {
    module: list(imports(module, path.read_text(encoding="utf-8"), path.name == "__init__.py", SOURCES))
    for module, path in SOURCES.items()
}


def floor_of(module: str) -> int:
    """The floor whose line says most of the module's name."""
    said = {}
    for floor, lines in enumerate(FLOORS):
        for line in lines:
            if line == module or (line.endswith(".*") and module.startswith(line[:-1])):
                said[len(line) + (line == module)] = floor
    assert said, f"{module} stands on no floor: FLOORS needs a line for it"
    return said[max(said)]


def circles(graph: Mapping[str, list[tuple[str, int]]]) -> list[list[str]]:
    """One circle through every module that has one: the shortest, from its first name."""
    found = set()
    for start in graph:
        came_from, front = {}, [start]
        while front and start not in came_from:
            following = []
            for module in front:
                for target, _ in graph[module]:
                    if target not in came_from:
                        came_from[target] = module
                        following.append(target)
            front = following
        if start in came_from:
            circle, module = [start], came_from[start]
            while module != start:
                circle.append(module)
                module = came_from[module]
            first = circle.index(min(circle))
            found.add(tuple(reversed(circle[first + 1 :] + circle[: first + 1])))
    return [list(circle) for circle in sorted(found)]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_imports_run_in_no_circle() -> None:
    found = circles(GRAPH)
    assert not found, "\n".join(" -> ".join([*circle, circle[0]]) for circle in found)


def test_no_floor_imports_one_above_it() -> None:
    found = [
        f"{SOURCES[module].relative_to(ROOT)}:{line}: imports {target}, which stands above"
        for module, targets in GRAPH.items()
        for target, line in targets
        if floor_of(target) > floor_of(module)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("package", "stranger"), STRANGERS)
def test_packages_that_do_not_know_each_other(package: str, stranger: str) -> None:
    found = [
        f"{SOURCES[module].relative_to(ROOT)}:{line}: imports {target}"
        for module, targets in GRAPH.items()
        for target, line in targets
        if within(module, package) and within(target, stranger)
    ]
    assert not found, "\n".join(found)


def test_no_file_is_longer_than_one_reads_in_a_sitting() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES.values()}
    found = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > MOST_LINES]
    assert not found, f"at most {MOST_LINES} lines:\n" + "\n".join(found)


def test_the_search_sees_every_form_of_an_import() -> None:
    code = """
import a.b.c as short, os
from . import d
from .d import name
from .. import e
if TYPE_CHECKING:
    from ..e.f import Type
def function():
    from a import e
"""
    known = dict.fromkeys(["a", "a.b", "a.b.c", "a.b.d", "a.e", "a.e.f", "scripts.neighbour"])
    wanted = [("a.b.c", 2), ("a.b.d", 3), ("a.b.d", 4), ("a.e", 5), ("a.e.f", 7), ("a.e", 9)]
    assert sorted(imports("a.b.module", code, False, known)) == sorted(wanted)
    assert list(imports("a.b", "from . import d", True, known)) == [("a.b.d", 1)]
    assert list(imports("scripts.module", "import neighbour", False, known)) == [("scripts.neighbour", 1)]


def test_the_search_finds_circles_and_floors() -> None:
    graph = {"a": [("b", 1)], "b": [("c", 1)], "c": [("b", 2), ("d", 1)], "d": []}
    assert circles(graph) == [["b", "c"]]
    assert floor_of("s2.attention") > floor_of("s2.attention.op") > floor_of("s2.attention.kernels.hopper.launch")
    assert floor_of("s2.attention.kernels.triton.tiles") > floor_of("s2.attention.pattern")
