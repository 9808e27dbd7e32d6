"""Nothing but `s2.files` deletes, renames or replaces, and nothing but `s2.ending` ends a command."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("s2", "data", "eval", "scripts") for path in (ROOT / folder).rglob("*.py"))
# of os, shutil and tempfile; methods of paths
FUNCTIONS = {"remove", "unlink", "rename", "renames", "replace", "rmdir", "removedirs", "rmtree", "move"}
FUNCTIONS |= {"truncate", "copytree", "TemporaryDirectory"}
METHODS = {"unlink", "rmdir", "rename", "write_text", "write_bytes", "symlink_to", "hardlink_to"}


def calls(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, what) of each call that could take or replace a file."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        if isinstance(owner, ast.Name) and owner.id in ("os", "shutil", "tempfile"):
            if name in FUNCTIONS:
                found.append((node.lineno, f"{owner.id}.{name}"))
        elif name in METHODS and not (isinstance(owner, ast.Name) and owner.id == "files"):
            found.append((node.lineno, f".{name}()"))
        elif name == "replace" and len(node.args) == 1 and not node.keywords:  # of a path; a text's takes two
            found.append((node.lineno, ".replace(path)"))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_module_for_files_takes_or_replaces_any(path: Path) -> None:
    if path == ROOT / "s2" / "files.py":
        return
    found = calls(ast.parse(path.read_text(encoding="utf-8")))
    assert not found, "\n".join(f"{path}:{line}: {what}" for line, what in found)


def test_the_search_finds_what_it_is_for() -> None:
    code = (
        "import os, shutil\nos.replace(a, b)\nshutil.rmtree(c)\npath.unlink()\npath.replace(d)\nx.replace('a', 'b')\n"
    )
    assert [line for line, _ in calls(ast.parse(code))] == [2, 3, 4, 5]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_ends_in_one_way(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if '__name__ == "__main__"' in text:
        assert "ending.run(main)" in text, path
